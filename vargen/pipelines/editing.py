"""In-painting and editing with next-scale models: what a call keeps of an image becomes codes fixed beforehand.

Letters: P prompts, B = P * num_images_per_prompt images, H W pixels, h w cells of the last scale, K scales, n_k codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vargen.images import from_pil
from vargen.samplers.scale.editing import keep_codes
from vargen.validation.rgb import Background, read_background, to_rgb, upright_size

REDRAWN = 0.5  # pixels of a mask above it are drawn anew, as in diffusers


def read_edit(
    tokenizer: Any, image: Any, mask_image: Any, background: Background | None = None
) -> tuple[Tensor, Tensor] | None:
    """Check what is to be edited.

    Args:
        tokenizer: must have scales.
        image: PIL image or several, or ``[3, H, W]`` or ``[P, 3, H, W]`` in [0, 1]; arrays of numpy have channels last, and
            may be uint8.
        mask_image: PIL image or ``[H, W]`` or ``[P, H, W]``; white, True or above 0.5 (uint8: 128 and more) = draw anew.
        background: colour behind transparent pixels of PIL images.

    Returns:
        Images ``[P, 3, H, W]`` in [-1, 1] and the cells to keep, ``[1 or P, h, w]`` bool; None where nothing is edited.

    Raises:
        ValueError: one without the other, a tokenizer without scales, wrong sizes or values.
    """
    if image is None and mask_image is None:
        return None
    image, mask_image = _from_numpy(image, 3), _from_numpy(mask_image, 1)
    if image is None or mask_image is None:
        missing = "image" if image is None else "mask_image"
        raise ValueError(f"editing needs image and mask_image, got no {missing}")
    read_background(background)
    if not hasattr(tokenizer, "scale_inputs"):
        raise ValueError(f"image and mask_image need a next-scale model, got a {type(tokenizer).__name__}")
    height, width = tokenizer.scales[-1]
    size = (height * tokenizer.downsample, width * tokenizer.downsample)
    for name, given in (("image", image), ("mask_image", mask_image)):
        for found in map(_sides, given if isinstance(given, list | tuple) else [given]):
            if found not in (None, size):
                got = "x".join(map(str, found))
                raise ValueError(f"{name} must have {size[0]}x{size[1]} pixels (height x width), got {got}")
    pixels, mask = _read_images(image, background), _read_mask(mask_image, background)
    if mask.shape[0] not in (1, pixels.shape[0]):
        raise ValueError(f"mask_image must hold 1 or {pixels.shape[0]} masks, one an image, got {mask.shape[0]}")
    cells = (mask > REDRAWN).unflatten(2, (width, -1)).unflatten(1, (height, -1))  # P h f w f
    return pixels, ~cells.any(4).any(2)


def forced_codes(tokenizer: Any, edit: tuple[Tensor, Tensor], num_prompts: int, times: int) -> tuple[Tensor, ...]:
    """Codes that the call keeps: K tensors ``[B, n_k]``, -1 where free.

    Raises:
        ValueError: neither one image for all prompts nor one each.
    """
    pixels, keep = edit
    if len(pixels) not in (1, num_prompts):
        raise ValueError(f"image must hold 1 or {num_prompts} images, one a prompt, got {len(pixels)}")
    codes = tokenizer.encode(pixels.to(tokenizer.device)).codes
    kept = keep_codes(codes, keep.to(tokenizer.device).expand(len(pixels), -1, -1), tokenizer.scales)
    return tuple(part.expand(num_prompts, -1).repeat_interleave(times, dim=0) for part in kept)


def _from_numpy(image: Any, channels: int) -> Any:
    """Arrays, channels last, as tensors, channels first (a mask: without); uint8 scaled to [0, 1]. Anything else as it is."""
    if isinstance(image, list | tuple) and image and all(isinstance(one, np.ndarray) for one in image):
        if len({one.shape for one in image}) > 1:
            raise ValueError(
                f"pictures of one call must have one shape, got {', '.join(str(one.shape) for one in image)}"
            )
        image = np.stack(image)
    if not isinstance(image, np.ndarray) or image.dtype.kind not in "biuf":
        return image
    if channels == 1 and image.ndim in (3, 4) and image.shape[-1] == 1:
        image = image[..., 0]
    scaled = image.dtype == np.uint8 and (channels == 3 or (image.size and image.max() > 1))
    tensor = torch.from_numpy(np.ascontiguousarray(image / 255 if scaled else image)).float()
    return tensor.movedim(-1, -3) if channels == 3 and tensor.ndim in (3, 4) else tensor


def _sides(image: Any) -> tuple[int, ...] | None:
    """Height and width, before pixels are touched; None for what has none."""
    if isinstance(image, Image.Image):
        return upright_size(image)[::-1]
    return tuple(image.shape[-2:]) if isinstance(image, Tensor) and image.ndim > 1 else None


def _read_images(image: Any, background: Background | None) -> Tensor:
    listed = image if isinstance(image, list | tuple) else [image]
    if listed and all(isinstance(one, Image.Image) for one in listed):
        return from_pil(listed, background=background)
    right = isinstance(image, Tensor) and image.ndim in (3, 4) and image.is_floating_point() and not image.is_meta
    if not right or image.shape[-3] != 3 or not len(image):
        raise ValueError(
            f"image must be PIL images, an array [P, H, W, 3], or a float tensor [P, 3, H, W] in [0, 1], got {_name(image)}"
        )
    pixels = image if image.ndim == 4 else image[None]
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise ValueError("image must lie in [0, 1], as output_type='pt' returns it; got values beyond, or NaN")
    return pixels.float() * 2 - 1


def _read_mask(mask: Any, background: Background | None) -> Tensor:
    if isinstance(mask, Image.Image):
        grey = to_rgb(mask, background=background, name="mask_image").convert("L")
        return torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(1, grey.height, grey.width) / 255
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3) or mask.is_complex() or mask.is_meta:
        raise ValueError(
            f"mask_image must be a PIL image, or an array or tensor [H, W] or [P, H, W], got {_name(mask)}"
        )
    if bool(mask.isnan().any()):
        raise ValueError("mask_image must hold numbers, white (1 or True) where to draw anew; got NaN")
    return mask.float() if mask.ndim == 3 else mask.float()[None]


def _name(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
