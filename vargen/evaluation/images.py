"""Sets of images on disk and in memory: folders, ADM-style npz archives.

Archives hold ``arr_0``, uint8 ``[N, H, W, 3]``, as the evaluator of guided-diffusion reads them; they are streamed, so
50,000 images need no memory.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vargen.evaluation.drawing.run_folder import RunImages, holds_run
from vargen.files import atomic_write, file_digest
from vargen.images import TensorImages
from vargen.validation.arrays import fill, open_npz
from vargen.validation.pictures import MAX_PIXELS, batch_count, image_size, open_image
from vargen.validation.printable import printable, shown

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageSet(Protocol):
    """A finite set of equally large images."""

    name: str
    num_images: int
    shape: tuple[int, int]  # height, width

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield uint8 ``[b, 3, H, W]``, b <= size and fewer of large images, always in the same order."""
        ...

    def digest(self) -> str:
        """Return hex digits that change with the pixels."""
        ...


class FolderImages:
    """Images below a folder, in the order of their paths; all of one size."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.name = Path(path), str(path)
        if not self.path.is_dir():
            raise ValueError(f"no folder at {printable(path)}")
        self.files = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not self.files:
            raise ValueError(f"no images in {printable(path)}: looked for {', '.join(SUFFIXES)}")
        self.num_images = len(self.files)
        self.shape = self._size(self.files[0])
        for file in self.files:
            if self._size(file) != self.shape:
                first, other = printable(self.files[0].name), printable(file.name)
                raise ValueError(
                    f"images in {printable(path)} differ in size: {first} is {self._text(self.shape)}, "
                    f"{other} is {self._text(self._size(file))}; resize them to one size first"
                )

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield uint8 ``[b, 3, H, W]``."""
        size = batch_count(size, *self.shape)
        for start in range(0, self.num_images, size):
            arrays = [_read_image(file, self.shape) for file in self.files[start : start + size]]
            yield torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()

    def digest(self) -> str:
        """Return the SHA-256 of all files, in order."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
        return digest.hexdigest()

    @staticmethod
    def _size(file: Path) -> tuple[int, int]:
        width, height = image_size(file)
        return height, width

    @staticmethod
    def _text(shape: tuple[int, int]) -> str:
        return f"{shape[1]}x{shape[0]}"


class NpzImages:
    """An npz archive with one uint8 ``[N, H, W, 3]`` array, called ``arr_0`` in the field."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.name = Path(path), str(path)
        name = printable(path)
        with open_npz(path) as file:
            self.member = "arr_0" if "arr_0" in file else file.names[0] if len(file.names) == 1 else ""
            if not self.member:
                raise ValueError(f"{name} holds {shown(file.names[:4])}, expected an array arr_0")
            with file.stream(self.member) as (header, _):
                shape, dtype = header.shape, header.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or header.fortran:
            got = f"{printable(dtype)} {shown(list(shape))}"
            raise ValueError(f"{name}: {printable(self.member)} must be uint8 [N, H, W, 3], got {got}")
        self.num_images, self.shape = shape[0], (shape[1], shape[2])
        if 0 in shape:
            raise ValueError(f"no images in {name}: {printable(self.member)} is empty")
        if shape[1] * shape[2] > MAX_PIXELS:
            raise ValueError(f"{name} holds images of {shape[2]}x{shape[1]} pixels, more than {MAX_PIXELS:,}")

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield uint8 ``[b, 3, H, W]``."""
        height, width = self.shape
        size = batch_count(size, height, width)
        with open_npz(self.path) as file, file.stream(self.member) as (_, stream):
            for start in range(0, self.num_images, size):
                pixels = torch.empty(min(size, self.num_images - start), height, width, 3, dtype=torch.uint8)
                fill(stream, pixels.view(-1).numpy().data)
                yield pixels.permute(0, 3, 1, 2).contiguous()

    def digest(self) -> str:
        """Return the SHA-256 of the file."""
        return file_digest(self.path)


def read_images(source: str | Path | Tensor | ImageSet) -> ImageSet:
    """Open a folder of images or of a drawing run, an npz archive or a uint8 ``[N, 3, H, W]`` tensor as an image set."""
    if isinstance(source, Tensor):
        return TensorImages(source)
    if not isinstance(source, str | Path):
        return source
    path = Path(source)
    if path.is_dir():
        return RunImages(path) if holds_run(path) else FolderImages(path)
    if path.suffix == ".npz":
        return NpzImages(path)
    raise ValueError(f"images must be a folder or an npz file, got {printable(source)}: no such folder")


def write_npz(
    path: str | Path,
    images: Any,
    *,
    shuffle_seed: int | None = 0,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write images as the npz that ADM's evaluator reads, in a shuffled order.

    That evaluator averages the Inception score over consecutive splits of 5000: images sorted by class put a hundred
    classes into a split and give about 62 where shuffled ones give about 298. FID does not depend on the order.

    Args:
        path: the file; written beside and renamed.
        images: uint8 ``[N, H, W, 3]`` (array, memory map, anything that a vector can index), or uint8 tensor
            ``[N, 3, H, W]``.
        shuffle_seed: seed of the permutation; None keeps the order.
        extra: arrays of length N, stored under their names in the same order.
    """
    array = images.permute(0, 2, 3, 1).cpu().numpy() if isinstance(images, Tensor) else images
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise ValueError(f"images must be uint8 [N, H, W, 3], got {array.dtype} {list(array.shape)}")
    order = (
        np.arange(len(array)) if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(len(array))
    )
    header = {"descr": "|u1", "fortran_order": False, "shape": array.shape}
    with atomic_write(path, overwrite=True) as beside, zipfile.ZipFile(beside, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)  # type: ignore[arg-type]
            for start in range(0, len(order), 256):
                stream.write(np.ascontiguousarray(array[order[start : start + 256]]).tobytes())
        for name, values in (extra or {}).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asarray(values)[order], allow_pickle=False)


def _read_image(file: Path, shape: tuple[int, int]) -> np.ndarray:
    image = open_image(file)
    if (image.height, image.width) != shape:
        raise ValueError(f"{printable(file)} is {image.width}x{image.height} now; it was changed while it was read")
    if image.mode in ("RGBA", "LA", "PA") and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise ValueError(f"{printable(file)} is transparent: put it on a background first")
    if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
        raise ValueError(f"{printable(file)} has mode {image.mode}: convert it to 8-bit RGB first")
    return np.asarray(image.convert("RGB"))
