"""Checks of the multi-scale tokenizer: its settings, and codes given to it.

Letters: B images, n_k codes of scale k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vargen.tokenizers.multiscale_quantizer import Scales


def check_scale_codes(codes: Sequence[Tensor], sizes: Scales, codebook_size: int) -> list[Tensor]:
    """Return the codes of the first few scales, ``[B, n_k]`` int64 each, or say what is wrong with them.

    Raises:
        ValueError: no list, too many scales, wrong number of codes, not integers, codes out of range.
    """
    if isinstance(codes, Tensor) or not 1 <= len(codes) <= len(sizes):
        got = "one tensor" if isinstance(codes, Tensor) else f"{len(codes)}"
        raise ValueError(f"codes must be a list of 1..{len(sizes)} scales [B, n], got {got}")
    checked = []
    for k, (picked, (h, w)) in enumerate(zip(codes, sizes, strict=False)):
        if picked.is_floating_point() or picked.dtype == torch.bool:
            raise ValueError(f"codes must be integers, got {picked.dtype} at scale {k}")
        if picked.ndim != 2 or picked.shape[1] != h * w:
            raise ValueError(f"codes of scale {k} must be [B, {h * w}], got {tuple(picked.shape)}")
        if picked.numel():
            low, high = (int(v) for v in picked.aminmax())
            if low < 0 or high >= codebook_size:
                wrong = low if low < 0 else high
                raise ValueError(f"codes must lie in [0, {codebook_size}), got {wrong} at scale {k}")
        checked.append(picked.long())
    return checked


def check_config(config: Any, downsample: int) -> None:
    """Raise ``ValueError`` for settings of a ``MultiScaleVQTokenizer`` that do not go together."""
    patch_dim = config.in_channels * downsample**2
    if config.encoder_type not in ("conv", "patch"):
        raise ValueError(f"encoder_type must be 'conv' or 'patch', got {config.encoder_type!r}")
    if config.encoder_type == "patch" and config.codebook_dim != patch_dim:
        raise ValueError(f"encoder_type 'patch' needs codebook_dim={patch_dim}, got {config.codebook_dim}")
    if config.quant_conv_kernel_size % 2 == 0:
        raise ValueError(f"quant_conv_kernel_size must be odd, got {config.quant_conv_kernel_size}")
    for multiplier in (1, *config.channel_multipliers):
        if config.base_channels * multiplier % config.norm_num_groups:
            raise ValueError(
                f"norm_num_groups={config.norm_num_groups} must divide every width, "
                f"got base_channels={config.base_channels} times {multiplier}"
            )
