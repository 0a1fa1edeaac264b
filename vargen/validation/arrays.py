"""Read numpy's files (npy, npz) from outside: headers first, nothing unpickled, nothing allocated that the file does not hold.

numpy believes a header: one of a hundred bytes can ask for any amount of memory. Here shape, type and size are checked
against the caller's wishes and against the file before anything is read.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np

from vargen.validation.printable import printable, shown

MAX_ARRAY = 2**29  # bytes of an array that is read whole
_MAX_HEADER = 10_000  # characters, as numpy allows by default
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy writes; others unpack without a bound
_READERS = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}


class Damaged(Exception):
    """What is wrong with an array, without the name of its file."""


@dataclass(frozen=True)
class ArrayHeader:
    """What a file says about an array."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    offset: int  # bytes before the values

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check(self, kinds: str, ndim: int | None = None, limit: int = MAX_ARRAY) -> None:
        """Raise ``Damaged`` unless the array is of these kinds of numbers, has ``ndim`` axes and at most ``limit`` bytes."""
        if self.dtype.kind not in kinds or self.dtype.itemsize > 8 or self.dtype.subdtype is not None:
            raise Damaged(f"holds values of type {printable(self.dtype)}, expected {_names(kinds)}")
        if ndim is not None and len(self.shape) != ndim:
            raise Damaged(f"has the shape {shown(list(self.shape))}, expected {ndim} axes")
        if self.nbytes > limit:
            raise Damaged(f"has the shape {shown(list(self.shape))}, larger than {limit:,} bytes")


def read_header(stream: IO[bytes]) -> ArrayHeader:
    """Read the header of an array and leave the stream at its values.

    Raises:
        Damaged: not numpy's format.
    """
    start = stream.read(8)
    if len(start) < 8 or not start.startswith(b"\x93NUMPY") or start[6] not in (1, 2, 3):
        raise Damaged("is not an array of numpy")
    size = stream.read(2 if start[6] == 1 else 4)
    length = int.from_bytes(size, "little")
    if length > _MAX_HEADER:  # before it is read: numpy looks only afterwards
        raise Damaged(f"has a header of {length:,} bytes")
    text = stream.read(length)
    try:
        shape, fortran, dtype = _READERS[min(start[6], 2)](io.BytesIO(size + text))
        if any(side < 0 for side in shape):
            raise ValueError(f"negative side in {list(shape)}")
    except Exception as error:  # numpy evaluates literals: syntax, recursion, types, ...
        raise Damaged(f"has an unreadable header: {_one_line(error)}") from None
    return ArrayHeader(tuple(map(int, shape)), bool(fortran), dtype, 8 + len(size) + length)


def check_npy(path: str | Path, kinds: str, ndim: int | None = None, limit: int = MAX_ARRAY) -> ArrayHeader:
    """Return the header of an npy file that holds all the values it announces.

    Args:
        path: the file.
        kinds: of numbers, as ``numpy.dtype.kind``.
        ndim: axes; None accepts any.
        limit: bytes beyond which it is refused.

    Raises:
        ValueError: no such file, another type or number of axes, too large, truncated.
    """
    name = printable(path)
    if not Path(path).is_file():
        raise ValueError(f"no file at {name}")
    try:
        with open(path, "rb") as stream:
            header = read_header(stream)
        header.check(kinds, ndim, limit)
        if Path(path).stat().st_size < header.offset + header.nbytes:
            raise Damaged("is truncated: the array ends early")
    except Damaged as error:
        raise ValueError(f"{name} {error}") from None
    return header


class Npz:
    """An open npz archive; use ``open_npz``."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self.archive, self.name = archive, name
        self.names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    @contextmanager
    def stream(self, name: str) -> Iterator[tuple[ArrayHeader, IO[bytes]]]:
        """Open an array: its header, and the stream of its values; the archive holds as many as the header says."""
        info = self.archive.getinfo(f"{name}.npy")
        try:
            if info.compress_type not in _METHODS:
                raise Damaged(f"is compressed by the method {info.compress_type}; numpy writes only 0 and 8")
            with self.archive.open(info) as stream:
                header = read_header(stream)
                if info.file_size < header.offset + header.nbytes:
                    raise Damaged("is truncated: the array ends early")
                yield header, stream
        except Damaged as error:
            raise ValueError(f"{self.name}: {printable(name)} {error}") from None

    def header(self, name: str) -> ArrayHeader:
        """Return what the archive says about an array."""
        with self.stream(name) as (header, _):
            return header

    def read(self, name: str, kinds: str, ndim: int | None = None, limit: int = MAX_ARRAY) -> np.ndarray:
        """Read an array whole, in the machine's byte order.

        Args:
            name: without ``.npy``.
            kinds: of numbers that are accepted, as ``numpy.dtype.kind``: ``"f"``, ``"iu"``, ...
            ndim: axes; None accepts any.
            limit: bytes beyond which it is refused.

        Raises:
            ValueError: another type or number of axes, too large, truncated.
        """
        with self.stream(name) as (header, stream):
            header.check(kinds, ndim, limit)
            values = np.empty(header.nbytes, dtype=np.uint8)
            fill(stream, values.data)
            stream.read(1)  # at the end the archive's checksum is compared
        order: Literal["C", "F"] = "F" if header.fortran else "C"
        array = values.view(header.dtype) if len(values) else np.empty(0, header.dtype)
        return array.reshape(header.shape, order=order).astype(header.dtype.newbyteorder("="), copy=False)

    def count(self, name: str, least: int = 1, most: int = 2**53) -> int:
        """Read one whole number.

        Raises:
            ValueError: not one number, not a whole one, or outside ``least`` to ``most``.
        """
        values = self.read(name, "iuf", limit=64)
        value = values.reshape(-1)[0].item() if values.size == 1 else math.nan
        if not (math.isfinite(value) and value == int(value) and least <= value <= most):
            got = shown(value) if values.size == 1 else f"the shape {list(values.shape)}"
            raise ValueError(f"{self.name}: {printable(name)} must be a whole number in {least}..{most}, got {got}")
        return int(value)


@contextmanager
def open_npz(path: str | Path) -> Iterator[Npz]:
    """Open an npz archive without unpickling; a missing, truncated or foreign file is one ValueError."""
    name = printable(path)
    if not Path(path).is_file():
        raise ValueError(f"no file at {name}")
    try:
        with zipfile.ZipFile(path) as archive:
            yield Npz(archive, name)
    except ValueError:
        raise
    except _FOREIGN as error:
        raise ValueError(f"{name} is truncated or not an npz archive: {_one_line(error)}") from error


def fill(stream: IO[bytes], target: memoryview) -> None:
    """Read exactly as many bytes as the target holds.

    Raises:
        Damaged: the stream ends before.
    """
    done = 0
    while done < len(target):
        got = stream.readinto(target[done : done + 2**24])  # type: ignore[attr-defined]
        if not got:
            raise Damaged("is truncated: the array ends early")
        done += got


# encrypted members are a RuntimeError, damaged ones a zlib.error, absent ones a KeyError
_FOREIGN: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    EOFError,
    OSError,
    KeyError,
)
_FOREIGN += (RuntimeError, OverflowError, struct.error)


def _names(kinds: str) -> str:
    names = {"f": "floating-point numbers", "i": "integers", "u": "unsigned integers", "b": "booleans"}
    return " or ".join(names[kind] for kind in kinds)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0][:200])
