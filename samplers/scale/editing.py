"""Editing with next-scale models: codes that are fixed beforehand (VAR, arXiv:2404.02905, section 5.3).

Letters: B images, K scales, (h_k, w_k) size of scale k, n_k = h_k w_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vargen.samplers.scale.state import token_shape

KEPT_WHOLE = 3  # scales of up to so many codes are kept whole when an image is edited, as in the official notebook


def check_forced_codes(forced: Sequence[Tensor], tokenizer: Any, num_images: int) -> list[Tensor]:
    """Return K tensors ``[B, n_k]`` int64 of fixed codes, -1 where free; of bits ``[B, n_k, d]``.

    Args:
        forced: K tensors of integers ``[n_k]`` or ``[B, n_k]``, for bits with an axis of d behind.
        tokenizer: has ``scales`` and ``codebook_size``.
        num_images: B.

    Raises:
        ValueError: wrong number of scales or codes, not integers, codes out of range.
    """
    sizes, one = [h * w for h, w in tokenizer.scales], token_shape(tokenizer)
    if len(forced) != len(sizes):
        raise ValueError(f"forced_codes must hold one tensor a scale, {len(sizes)}, got {len(forced)}")
    checked = []
    for k, (given, size) in enumerate(zip(forced, sizes, strict=True)):
        codes = torch.as_tensor(given)
        if codes.is_floating_point() or codes.shape not in ((size, *one), (num_images, size, *one)):
            shapes = f"integers {[size, *one]} or {[num_images, size, *one]}"
            raise ValueError(f"forced_codes of scale {k} must be {shapes}, got {codes.dtype} {list(codes.shape)}")
        if bool(((codes < -1) | (codes >= tokenizer.codebook_size)).any()):
            raise ValueError(
                f"forced_codes must lie in 0..{tokenizer.codebook_size - 1}, or -1 where free, at scale {k}"
            )
        checked.append(codes.long().expand(num_images, size, *one))
    return checked


def keep_codes(codes: Sequence[Tensor], keep: Tensor, scales: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Forced codes that keep a part of an image and leave the rest to be drawn: in-painting and editing.

    With the null condition the hole is filled in; with a class or a prompt it is edited towards that.

    Args:
        codes: K tensors ``[B, n_k]`` (bits: ``[B, n_k, d]``) of the image to edit, from ``tokenizer.encode``.
        keep: ``[h, w]`` or ``[B, h, w]`` bool at the size of the last scale, True = keep.
        scales: (h_k, w_k), ``tokenizer.scales``.

    Returns:
        K tensors ``[B, n_k]``, -1 where free. A cell of a scale is kept when more than half of it is; the coarsest scale of
        one code is always kept.

    Raises:
        ValueError: ``keep`` of another size.

    Example:
        >>> codes = [torch.tensor([[7]]), torch.tensor([[1, 2, 3, 4]])]
        >>> keep_codes(codes, torch.tensor([[True, False], [True, True]]), [(1, 1), (2, 2)])
        [tensor([[7]]), tensor([[ 1, -1,  3,  4]])]
    """
    batch, (height, width) = len(codes[0]), scales[-1]
    if keep.shape not in ((height, width), (batch, height, width)):
        allowed = f"[{height}, {width}] or [{batch}, {height}, {width}]"
        raise ValueError(f"keep must have the size of the last scale, {allowed}, got {list(keep.shape)}")
    mask = keep.float().expand(batch, height, width)[:, None]  # B 1 h w
    forced = []
    for picked, (height, width) in zip(codes, scales, strict=True):
        kept = F.interpolate(mask, size=(height, width), mode="bilinear", align_corners=False)[:, 0].flatten(1) > 0.5
        if height * width <= KEPT_WHOLE:
            kept = torch.ones_like(kept)
        forced.append(torch.where(kept.view(*kept.shape, *[1] * (picked.ndim - 2)), picked, -1))
    return forced
