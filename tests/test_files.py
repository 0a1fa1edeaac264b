"""Writing without damage."""

from __future__ import annotations

import errno
import re
import resource
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vargen.datasets.heroes.build_atlas import compose_folder
from vargen.display.preview import LivePreview
from vargen.evaluation.images import write_npz
from vargen.files import WriteError, atomic_dir, atomic_write, writing
from vargen.metrics.statistics import GaussianStatistics
from vargen.pipelines.video_frames import save_video
from vargen.samplers.acceptance.codebook_neighbors import neighbor_table
from vargen.training.checkpoints import save_checkpoint
from vargen.validation.printable import printable


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


# --- the system refuses


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: what ``ulimit -f`` does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


NOISE = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)


def _stream_npz(path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, a=NOISE)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive, archive.open("a", "w", force_zip64=True) as stream:
        stream.write(NOISE.tobytes())


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: path.write_text("x" * 10**5),
    "bytes": lambda path: path.write_bytes(bytes(10**5)),
    "npz": _stream_npz,
    "npy": lambda path: np.save(path, NOISE),
    "zip": _zip,
    "png": lambda path: PICTURE.save(path, "PNG"),
    "gif": lambda path: PICTURE.save(path, "GIF"),
    "safetensors": lambda path: save_file({"a": torch.from_numpy(NOISE)}, path),
    "torch": lambda path: torch.save({"a": torch.from_numpy(NOISE)}, path),
    "copy": lambda path: shutil.copyfile(path.parents[1] / "source", path),
}
_KINDS = {"torch": ".npy", "npy": ".npy"}  # numpy appends a suffix of its own


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_too_large_is_named_and_nothing_is_left(kind: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(NOISE.tobytes())
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / f"old\x1b{_KINDS.get(kind, '.bin')}"
    target.write_text("old")
    with limited(20_000), pytest.raises(WriteError) as caught, atomic_write(target, overwrite=True) as beside:
        WRITERS[kind](beside)
    said = "the disk is full, or the file too large" if kind in ("torch", "npy") else "File too large; raise the limit"
    assert str(caught.value).startswith(f"cannot write {printable(target)}: {said}")
    assert str(caught.value).isprintable()
    assert isinstance(caught.value, OSError | ValueError)
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    assert target.read_text() == "old"


@pytest.mark.parametrize("kind", ["text", "png", "safetensors", "torch"])
@pytest.mark.parametrize("which", ["", "second.bin"])
def test_a_file_too_large_for_its_folder_is_named(kind: str, which: str, tmp_path: Path) -> None:
    """The folder, or the file where the code says which one it writes: some libraries take the half file away again."""
    with limited(20_000), pytest.raises(WriteError) as caught, atomic_dir(tmp_path / "out") as beside:  # noqa: PT012
        (beside / "first.json").write_text("small")
        with writing(beside / which):
            WRITERS[kind](beside / "second.bin")
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'out' / which}: ")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(WriteError) as caught, atomic_write(tmp_path / "x.txt") as beside:  # noqa: PT012
        beside.symlink_to("/dev/full")
        beside.write_text("x" * 10**5)
    assert (
        str(caught.value)
        == f"cannot write {tmp_path / 'x.txt'}: No space left on device; make room, or write to another disk"
    )
    assert caught.value.errno == errno.ENOSPC


def test_inner_files_are_named_where_they_would_have_been(tmp_path: Path) -> None:
    named = pytest.raises(WriteError, match=r"out/inner\.bin: File too large")
    with limited(20_000), named, atomic_dir(tmp_path / "out") as beside, atomic_write(beside / "inner.bin") as inner:
        inner.write_bytes(NOISE.tobytes())
    with pytest.raises(WriteError, match=r"out/absent/x: No such file"), atomic_dir(tmp_path / "out") as beside:
        (beside / "absent" / "x").write_text("x")


@pytest.mark.parametrize(
    "error", [ValueError("own"), FileNotFoundError(2, "no", "elsewhere"), RuntimeError("other"), KeyError(3)]
)
def test_errors_about_something_else_pass(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "x"):
        raise error
    assert caught.value is error


def _checkpoint(folder: Path) -> None:
    state = {"a": torch.from_numpy(NOISE)}
    save_checkpoint(folder, 3, weights={"model": state}, optimizer={}, state={"step": 3}, keep=1)


def _preview(folder: Path) -> None:
    preview = LivePreview()
    preview.frames = [PICTURE]
    preview.save(folder / "film.gif")


def _neighbors(folder: Path) -> None:
    neighbor_table(torch.rand(1000, 2), 8, folder=folder)


LIBRARY: dict[str, Callable[[Path], Any]] = {
    "checkpoints/step-00000003/model.safetensors": _checkpoint,
    "film.gif": _preview,
    "neighbors-": _neighbors,
    "images.npz": lambda folder: write_npz(folder / "images.npz", NOISE[None]),
    "clip.gif": lambda folder: save_video([PICTURE], folder / "clip.gif"),
    "heroes/captions.jsonl": lambda folder: compose_folder(200, folder / "heroes"),
    "moments.npz": lambda folder: GaussianStatistics.from_features(torch.rand(9, 99)).save(folder / "moments.npz"),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_whatever_the_library_writes_is_named(name: str, tmp_path: Path) -> None:
    with limited(20_000), pytest.raises(ValueError, match="File too large") as caught:
        LIBRARY[name](tmp_path)
    assert re.match(f"cannot write {tmp_path / name}[^ ]*: ", str(caught.value)), str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
