"""Large pictures in pieces: one image at a time, and tiles whose borders overlap and are blended.

As the autoencoders of diffusers do it (``enable_slicing``, ``enable_tiling``). Slices give the same pictures; tiles do not quite,
since normalisation and attention see one tile only.

Letters: B images, C channels, h w codes, H W pixels, f pixels a code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vargen.validation.checks import check_integer

TILE_SIZE = 64  # codes
TILE_OVERLAP = 16


class Tiled:
    """Mixin of convolutional tokenizers: ``in_pieces`` around what maps pictures to latents, or latents to pictures."""

    use_slicing = False
    use_tiling = False
    tile_size = TILE_SIZE
    tile_overlap = TILE_OVERLAP
    downsample: int

    def enable_slicing(self) -> None:
        """Encode and decode one image at a time; the memory of a batch is that of one image."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode whole batches."""
        self.use_slicing = False

    def enable_tiling(self, tile_size: int = TILE_SIZE, tile_overlap: int = TILE_OVERLAP) -> None:
        """Encode and decode in tiles where a picture has more than ``tile_size`` codes a side.

        Args:
            tile_size: side of a tile in codes.
            tile_overlap: codes that neighbouring tiles share, over which they are blended; below ``tile_size``.
        """
        self.tile_size = check_integer("tile_size", tile_size, low=2)
        self.tile_overlap = check_integer("tile_overlap", tile_overlap, low=0, high=self.tile_size - 1)
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Encode and decode pictures whole."""
        self.use_tiling = False

    def in_pieces(self, function: Callable[[Tensor], Tensor], x: Tensor, unit: int) -> Tensor:
        """``function(x)``, by slices and tiles where they are switched on.

        Args:
            function: ``[B, C, h, w]`` to ``[B, C', h', w']``, larger or smaller by a whole factor.
            x: latents (``unit=1``) or pictures (``unit=f``).
            unit: of ``x``, pixels a code.
        """
        if self.use_slicing and len(x) > 1:
            return torch.cat([self.in_pieces(function, part, unit) for part in x.split(1)])
        height, width = x.shape[-2] // unit, x.shape[-1] // unit
        if not self.use_tiling or max(height, width) <= self.tile_size:
            return function(x)
        return _blended(function, x, unit, self.downsample // unit, self.tile_size, self.tile_overlap)


def _blended(
    function: Callable[[Tensor], Tensor], x: Tensor, unit: int, result: int, size: int, overlap: int
) -> Tensor:
    """Mean of overlapping tiles, weighted by the distance from their borders; ``result`` is what a code is in the result."""
    rows, columns = (_starts(side // unit, size, overlap) for side in x.shape[-2:])
    total = weight = torch.empty(0)
    for top in rows:
        for left in columns:
            part = x[..., top * unit : (top + size) * unit, left * unit : (left + size) * unit]
            tile = function(part)
            if not weight.numel():
                sides = [side // unit * result for side in x.shape[-2:]]
                total = tile.new_zeros(*tile.shape[:-2], *sides, dtype=torch.float32)
                weight = total.new_zeros(sides)
            ramp = _ramp(tile.shape[-2], overlap * result, tile)[:, None] * _ramp(
                tile.shape[-1], overlap * result, tile
            )
            place = (
                ...,
                slice(top * result, top * result + tile.shape[-2]),
                slice(left * result, left * result + tile.shape[-1]),
            )
            total[place] += tile.float() * ramp
            weight[place] += ramp
    return (total / weight).to(tile.dtype)


def _starts(length: int, size: int, overlap: int) -> list[int]:
    """Where tiles begin, the last one flush with the end."""
    if length <= size:
        return [0]
    return [*range(0, length - size, size - overlap), length - size]


def _ramp(length: int, overlap: int, like: Tensor) -> Tensor:
    """Weights ``[length]`` that rise over the overlap from both ends; a border of the picture has no neighbour to yield to."""
    rise = torch.arange(1, length + 1, device=like.device, dtype=torch.float32).clamp(max=max(overlap, 1))
    return torch.minimum(rise, rise.flip(0))
