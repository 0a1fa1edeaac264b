"""Orders of a grid that backbones and schedules share: which neighbors on the grid guess a code, which block it lies in.

Orders that only samplers choose stand in ``vargen.samplers.schedule.orders``.

Letters: N code positions, H axes of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def neighbors(grid_size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Which predecessors guess each code of a grid, one head for each axis, the last axis first (NAR, arXiv:2503.10696).

    Head 0 of a cell guesses the next cell of its row, head 1 the cell below, head 2 the same cell of the next frame.
    The guesses of all predecessors that exist are averaged; the first code is guessed by all heads of the condition.

    Args:
        grid_size: (h, w) or (t, h, w).

    Returns:
        Positions [H, N] int64, -1 = the last condition position, and weights [H, N] float32 that sum to 1 over heads.

    Example:
        >>> neighbors((2, 2))[1].tolist()
        [[0.5, 1.0, 0.0, 0.5], [0.5, 0.0, 1.0, 0.5]]
    """
    cells = torch.cartesian_prod(*[torch.arange(side) for side in grid_size]).reshape(-1, len(grid_size))  # N axes
    strides = torch.tensor([math.prod(grid_size[axis + 1 :]) for axis in range(len(grid_size))])
    inside = (cells > 0).flip(1).T  # H N
    positions = torch.arange(len(cells)) - strides.flip(0)[:, None]
    positions = torch.where(inside, positions, 0)
    inside, positions = inside.clone(), positions.clone()
    inside[:, 0], positions[:, 0] = True, -1
    return positions, inside.float() / inside.sum(0)


def block_order(grid_size: Sequence[int], block: Sequence[int]) -> Tensor:
    """Block after block in raster order, raster order inside a block (NBP, arXiv:2502.07737).

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
