"""The binary quantizer over scales of Infinity (Han et al., 2024, arXiv:2412.04431): signs in place of a codebook.

Each scale keeps the signs of what the coarser ones left over, every sign a bit and every bit worth ``+-1 / sqrt(C)`` (binary
spherical quantization, arXiv:2406.07548). There is nothing to learn here and no integer that numbers a code: 32 bits a
position would need 2^32 of them.

With ``patch`` p a position of a scale holds the bits of p x p cells of the feature map, cell by cell inside each channel.

Letters: B images, K scales, (h_k, w_k) size of scale k, n_k = h_k w_k, C channels, d = C p^2 bits of a position, h w the size
of the feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Scales = tuple[tuple[int, int], ...]
BITS = torch.int8  # 0 and 1; -1 where a bit is not drawn


def resize(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map ``[B, C, h, w]`` linearly, without averaging where it shrinks."""
    if tuple(features.shape[-2:]) == tuple(size):
        return features
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class SignQuantizer:
    """Feature maps to bits by scale and back; arithmetic is float32."""

    num_channels: int  # C
    patch: int = 1  # p

    @property
    def num_bits(self) -> int:
        """Bits of a position, d."""
        return self.num_channels * self.patch**2

    def cells(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size of the feature map of a scale."""
        return size[0] * self.patch, size[1] * self.patch

    def to_map(self, vectors: Tensor, size: tuple[int, int]) -> Tensor:
        """``[B, n, d]`` to ``[B, C, h p, w p]``."""
        grid = rearrange(vectors, "b (h w) d -> b d h w", h=size[0])
        return F.pixel_shuffle(grid, self.patch)

    def to_rows(self, features: Tensor) -> Tensor:
        """``[B, C, h p, w p]`` to ``[B, n, d]``."""
        return rearrange(F.pixel_unshuffle(features, self.patch), "b d h w -> b (h w) d")

    def lookup(self, bits: Tensor) -> Tensor:
        """Bits ``[...]`` to ``+-1 / sqrt(C)``, float32."""
        return (2.0 * bits.float() - 1.0) * self.num_channels**-0.5

    def accumulate(self, total: Tensor, vectors: Tensor, size: tuple[int, int]) -> Tensor:
        """The sum ``[B, C, h, w]`` with the vectors ``[B, n_k, d]`` of a scale, enlarged, in it."""
        return total + resize(self.to_map(vectors, size), (total.shape[-2], total.shape[-1]))

    def shrink(self, total: Tensor, size: tuple[int, int]) -> Tensor:
        """The sum at a scale, ``[B, n_k, d]``: what the backbone reads there."""
        return self.to_rows(resize(total, self.cells(size)))

    def encode(
        self, features: Tensor, scales: Scales, flips: Sequence[Tensor] = ()
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Quantize a map, scale by scale.

        Args:
            features: ``[B, C, h, w]``.
            scales: (h_k, w_k); the last one has the size of the map.
            flips: for the first scales ``[B, n_k, d]`` bool, bits that are summed as their opposite: finer scales, and the
                model that reads the sum, then see a mistake and how it is made good (bitwise self-correction). The bits
                returned are those without the mistake.

        Returns:
            K tensors ``[B, n_k, d]`` of bits, K - 1 tensors ``[B, n_k, d]`` that the scales behind the first read, and the
            sum ``[B, C, h, w]``.
        """
        f = features.detach().float()
        total, found, inputs = torch.zeros_like(f), [], []
        for k, size in enumerate(scales):
            rest, cells = f - total, self.cells(size)
            z = rest if tuple(rest.shape[-2:]) == cells else F.interpolate(rest, size=cells, mode="area")
            bits = self.to_rows(z) > 0
            kept = bits ^ flips[k] if k < len(flips) else bits
            total = self.accumulate(total, self.lookup(kept), size)
            found.append(bits.to(BITS))
            if k + 1 < len(scales):
                inputs.append(self.shrink(total, scales[k + 1]))
        return found, inputs, total


def check_bits(bits: Sequence[Tensor], scales: Scales, num_bits: int) -> list[Tensor]:
    """Return the bits of the first few scales, ``[B, n_k, d]`` each, or say what is wrong with them.

    Raises:
        ValueError: no list, too many scales, wrong shape, not zeros and ones.
    """
    if isinstance(bits, Tensor) or not 1 <= len(bits) <= len(scales):
        got = "one tensor" if isinstance(bits, Tensor) else f"{len(bits)}"
        raise ValueError(f"codes must be a list of 1..{len(scales)} scales [B, n, {num_bits}] of bits, got {got}")
    checked = []
    for k, (part, (h, w)) in enumerate(zip(bits, scales, strict=False)):
        if part.is_floating_point() or part.is_complex():
            raise ValueError(f"codes must be bits, 0 and 1, got {part.dtype} at scale {k}")
        if part.ndim != 3 or part.shape[1:] != (h * w, num_bits):
            raise ValueError(f"codes of scale {k} must be [B, {h * w}, {num_bits}] bits, got {tuple(part.shape)}")
        if part.numel():
            low, high = (int(v) for v in part.aminmax())
            if low < 0 or high > 1:
                raise ValueError(f"codes must be bits, 0 and 1, got {low if low < 0 else high} at scale {k}")
        checked.append(part.to(BITS))
    return checked
