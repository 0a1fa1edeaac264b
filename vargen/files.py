"""Write files so that a failure damages nothing on disk: beside the target first, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _check_target(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or allow overwriting (overwrite=True, --overwrite)")
    parent = path.parent
    if not parent.is_dir():
        raise ValueError(f"cannot write {path}: the folder {parent} does not exist")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"cannot write {path}: no permission to write in {parent}")


def _beside(path: Path) -> Path:
    # same folder, hence same file system, so that the rename is atomic; the suffix stays because writers read it
    return path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}{path.suffix}")


@contextmanager
def atomic_write(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write; it becomes ``path`` when the block ends without an exception.

    Args:
        path: the file to create.
        overwrite: allow replacing an existing file.

    Raises:
        ValueError: the file exists, or its folder is missing or not writable.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(Path(folder) / "note.txt") as temporary:
        ...         _ = temporary.write_text("done")
        ...     (Path(folder) / "note.txt").read_text()
        'done'
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    _check_target(path, overwrite)
    temporary = _beside(path)
    try:
        yield temporary
        _check_target(path, overwrite)  # someone else may have written it meanwhile
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; its files appear in ``path`` when the block ends without an exception.

    An existing folder is accepted when it is empty or ``overwrite`` is set; files of other names in it are kept, and
    every file is replaced by one rename.

    Args:
        path: the folder to create.
        overwrite: allow replacing files of an existing folder.

    Raises:
        ValueError: the folder exists and is not empty, or its parent is missing or not writable.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"cannot write folder {path}: it is a file")
    _check_target(path, overwrite or (path.is_dir() and not any(path.iterdir())))
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        if not path.exists():
            temporary.rename(path)
            return
        for source in sorted(p for p in temporary.rglob("*") if p.is_file()):
            target = path / source.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
