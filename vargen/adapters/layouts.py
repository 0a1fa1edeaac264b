"""Streams with structural tokens: ends of lines inside the grid, and what follows the last code.

Letters: S stream slots, h w code grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vargen.protocols import Layout

FREE = -1  # a code slot in ``Layout.forced``


def lines(grid_size: tuple[int, int], *, eol: int | None = None, tail: Sequence[int] = ()) -> Layout:
    """One grid, row by row.

    Args:
        grid_size: (h, w).
        eol: token behind every row but the last; None = none.
        tail: tokens behind the last code (a last end of line included); they are never run.
    """
    h, w = grid_size
    forced: list[int] = []
    cells: list[tuple[int, int, int]] = []
    for row in range(h):
        forced += [FREE] * w
        cells += [(0, row, column) for column in range(w)]
        if eol is not None and row < h - 1:
            forced.append(eol)
            cells.append((-1, -1, -1))
    run = len(forced) - 1
    forced += tail
    cells += [(-1, -1, -1)] * len(tail)
    return Layout(len(forced), torch.tensor(forced), ((h, w),), torch.tensor(cells), run)


def grids(sizes: Sequence[tuple[int, int]], *, tail: Sequence[int] = ()) -> Layout:
    """Several grids, one after the other, each row by row; the last one is the image."""
    cells = [(number, row, column) for number, (h, w) in enumerate(sizes) for row in range(h) for column in range(w)]
    forced = [FREE] * len(cells) + list(tail)
    slots = torch.tensor(cells + [(-1, -1, -1)] * len(tail))
    return Layout(len(forced), torch.tensor(forced), tuple(sizes), slots, len(cells) - 1)


def fill(layout: Layout, codes: Tensor, code_ids: Tensor) -> Tensor:
    """Put the token ids of codes [B, N] between the structural tokens: [B, S] int64."""
    stream = layout.forced.to(codes.device).repeat(len(codes), 1)
    stream[:, layout.forced.to(codes.device) == FREE] = code_ids.to(codes.device)[codes]
    return stream
