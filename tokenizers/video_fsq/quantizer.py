"""Finite scalar quantization (Mentzer et al., 2023, arXiv:2309.15505): a code is a small integer a channel, no codebook.

Letters: B clips, C channels of a code, t h w code grid, V codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Literal

import torch
from torch import Tensor, nn

Variant = Literal["nbp", "cosmos"]
EPS = 1e-3  # of both published forms


class FSQ(nn.Module):
    """Squash each channel into L integers and round; a code is the number with these digits, first channel fastest.

    Args:
        levels: L of every channel, each >= 2; V is their product.
        variant: constants of the squashing: ``"nbp"`` half = (L - 1)(1 - eps) / 2 and shift = tan, ``"cosmos"``
            half = (L - 1)(1 + eps) / 2 and shift = atanh. The two do not read each other's latents alike.
    """

    def __init__(self, levels: Sequence[int], variant: Variant = "nbp") -> None:
        super().__init__()
        if not levels or any(int(level) < 2 for level in levels):
            raise ValueError(f"levels must be integers of at least 2, got {list(levels)}")
        if variant not in ("nbp", "cosmos"):
            raise ValueError(f"fsq_variant must be 'nbp' or 'cosmos', got {variant!r}")
        sign, arc = (-1, math.tan) if variant == "nbp" else (1, math.atanh)
        half = [(level - 1) * (1 + sign * EPS) / 2 for level in levels]
        offset = [0.5 if level % 2 == 0 else 0.0 for level in levels]
        # plain numbers, so that a model built on the meta device needs no buffers from the file
        self._half, self._offset = half, offset
        self._shift = [arc(o / h) for o, h in zip(offset, half, strict=True)]
        self._levels = [int(level) for level in levels]
        self._basis = list(accumulate([1, *self._levels[:-1]], mul))
        self.codebook_size = math.prod(self._levels)

    def quantize(self, z: Tensor) -> Tensor:
        """Round ``z [B, C, ...]`` to code vectors in [-1, 1], float32; the gradient passes the rounding."""
        half, offset, shift, width = (self._row(v, z) for v in (self._half, self._offset, self._shift, self._widths))
        bounded = torch.tanh(z.float() + shift) * half - offset
        return (bounded + (bounded.round() - bounded).detach()) / width

    def codes(self, latents: Tensor) -> Tensor:
        """Number of each code vector: ``[B, C, ...]`` in [-1, 1] to ``[B, ...]`` int64."""
        width, basis = self._row(self._widths, latents), self._row(self._basis, latents)
        return ((latents.float() * width + width) * basis).sum(1).round().long()

    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors: ``[B, ...]`` integers to ``[B, C, ...]`` float32."""
        digits = [codes.div(b, rounding_mode="floor") % n for b, n in zip(self._basis, self._levels, strict=True)]
        return torch.stack([(d - n // 2) / (n // 2) for d, n in zip(digits, self._levels, strict=True)], dim=1)

    @property
    def _widths(self) -> list[int]:
        return [level // 2 for level in self._levels]

    def _row(self, values: Sequence[float], like: Tensor) -> Tensor:
        row = torch.tensor(values, dtype=torch.float32, device=like.device)
        return row.view(-1, *[1] * (like.ndim - 2))
