"""Pixels in and out: the conventions of LlamaGen's evaluation (and of ADM, whose crop it uses).

Inside the library an image is a float tensor in [-1, 1]. A different rounding to 8 bits or a different resize moves an
FID in its third digit, so published numbers are compared with published conventions.

Picture files are opened by ``open_rgb`` and its neighbours of ``vargen.validation.pictures``, and by nothing else; PIL images of
any mode become RGB in ``to_rgb``, and nowhere else.

Letters: B images, C channels, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vargen.validation.pictures import batch_count, image_size, open_frames, open_image, open_rgb
from vargen.validation.rgb import Background, to_rgb

__all__ = [
    "Rounding",
    "center_crop",
    "from_pil",
    "image_size",
    "open_frames",
    "open_image",
    "open_rgb",
    "preprocess",
    "resize",
    "to_pil",
    "to_rgb",
    "to_uint8",
]

Rounding = Literal["nearest", "llamagen", "truncate"]
ROUNDINGS = get_args(Rounding)


def to_uint8(images: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """Convert decoder output to 8 bits.

    Args:
        images: ``[B, C, H, W]`` float (any shape works); values beyond [-1, 1] are clamped.
        rounding: ``"nearest"`` rounds 127.5 (x + 1), ties to even. ``"llamagen"`` truncates 127.5 x + 128, as the
            official files for FID do: the same values, ties upwards. ``"truncate"`` truncates 127.5 (x + 1), as some
            other repositories do: half a grey level darker on average.

    Returns:
        uint8 of the same shape.

    Raises:
        ValueError: unknown rounding, or NaN.
    """
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding must be one of {', '.join(get_args(Rounding))}, got {rounding!r}")
    x = images.detach().float()
    if bool(x.isnan().any()):
        raise ValueError("images hold NaN; check the codes and the precision of the decoder")
    if rounding == "nearest":
        x = (x * 127.5 + 127.5).round()
    else:
        x = x * 127.5 + (128.0 if rounding == "llamagen" else 127.5)
    return x.clamp(0, 255).to(torch.uint8)


def to_pil(images: Tensor, rounding: Rounding = "nearest") -> list[Image.Image]:
    """Convert decoder output ``[B, 3, H, W]`` (or ``[B, 1, H, W]``) around [-1, 1] to PIL images."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be [B, 3, H, W] or [B, 1, H, W], got {tuple(images.shape)}")
    pixels = to_uint8(images, rounding).permute(0, 2, 3, 1).cpu().numpy()  # B H W C
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]


def from_pil(
    images: Image.Image | Sequence[Image.Image], *, background: Background | None = None, name: str = "image"
) -> Tensor:
    """Convert PIL images of one size, of any mode, to ``[B, 3, H, W]`` float32 in [-1, 1].

    Args:
        images: one image or several; how they are read says ``to_rgb``.
        background: colour behind transparent pixels.
        name: what errors call an image.

    Raises:
        ValueError: no images, different sizes, transparent without ``background``, values out of range.
    """
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    names = [name if len(pictures) == 1 else f"{name} {i}" for i in range(len(pictures))]
    pictures = [to_rgb(one, background=background, name=text) for one, text in zip(pictures, names, strict=True)]
    if len({picture.size for picture in pictures}) != 1:
        sizes = ", ".join(sorted({f"{w}x{h}" for w, h in (p.size for p in pictures)})) or "no image"
        raise ValueError(f"images must share one size, got {sizes}; give preprocess a size")
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return pixels.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` and cut the centre square, as ADM (arXiv:2105.05233) and LlamaGen do.

    The image is halved with a box filter while its shorter side is at least twice the size, then resized bicubically.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def preprocess(
    images: Image.Image | Sequence[Image.Image], size: int | None = None, *, background: Background | None = None
) -> Tensor:
    """Turn PIL images into tokenizer input.

    Args:
        images: one image or several.
        size: side of the centre crop; ``None`` keeps the images as they are.
        background: colour behind transparent pixels.

    Returns:
        ``[B, 3, H, W]`` float32 in [-1, 1].
    """
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    if size is not None:
        pictures = [center_crop(to_rgb(one, background=background, name="image"), size) for one in pictures]
    return from_pil(pictures, background=background)


def resize(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize float images ``[B, C, H, W]`` before rounding, as LlamaGen does for evaluation (bicubic, no antialias)."""
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False)


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
        yield from self.images.split(batch_count(size, *self.shape))

    def digest(self) -> str:
        """Return the SHA-256 of the pixels."""
        return hashlib.sha256(self.images.contiguous().cpu().numpy().tobytes()).hexdigest()
