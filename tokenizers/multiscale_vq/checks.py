"""Checks of the codes given to the multi-scale tokenizer.

Letters: B images, n_k codes of scale k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vargen.tokenizers.multiscale_vq.quantizer import Scales


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
