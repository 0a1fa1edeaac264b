"""Blocks of next-block prediction (NBP, Ren et al., 2025, arXiv:2502.07737): their order, and given blocks in one pass.

Letters: N codes, M codes of a block, w items, g targets, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vargen.protocols import Step


def block_order(grid_size: Sequence[int], block: Sequence[int]) -> Tensor:
    """Block after block in raster order, raster order inside a block.

    Args:
        grid_size: (h, w) or (t, h, w) in codes.
        block: sides of a block, one for each side of the grid, which it divides.

    Returns:
        [N] int64 raster position of the k-th code.

    Example:
        >>> block_order((2, 4), (2, 2)).tolist()
        [0, 1, 4, 5, 2, 3, 6, 7]
    """
    sides = [int(side) for side in block]
    if len(sides) != len(grid_size) or any(b < 1 or s % b for s, b in zip(grid_size, sides, strict=False)):
        raise ValueError(f"block must divide the grid {tuple(grid_size)} side by side, got {tuple(block)}")
    split = [part for s, b in zip(grid_size, sides, strict=True) for part in (s // b, b)]
    axes = range(len(split))
    cells = torch.arange(math.prod(grid_size)).view(split)
    return cells.permute(*axes[::2], *axes[1::2]).flatten()


def merged(steps: Sequence[Step]) -> Step:
    """One pass for several whose draws but the last are known beforehand: all items, the targets of the last."""
    last = steps[-1]
    joined = {name: torch.cat([getattr(step, name) for step in steps]) for name in ("kinds", "index", "slots")}
    joined |= {name: torch.cat([getattr(step, name) for step in steps]) for name in ("tau", "nu", "commit")}
    mix = F.pad(last.mix, (len(joined["kinds"]) - len(last.kinds), 0))
    return Step(**joined, targets=last.targets, mix=mix, counted=last.counted)
