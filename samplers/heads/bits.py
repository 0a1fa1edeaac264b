"""Bits: every position carries d bits, each drawn from two logits of its own (Infinity, arXiv:2412.04431).

Letters: A images, G guidance branches, g positions drawn at once, d bits of a position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vargen.kernels.draw import raise_bad_rows
from vargen.kernels.warp import combine
from vargen.random import Stream, uniform


@dataclass(frozen=True, kw_only=True, eq=False)
class BitsHead:
    """The ``TokenHead`` of bits; rows are 2 d logits: of 0 and of 1, bit by bit.

    One number a bit: it is 1 where a uniform number lies below its probability, after the filters. Top-k and top-p choose
    between two values: top-k 1 is greedy, and top-p drops the less likely value iff its probability is at most 1 - p.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    noise: Tensor | None = None  # [A, g, 2 d] Gumbel numbers instead of the counter-based ones

    def draw(self, rows: Tensor, keys: Tensor, positions: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """Draw bits ``[A, g, d]`` int8 from logits ``[G, A, g, 2 d]``."""
        z = combine(rows, guidance_scale, self.temperature)
        raise_bad_rows(~z.isfinite().all(-1), positions)
        likely = z[..., 1::2] - z[..., ::2]  # A g d: log-odds of 1
        if self.temperature == 0 or self.top_k == 1:
            return (likely > 0).to(torch.int8)
        probability = likely.double().sigmoid()
        if self.top_p < 1:
            sure = torch.minimum(probability, 1 - probability) <= 1 - self.top_p
            probability = torch.where(sure, (likely > 0).double(), probability)
        if self.noise is None:
            return (uniform(keys, positions, likely.shape[-1], Stream.GUMBEL) < probability).to(torch.int8)
        drawn = likely + self.noise[..., 1::2] - self.noise[..., ::2] > 0
        certain = (probability == 0) | (probability == 1)
        return torch.where(certain, probability > 0.5, drawn).to(torch.int8)
