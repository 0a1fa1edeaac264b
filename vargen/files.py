"""Write files so that a failure damages nothing on disk: beside the target first, then renamed. What fails names the file.

And what a file holds, as a digest.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vargen.validation.printable import printable
from vargen.validation.reading import local_path

_HINTS = {
    errno.ENOSPC: "; make room, or write to another disk",
    errno.EDQUOT: "; make room, or write to another disk",
    errno.EFBIG: "; raise the limit on the size of files (ulimit -f), or write to another disk",
    errno.EROFS: "; write to another disk",
}
_REFUSALS = (*_HINTS, errno.EIO, errno.EPIPE)
_UNSAID = "the disk is full, or the file too large"  # libraries that do not say which


class WriteError(OSError, ValueError):
    """The system refused to write a file: the disk is full, the file too large, the folder read-only.

    ``filename`` is the file that was asked for, ``strerror`` the system's reason.
    """

    def __str__(self) -> str:
        hint = _HINTS.get(self.errno, "") if self.errno is not None else ""
        return f"cannot write {printable(self.filename)}: {printable(self.strerror)}{hint}"


def _check_target(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ValueError(
            f"{printable(path)} exists; choose another name or allow overwriting (overwrite=True, --overwrite)"
        )
    parent = path.parent
    if not parent.is_dir():
        raise ValueError(f"cannot write {printable(path)}: the folder {printable(parent)} does not exist")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"cannot write {printable(path)}: no permission to write in {printable(parent)}")


def _beside(path: Path) -> Path:
    # same folder, hence same file system, so that the rename is atomic; the suffix stays because writers read it
    return path.with_name(f".{path.stem[:40]}.{os.getpid()}.{secrets.token_hex(4)}{path.suffix}")


def make_folder(path: str | Path) -> None:
    """Make a folder and those above it.

    Raises:
        ValueError: the system refuses, or a file is in the way.
    """
    try:
        local_path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"cannot write into {printable(path)}: {reason}; choose another output folder") from error


@contextmanager
def writing(path: str | Path, beside: Path | None = None) -> Iterator[None]:
    """Turn what goes wrong while a file is written into a ``WriteError`` that names it.

    The system's own errors about a full disk carry no name, and the libraries that write tensors, arrays and pictures have
    errors of their own.

    Args:
        path: what is being written. Of a folder, an error that does not say which file it is about names the folder: put
            ``writing`` around each file too.
        beside: where it is written before it gets its name.

    Raises:
        WriteError: the system refused; errors about other files pass as they are.
    """
    try:
        yield
    except Exception as error:
        own = beside if beside is not None else Path(path)
        reason = _reason(error, own)
        if reason is None:
            raise
        written = _named(error, own) or own
        raise WriteError(*reason, str(Path(path) / written.relative_to(own))) from error


def _reason(error: Exception, own: Path) -> tuple[int | None, str] | None:
    """Number and text of the system's refusal to write ``own`` or a file in it; None where the error is another one."""
    if isinstance(error, OSError):
        if error.filename is not None:
            return (error.errno, error.strerror or str(error)) if _named(error, own) else None
        if error.errno in _REFUSALS:
            return error.errno, error.strerror or str(error)
        return (None, _UNSAID) if type(error) is OSError and error.errno is None else None  # numpy, imageio
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (number := re.search(r"\(os error (\d+)\)", text)):
        return int(number[1]), os.strerror(int(number[1]))
    if isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter|file write failed", text):
        return None, _UNSAID
    return None


def _named(error: Exception, own: Path) -> Path | None:
    """The file ``own`` or inside it that an error of the system names, as the first or, where one is copied, the second."""
    names = [getattr(error, attribute, None) for attribute in ("filename", "filename2")]
    files = [Path(os.fsdecode(name)) for name in names if isinstance(name, str | bytes | os.PathLike)]
    return next((file for file in files if file == own or own in file.parents), None)


@contextmanager
def atomic_write(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write; it becomes ``path`` when the block ends without an exception.

    Args:
        path: the file to create.
        overwrite: allow replacing an existing file.

    Raises:
        ValueError: the file exists, or its folder is missing or not writable.
        WriteError: the disk is full, or the file too large for the system or a limit.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(Path(folder) / "note.txt") as temporary:
        ...         _ = temporary.write_text("done")
        ...     (Path(folder) / "note.txt").read_text()
        'done'
    """
    path = local_path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {printable(path)}: it is a folder")
    _check_target(path, overwrite)
    temporary = _beside(path)
    try:
        with writing(path, temporary):
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
        WriteError: the disk is full, or a file too large for the system or a limit.
    """
    path = local_path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"cannot write folder {printable(path)}: it is a file")
    _check_target(path, overwrite or (path.is_dir() and not any(path.iterdir())))
    temporary = _beside(path)
    try:
        with writing(path, temporary):
            temporary.mkdir()
            yield temporary
            _move_in(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_in(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    for source in sorted(p for p in temporary.rglob("*") if p.is_file()):
        target = path / source.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
