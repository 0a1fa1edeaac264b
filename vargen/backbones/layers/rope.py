"""Rotary position tables over grids (Su et al., 2021, arXiv:2104.09864; two axes as in LlamaGen, arXiv:2406.06525).

Pairs of channels (2m, 2m + 1) are rotated. A row of a table is [d / 2, 2] with cosine and sine on the last axis, so that
a row of zeros wipes the vector it is applied to: LlamaGen's condition rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grid_table(grid_size: tuple[int, ...], head_dim: int, base: float = 10000.0) -> Tensor:
    """Rotations of every cell of a grid, raster order.

    The pairs are split evenly over the axes: for (h, w) the first half turns with the row, the second with the column.

    Args:
        grid_size: sides, slowest axis first.
        head_dim: d, a multiple of 2 * number of axes.
        base: longest period of the frequencies.

    Returns:
        [cells, head_dim / 2, 2] float32.
    """
    axes = len(grid_size)
    if head_dim % (2 * axes):
        raise ValueError(f"head width must be a multiple of {2 * axes} for {axes} axes, got {head_dim}")
    width = head_dim // axes
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)  # d / (2 * axes)
    cells = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float32) for side in grid_size])
    angles = (cells.reshape(-1, axes, 1) * frequencies).flatten(1)  # cells, d / 2
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def constant_rows(num_rows: int, head_dim: int, kind: str) -> Tensor:
    """Rows without a position: ``"zero"`` wipes queries and keys, ``"identity"`` leaves them unrotated.

    Returns:
        [num_rows, head_dim / 2, 2] float32.
    """
    rows = torch.zeros(num_rows, head_dim // 2, 2, dtype=torch.float32)
    if kind == "identity":
        rows[..., 0] = 1.0
    elif kind != "zero":
        raise ValueError(f"condition_rope must be 'zero' or 'identity', got {kind!r}")
    return rows


def spread(rows: Tensor) -> Tensor:
    """Rows of a table as ``rotate`` takes them, once for all layers.

    Args:
        rows: [..., d / 2, 2].

    Returns:
        [..., 2, d]: the cosine of every channel, and its sine with the sign that its pair gives it.
    """
    cos, sin = rows.unbind(-1)
    return torch.stack([torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)], dim=-2)


def rotate(x: Tensor, rows: Tensor) -> Tensor:
    """Rotate channel pairs in float32.

    Args:
        x: [R, w, H, d].
        rows: [w, 2, d] or [R, w, 2, d], from ``spread``.

    Returns:
        [R, w, H, d] in the dtype of ``x``.
    """
    y = x.float()
    swapped = y.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (a, b) -> (b, a)
    cos, sin = rows.unsqueeze(-3).unbind(-2)  # [R] w 1 d
    return (y * cos + swapped * sin).to(x.dtype)
