"""The folder of a drawing run: finished chunks of images, what was measured on them, and digests of it all.

``images/00000064.npy`` holds the pixels of images 64 to 127, ``measured/NAME/00000064.npy`` what a function made of them,
``chunks/00000064.json`` the digests of both; the last is written last, and a chunk without it, or whose files differ from
it, was never drawn.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vargen.files import WriteError, atomic_write, make_folder, writing
from vargen.validation.arrays import check_npy
from vargen.validation.pictures import MAX_PIXELS, batch_count
from vargen.validation.printable import printable
from vargen.validation.reading import read_json

MANIFEST = "manifest.json"
MAX_CHUNK = 2**32  # bytes of a file of a run
_PARTS = {"chunks", "images", "measured", "claims", MANIFEST}
_FILE_NAME = re.compile(r"(images|measured/[\w.-]+)/\d{8,}\.npy")  # what a record may name: nothing outside the run
_DETAILS = {  # of a record, as ``vargen.evaluation.drawing.generate`` writes them
    "seconds": int | float,
    "num_forwards": int,
    "num_drafter_forwards": int,
    "forwards_per_image": int | float | None,
    "guarantee": str,
    "notes": list,
}


class RunFolder:
    """Chunks of a run on disk.

    Args:
        path: the folder; made when it is missing.
        manifest: plain JSON values that settle every pixel: a folder with another manifest is refused.
        num, chunk: images, and images of a chunk.
        keep_images: whether pixels are stored, or only what is measured on them and the first chunk, to look at.

    Raises:
        ValueError: the folder holds another run or other files, or cannot be written.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], *, num: int, chunk: int, keep_images: bool) -> None:
        self.path, self.num, self.chunk, self.keep_images = path, num, chunk, keep_images
        self._records: dict[int, dict[str, Any]] = {}  # of chunks found whole
        _open(path, json.loads(json.dumps(manifest)))

    @property
    def starts(self) -> range:
        """First image of every chunk."""
        return range(0, self.num, self.chunk)

    def record(self, start: int) -> dict[str, Any] | None:
        """Return the record of a chunk whose files are there and as they were written, else None."""
        if start not in self._records:
            record = self._read_record(start)
            if record is None or not all(self._is_whole(file, digest) for file, digest in record["files"].items()):
                return None
            if self._keeps(start) and self._images_name(start) not in record["files"]:
                return None
            self._records[start] = record
        return self._records[start]

    def records(self) -> list[dict[str, Any]]:
        """Return the records of all chunks of a finished run."""
        found = [self.record(start) for start in self.starts]
        return [record for record in found if record is not None]

    def has(self, start: int, names: set[str]) -> bool:
        """Return whether a chunk is drawn and measured under all the names."""
        record = self.record(start)
        return record is not None and all(self._measured_name(name, start) in record["files"] for name in names)

    def images(self, start: int) -> Tensor | None:
        """Return uint8 ``[n, 3, H, W]`` of a chunk, or None where pixels were not kept."""
        record = self.record(start)
        if record is None or self._images_name(start) not in record["files"]:
            return None
        return torch.from_numpy(np.array(_map_images(self.path / self._images_name(start)))).permute(0, 3, 1, 2)

    def write(self, start: int, images: Tensor, measured: Mapping[str, np.ndarray], details: dict[str, Any]) -> None:
        """Store a drawn chunk.

        Args:
            start: its first image.
            images: uint8 ``[n, 3, H, W]``.
            measured: arrays of length n under their names.
            details: plain JSON values for the record.
        """
        pixels = np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())
        files = {}
        if self._keeps(start):
            files[self._images_name(start)] = self._store(self._images_name(start), pixels)
        record = {"start": start, "stop": start + len(pixels), "pixels": _digest(pixels), "files": files, **details}
        self._finish(start, record, measured)

    def add(self, start: int, measured: Mapping[str, np.ndarray]) -> None:
        """Store what was measured later on the images of a chunk."""
        record = self.record(start)
        assert record is not None
        self._finish(start, {**record, "files": dict(record["files"])}, measured)

    def measured(self, name: str) -> Iterator[np.ndarray]:
        """Yield the arrays of a name, chunk by chunk."""
        for start in self.starts:
            values = np.array(_map(self.path / self._measured_name(name, start)))
            if start == 0:
                shape, dtype = values.shape[1:], values.dtype
            if values.shape != (min(self.chunk, self.num - start), *shape) or values.dtype != dtype:
                raise ValueError(f"{printable(self.path)}: {name} of image {start} on has another shape than the rest")
            yield values

    def digests(self) -> list[str]:
        """Return the SHA-256 of the pixels of every chunk, in order."""
        return [record["pixels"] for record in self.records()]

    def _keeps(self, start: int) -> bool:
        return self.keep_images or start == 0

    def _finish(self, start: int, record: dict[str, Any], measured: Mapping[str, np.ndarray]) -> None:
        for name, values in measured.items():
            file = self._measured_name(name, start)
            record["files"][file] = self._store(file, np.ascontiguousarray(values))
        path = self.path / "chunks" / f"{start:08d}.json"
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path, overwrite=True) as beside:
            beside.write_text(json.dumps(record))
        self._records[start] = record

    def _store(self, name: str, array: np.ndarray) -> str:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, overwrite=True) as beside, open(beside, "wb") as stream:
            np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))  # type: ignore[arg-type]
            stream.write(array.data)  # unlike ndarray.tofile, says why it fails
        return _digest(array)

    def _read_record(self, start: int) -> dict[str, Any] | None:
        try:
            record = read_json(self.path / "chunks" / f"{start:08d}.json")
        except ValueError:
            return None
        return record if isinstance(record, dict) and record.get("start") == start and _is_record(record) else None

    def _is_whole(self, name: str, digest: str) -> bool:
        try:
            return _digest(_map(self.path / name)) == digest
        except (OSError, ValueError):
            return False

    @staticmethod
    def _images_name(start: int) -> str:
        return f"images/{start:08d}.npy"

    @staticmethod
    def _measured_name(name: str, start: int) -> str:
        return f"measured/{name}/{start:08d}.npy"


class RunImages:
    """The images of a finished run, in the order of their seeds."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.name = Path(path), str(path)
        self.files = sorted((self.path / "images").glob("[0-9]*.npy"))
        if not self.files:
            raise ValueError(f"no images in {printable(path)}: the run kept none, or has drawn none yet")
        first, last = (_map_images(file) for file in (self.files[0], self.files[-1]))
        self.size = len(first)
        self.num_images = self.size * (len(self.files) - 1) + len(last)
        self.shape = first.shape[1:3]
        if last.shape[1:3] != self.shape:
            raise ValueError(f"{printable(path)} holds images of several sizes; draw them again in another folder")
        manifest = read_json(self.path / MANIFEST)
        wanted = manifest.get("num") if isinstance(manifest, dict) else None
        if wanted != self.num_images:
            raise ValueError(
                f"{printable(path)} holds {self.num_images} of {printable(wanted)} images: finish the run first"
            )

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield uint8 ``[b, 3, H, W]``."""
        size, pixels = batch_count(size, *self.shape), self.pixels()
        for start in range(0, self.num_images, size):
            yield _channels_first(pixels[np.arange(start, min(start + size, self.num_images))])

    def digest(self) -> str:
        """Return the SHA-256 of the pixels."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(_map_images(file).data)
        return digest.hexdigest()

    def first(self, count: int) -> Tensor:
        """Return the first ``count`` images, or all where there are fewer, uint8 ``[n, 3, H, W]``."""
        return _channels_first(self.pixels()[np.arange(min(count, self.num_images))])

    def pixels(self) -> _Pixels:
        """Return ``[N, H, W, 3]`` on disk, which a vector can index."""
        return _Pixels(self.files, self.size, (self.num_images, *self.shape, 3))


class _Pixels:
    """Arrays on disk, seen as one; nothing is read before it is asked for."""

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, files: list[Path], size: int, shape: tuple[int, ...]) -> None:
        self.files, self.size, self.shape = files, size, shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        out = np.empty((len(index), *self.shape[1:]), dtype=self.dtype)
        for number in np.unique(index // self.size):  # opened one at a time: a process may hold few files open
            rows = np.flatnonzero(index // self.size == number)
            chunk = _map_images(self.files[number])
            if chunk.shape[1:] != self.shape[1:] or len(chunk) <= int((index[rows] % self.size).max()):
                raise ValueError(f"{printable(self.files[number])} does not hold the images of its run; draw it anew")
            out[rows] = chunk[index[rows] % self.size]
        return out


def holds_run(path: Path) -> bool:
    """Return whether a folder is that of a run."""
    return (path / MANIFEST).is_file() and (path / "chunks").is_dir()


def _open(path: Path, manifest: dict[str, Any]) -> None:
    file = path / MANIFEST
    make_folder(path)
    try:
        if not file.is_file():
            foreign = [p.name for p in path.iterdir() if p.name not in _PARTS and not p.name.startswith(".")]
            if foreign:
                raise ValueError(f"{printable(path)} is not empty and holds no evaluation; choose another folder")
            _create(file, json.dumps(manifest, indent=1) + "\n")
    except WriteError:
        raise
    except OSError as error:
        raise ValueError(
            f"cannot write into {printable(path)}: {error.strerror}; choose another output folder"
        ) from error
    stored = read_json(file)
    if not isinstance(stored, dict):
        raise ValueError(f"{printable(file)} is not the manifest of an evaluation; choose another folder")
    different = sorted(k for k in manifest.keys() | stored.keys() if manifest.get(k) != stored.get(k))
    if different:
        raise ValueError(
            f"{printable(path)} holds images of another run (different {printable(', '.join(different))}); "
            "choose another folder"
        )


def _create(file: Path, text: str) -> None:
    """Write a file whole, unless another process was first."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with writing(file, beside):
            beside.write_text(text)
        os.link(beside, file)
    except FileExistsError:
        pass
    except WriteError:
        raise
    except OSError:  # a file system without links: the texts of two processes that agree are equal
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def _is_record(record: dict[str, Any]) -> bool:
    """Whether a chunk's record is one that a run wrote."""
    files = record.get("files")
    if not isinstance(files, dict) or not isinstance(record.get("pixels"), str):
        return False
    named = all(_FILE_NAME.fullmatch(name) and isinstance(digest, str) for name, digest in files.items())
    typed = all(isinstance(record.get(name), kind) for name, kind in _DETAILS.items())
    return named and typed and all(isinstance(note, str) for note in record["notes"])


def _map(file: Path, kinds: str = "fiub", ndim: int | None = None) -> np.ndarray:
    """Map an array on disk into memory, once its file is seen to hold it; nothing is read before it is asked for."""
    check_npy(file, kinds, ndim, MAX_CHUNK)
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _map_images(file: Path) -> np.ndarray:
    array = _map(file, "u", 4)
    if array.dtype != np.uint8 or array.shape[3] != 3 or 0 in array.shape or not array.flags.c_contiguous:
        raise ValueError(f"{printable(file)} holds no uint8 [n, H, W, 3], but {array.dtype} {list(array.shape)}")
    if array.shape[1] * array.shape[2] > MAX_PIXELS:
        raise ValueError(f"{printable(file)} holds images of more than {MAX_PIXELS:,} pixels")
    return array


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
