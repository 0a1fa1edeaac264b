"""Sets of images on disk and in memory: folders, ADM-style npz archives, uint8 rounding.

Archives hold ``arr_0``, uint8 ``[N, H, W, 3]``, as the evaluator of guided-diffusion reads them; they are streamed, so
50,000 images need no memory.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vargen.files import atomic_write
from vargen.images import Rounding
from vargen.metrics._files import file_digest
from vargen.metrics.run_folder import RunImages, holds_run

ROUNDINGS = get_args(Rounding)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageSet(Protocol):
    """A finite set of equally large images."""

    name: str
    num_images: int
    shape: tuple[int, int]  # height, width

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield uint8 ``[b, 3, H, W]``, b <= size, always in the same order."""
        ...

    def digest(self) -> str:
        """Return hex digits that change with the pixels."""
        ...


def quantise(images: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """Round float images in [0, 1] to 8 bits, by the rules of ``vargen.images.to_uint8`` (which reads [-1, 1]).

    Args:
        images: any shape; uint8 is returned as it is.
        rounding: "nearest" (PIL images of diffusers), "llamagen" (the same with ties upwards, also torchvision's
            ``save_image``) or "truncate" (ADM, VAR's demo, torchmetrics; half a grey level darker on average, which
            moves a small FID).

    Returns:
        uint8 of the same shape.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8 or float in [0, 1], got {images.dtype}")
    check_unit_range(images)
    levels = images.float() * 255
    levels = levels.round() if rounding == "nearest" else levels + 0.5 if rounding == "llamagen" else levels
    return levels.to(torch.uint8)


def check_unit_range(images: Tensor) -> None:
    """Raise ``ValueError`` unless float images lie in [0, 1]; NaN does not."""
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        found = f"[{images.min():.3g}, {images.max():.3g}]"
        raise ValueError(f"float images must lie in [0, 1], got {found}; map [-1, 1] by (x + 1) / 2")


class TensorImages:
    """Images in memory: uint8 ``[N, 3, H, W]``."""

    def __init__(self, images: Tensor, name: str = "tensor") -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [N, 3, H, W], got {images.dtype} {tuple(images.shape)}")
        self.images, self.name = images, name
        self.num_images, self.shape = len(images), (images.shape[2], images.shape[3])

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield uint8 ``[b, 3, H, W]``."""
        yield from self.images.split(size)

    def digest(self) -> str:
        """Return the SHA-256 of the pixels."""
        return hashlib.sha256(self.images.contiguous().cpu().numpy().tobytes()).hexdigest()


class FolderImages:
    """Images below a folder, in the order of their paths; all of one size."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.name = Path(path), str(path)
        if not self.path.is_dir():
            raise ValueError(f"no folder at {path}")
        self.files = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not self.files:
            raise ValueError(f"no images in {path}: looked for {', '.join(SUFFIXES)}")
        self.num_images = len(self.files)
        self.shape = self._size(self.files[0])
        for file in self.files:
            if self._size(file) != self.shape:
                raise ValueError(
                    f"images in {path} differ in size: {self.files[0].name} is {self._text(self.shape)}, "
                    f"{file.name} is {self._text(self._size(file))}; resize them to one size first"
                )

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield uint8 ``[b, 3, H, W]``."""
        for start in range(0, self.num_images, size):
            arrays = [_read_image(file) for file in self.files[start : start + size]]
            yield torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()

    def digest(self) -> str:
        """Return the SHA-256 of all files, in order."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.read_bytes())
        return digest.hexdigest()

    @staticmethod
    def _size(file: Path) -> tuple[int, int]:
        try:
            with Image.open(file) as image:
                return image.height, image.width
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file} is not a readable image: {error}") from error

    @staticmethod
    def _text(shape: tuple[int, int]) -> str:
        return f"{shape[1]}x{shape[0]}"


class NpzImages:
    """An npz archive with one uint8 ``[N, H, W, 3]`` array, called ``arr_0`` in the field."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.name = Path(path), str(path)
        if not self.path.is_file():
            raise ValueError(f"no file at {path}")
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = [m for m in archive.namelist() if m.endswith(".npy")]
                self.member = "arr_0.npy" if "arr_0.npy" in members else members[0] if len(members) == 1 else ""
                if not self.member:
                    raise ValueError(f"{path} holds {members[:4]}, expected an array arr_0")
                with archive.open(self.member) as stream:
                    shape, fortran, dtype = _array_header(stream)
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise ValueError(f"{path} is truncated or not an npz archive: {error}") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise ValueError(f"{path}: {self.member} must be uint8 [N, H, W, 3], got {dtype} {list(shape)}")
        self.num_images, self.shape = shape[0], (shape[1], shape[2])
        if self.num_images == 0:
            raise ValueError(f"no images in {path}: {self.member} is empty")

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield uint8 ``[b, 3, H, W]``."""
        height, width = self.shape
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
                _array_header(stream)
                for start in range(0, self.num_images, size):
                    count = min(size, self.num_images - start)
                    data = stream.read(count * height * width * 3)
                    if len(data) < count * height * width * 3:
                        raise EOFError("the array ends early")
                    pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    yield pixels.view(count, height, width, 3).permute(0, 3, 1, 2).contiguous()
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise ValueError(f"{self.path} is truncated: {error}; write or fetch it again") from error

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
    raise ValueError(f"images must be a folder or an npz file, got {source}: no such folder")


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


def _array_header(stream: object) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(stream)  # type: ignore[arg-type]
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(stream)  # type: ignore[arg-type]
    except ValueError as error:
        raise EOFError(str(error)) from error


def _read_image(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            if image.mode in ("RGBA", "LA", "PA") and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
                raise ValueError(f"{file} is transparent: put it on a background first")
            if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
                raise ValueError(f"{file} has mode {image.mode}: convert it to 8-bit RGB first")
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{file} is not a readable image: {error}") from error
