"""Sets of images on disk and in memory: folders, ADM-style npz archives.

Archives hold ``arr_0``, uint8 ``[N, H, W, 3]``, as the evaluator of guided-diffusion reads them; they are streamed, so
50,000 images need no memory.
"""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from collections import Counter
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
from vargen.validation.pictures import FORMATS, MAX_PIXELS, SUFFIXES, batch_count, image_facts, open_rgb
from vargen.validation.printable import printable, shown
from vargen.validation.rgb import Background, read_background


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
    """Pictures below a folder, in the order of their paths; all of one size.

    Every format of ``vargen.validation.pictures.FORMATS`` whatever the file is called, links too, hidden files and folders
    not. Of animations the first frame. What is passed over is counted in ``skipped`` and said in one line.

    Args:
        path: the folder.
        rotate: apply EXIF rotation. The field's habit, and the default, is not to: pytorch-fid, clean-fid and ADM do not.
        background: colour behind transparent pixels, which are refused without it.

    Raises:
        ValueError: no such folder, no pictures, one that cannot be read though its name says that it is a picture, different
            sizes.
    """

    def __init__(self, path: str | Path, *, rotate: bool = False, background: Background | None = None) -> None:
        self.path, self.name, self.rotate = Path(path), str(path), rotate
        self.background = read_background(background)
        if not self.path.is_dir():
            raise ValueError(f"no folder at {printable(path)}")
        self.skipped: Counter[str] = Counter()
        self.num_turned = self.num_animated = 0
        self.files: list[Path] = []
        for file in sorted(_visible_files(self.path, self.skipped)):
            self._add(file)
        passed_over = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        if not self.files:
            found = f" (skipped: {passed_over})" if passed_over else ""
            raise ValueError(f"no images in {printable(path)}: looked for {', '.join(FORMATS)}{found}")
        if passed_over:
            warnings.warn(f"{printable(path)}: {len(self.files)} images; skipped: {passed_over}", stacklevel=3)
        if self.num_animated:
            warnings.warn(f"{printable(path)}: {self.num_animated} animations, first frames are used", stacklevel=3)
        self.num_images = len(self.files)

    def _add(self, file: Path) -> None:
        try:
            facts = image_facts(file)
        except ValueError:
            if file.suffix.lower() in SUFFIXES:
                raise
            self.skipped[f"no picture ({printable(file.suffix) or 'no suffix'})"] += 1
            return
        width, height = facts.upright if self.rotate else facts.size
        if not self.files:
            self.shape = (height, width)
        elif (height, width) != self.shape:
            first, other = printable(self.files[0].name), printable(file.name)
            raise ValueError(
                f"images in {printable(self.path)} differ in size: {first} is {self.shape[1]}x{self.shape[0]}, "
                f"{other} is {width}x{height}; resize them to one size first"
            )
        self.num_turned += facts.turned
        self.num_animated += facts.animated
        self.files.append(file)

    def reading(self) -> str:
        """How the pictures are read, for reports."""
        turned = "applied" if self.rotate else "ignored, as usual in the field"
        parts = [f"EXIF rotation of {self.num_turned} {turned}"] if self.num_turned else []
        if self.background is not None:
            parts.append("on background #{:02x}{:02x}{:02x}".format(*self.background))
        if self.num_animated:
            parts.append(f"first frames of {self.num_animated} animations")
        if self.skipped:
            parts.append(
                "skipped: " + ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
            )
        return "; ".join(parts)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield uint8 ``[b, 3, H, W]``."""
        size = batch_count(size, *self.shape)
        for start in range(0, self.num_images, size):
            arrays = [self._read(file) for file in self.files[start : start + size]]
            yield torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()

    def digest(self) -> str:
        """Return the SHA-256 of all files, in order, and of how they are read where that is not the default."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
        if self.rotate or self.background is not None:
            digest.update(f"{self.rotate} {self.background}".encode())
        return digest.hexdigest()

    def _read(self, file: Path) -> np.ndarray:
        image = open_rgb(file, background=self.background, rotate=self.rotate, warn=False)
        if (image.height, image.width) != self.shape:
            raise ValueError(
                f"{printable(file)} is {image.width}x{image.height} now; it was changed while it was read"
            )
        return np.asarray(image)


def _visible_files(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Regular files below a folder, through links but never twice through the same folder; counts what is passed over."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            skipped["link to a folder that is read already"] += 1
            folders.clear()
            continue
        seen.add(real)
        hidden = [name for name in folders if name.startswith(".")]
        skipped.update({"hidden folder": len(hidden)} if hidden else {})
        folders[:] = sorted(set(folders) - set(hidden))
        for file in (Path(place, name) for name in files):
            if file.name.startswith("."):
                skipped["hidden file"] += 1
            elif file.is_file():
                yield file
            else:
                skipped["broken link" if file.is_symlink() else "no regular file"] += 1


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


def read_images(
    source: str | Path | Tensor | ImageSet, *, rotate: bool = False, background: Background | None = None
) -> ImageSet:
    """Open a folder of images or of a drawing run, an npz archive or a uint8 ``[N, 3, H, W]`` tensor as an image set.

    ``rotate`` and ``background`` are for folders of pictures; see ``FolderImages``.
    """
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and path.is_dir() and not holds_run(path):
        return FolderImages(path, rotate=rotate, background=background)
    if rotate or background is not None:
        option = "rotate" if rotate else "background"
        what = printable(source) if path is not None else type(source).__name__
        raise ValueError(f"{option} is for folders of pictures, got {what}; leave it out")
    if isinstance(source, Tensor):
        return TensorImages(source)
    if path is None:
        return source  # type: ignore[return-value]
    if path.is_dir():
        return RunImages(path)
    if path.suffix == ".npz":
        return NpzImages(path)
    raise ValueError(f"images must be a folder or an npz file, got {printable(source)}: no such folder")


def described(images: ImageSet) -> str:
    """Name of an image set for a report, with how its pictures were read where there is something to say."""
    reading = getattr(images, "reading", str)()
    return f"{images.name} ({reading})" if reading else images.name


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
