"""What every image tokenizer refuses, in one line each: wrong shapes, values out of range, precision the CPU lacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

RANGE_SLACK = 1e-2  # how far above 1 a pixel may lie: rounding of half precision, overshoot of a resize


def check_images(images: Tensor, channels: int, downsample: int) -> None:
    """Raise ``ValueError`` unless images are floating ``[B, channels, H, W]`` with sides that ``downsample`` divides."""
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"images must be [B, {channels}, H, W], got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(
            f"images must be floating point in [-1, 1], got {images.dtype}; divide uint8 by 127.5, minus 1"
        )
    height, width = images.shape[-2:]
    if height % downsample or width % downsample or 0 in (height, width):
        raise ValueError(f"image sides must be multiples of {downsample}, got {height}x{width}; resize or pad")


def check_range(images: Tensor) -> None:
    """Raise ``ValueError`` for pixel values outside [-1, 1], NaN included; looking at them stops a GPU."""
    if not images.numel():
        return
    low, high = (float(v) for v in images.detach().aminmax())
    if not (low >= -1 - RANGE_SLACK and high <= 1 + RANGE_SLACK):  # NaN fails too
        got = "NaN" if low != low or high != high else f"[{low:.4g}, {high:.4g}]"
        raise ValueError(f"image values must lie in [-1, 1], got {got}; see vargen.images.preprocess")


@contextmanager
def half_precision_explained(dtype: torch.dtype) -> Iterator[None]:
    """Turn torch's complaint about a missing half-precision kernel into a ``ValueError`` with the next step."""
    try:
        yield
    except RuntimeError as error:
        if "not implemented for" not in str(error):
            raise
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} is not supported on this CPU; use float32") from error
