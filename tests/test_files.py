"""Writing without damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from vargen.files import atomic_dir, atomic_write


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    with atomic_write(target) as temporary:
        temporary.write_text("old")
        assert not target.exists()
    with pytest.raises(ValueError, match="--overwrite"), atomic_write(target):
        pass
    with pytest.raises(KeyboardInterrupt), atomic_write(target, overwrite=True) as temporary:  # noqa: PT012  the interruption belongs inside
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    with atomic_write(target, overwrite=True) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_write_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"), atomic_write(tmp_path / "absent" / "x"):
        pass
    with pytest.raises(ValueError, match="is a folder"), atomic_write(tmp_path, overwrite=True):
        pass


def test_interrupted_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_dir(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("1")
    (target / "mine").write_text("kept")
    with pytest.raises(ValueError, match="exists"), atomic_dir(target):
        pass
    with pytest.raises(RuntimeError), atomic_dir(target, overwrite=True) as temporary:  # noqa: PT012  the failure belongs inside
        (temporary / "b").write_text("half")
        raise RuntimeError
    with atomic_dir(target, overwrite=True) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("2")
    assert {p.relative_to(target).as_posix(): p.read_text() for p in target.rglob("*") if p.is_file()} == {
        "sub/a": "2",
        "mine": "kept",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_dir(tmp_path / "out") as temporary:
        (temporary / "a").write_text("1")
    assert (tmp_path / "out" / "a").read_text() == "1"
