"""Codes of next-scale models in a pipeline: flat while they are drawn, a list over scales in the output.

Letters: B images, K scales, n_k codes of scale k, L all codes, -1 = not drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def flatten_codes(codes: Tensor | Sequence[Tensor], num_codes: int) -> Tensor:
    """A list over the first few scales to ``[B, L]`` (bits: ``[B, L, d]``); a tensor stays as it is."""
    if isinstance(codes, Tensor):
        return codes
    drawn = torch.cat(list(codes), dim=1)
    return F.pad(drawn, (*[0, 0] * (drawn.ndim - 2), 0, num_codes - drawn.shape[1]), value=-1)


def split_codes(codes: Tensor, backbone: Any) -> Tensor | list[Tensor]:
    """``[B, L]`` to K tensors ``[B, n_k]`` where the backbone has scales; else unchanged."""
    if not hasattr(backbone, "scales"):
        return codes
    return list(codes.split([h * w for h, w in backbone.scales], dim=1))


def decode_scales(tokenizer: Any, codes: Tensor, undrawn: float) -> Tensor:
    """Decode ``[B, L]`` codes with a multi-scale tokenizer: each image from the scales it has, ``undrawn`` where none."""
    scales = list(codes.split([h * w for h, w in tokenizer.scales], dim=1))
    whole = torch.stack([(part >= 0).flatten(1).all(1) for part in scales], dim=1)  # B K
    counts = whole.long().cumprod(1).sum(1)
    images: Tensor | None = None
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero().flatten()
        if count == 0:
            continue
        part = tokenizer.decode_partial([scale[rows] for scale in scales[:count]])
        if images is None:
            images = part.new_full((len(codes), *part.shape[1:]), undrawn)
        images[rows] = part
    if images is None:
        height, width = (side * tokenizer.downsample for side in tokenizer.scales[-1])
        images = torch.full((len(codes), tokenizer.config.in_channels, height, width), undrawn, device=codes.device)
    return images
