"""Aggressive decoding: the codes of another picture are tried at their own places (arXiv:2106.04970)."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from vargen.samplers.drafters.base import PlainDrafter


class CopyDrafter(PlainDrafter):
    """Copies a picture: an earlier draw, the source of an edit, the frame before. As fast as the two pictures are alike.

    Args:
        source: ``[N]`` or ``[B, N]`` integer codes in raster order (``output.codes``, ``pipe.encode(image)``), -1 where nothing
            is known.

    Example:
        >>> import torch, vargen
        >>> drafter = vargen.CopyDrafter(torch.zeros(256, dtype=torch.int64))
        >>> sampler = vargen.SpeculativeSampler(num_draft_tokens=31)  # sampler.sample(..., drafter=drafter)

    Raises:
        ValueError: no integers, or (when drawing begins) a source of another size or batch.
    """

    def __init__(self, source: Any) -> None:
        codes = torch.as_tensor(source)
        if codes.is_floating_point() or codes.dtype == torch.bool or codes.ndim not in (1, 2):
            raise ValueError(
                f"source must be integer codes [N] or [B, N], got {codes.dtype} of shape {list(codes.shape)}"
            )
        self.source = codes.to(torch.int64)
        self.slots: Tensor | None = None  # [B, S] of one run

    def begin(self, state: Any) -> Self:
        """Bring the source to the slots of the run."""
        layout, batch = state.layout, len(state.tokens)
        positions = layout.num_slots if layout.code_slots is None else len(layout.code_slots)
        if self.source.shape not in ((positions,), (1, positions), (batch, positions)):
            raise ValueError(
                f"source must be codes [{positions}] or [{batch}, {positions}], as many as the backbone draws, got "
                f"{list(self.source.shape)}"
            )
        most = int(state.backbone.codebook_size)
        if bool((self.source < -1).any() | (self.source >= most).any()):
            raise ValueError(f"source must hold codes 0..{most - 1}, or -1 for none; it is of another codebook")
        run = type(self)(self.source)
        run.slots = self.source.to(state.keys.device).expand(batch, -1)[:, layout.code_index]
        return run

    def guess(self, state: Any, slots: Tensor) -> Tensor:
        """The source's codes of these slots."""
        assert self.slots is not None
        return self.slots[state.rows].gather(1, slots)
