"""The simplest drafter of pictures: a code repeats the one above it.

Letters: A images, w slots of a window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vargen.samplers.drafters.base import PlainDrafter


class RowAboveDrafter(PlainDrafter):
    """Copies the row above; in the first row, the last permanent code.

    Example:
        >>> import vargen
        >>> sampler = vargen.SpeculativeSampler(num_draft_tokens=8)  # sampler.sample(..., drafter="row-above")
    """

    def guess(self, state: Any, slots: Tensor) -> Tensor:
        """Go up as many rows as are not permanent yet."""
        stride, last = state.layout.stride, state.length[:, None] - 1
        rows_up = ((slots - last + stride - 1) // stride).clamp(min=1)
        above = slots - rows_up * stride
        source = torch.where(above >= 0, above, last)
        return state.tokens[state.rows[:, None], source]
