"""Orders in which any-order models draw a grid, and how many codes each forward pass draws.

Group sizes of RandAR (Pang et al., 2024, arXiv:2412.01827), ARPG (Li et al., 2025, arXiv:2503.10568) and LPD (Zhang et
al., 2025, arXiv:2507.01957); locality-aware order of LPD; regions of PAR (Wang et al., 2024, arXiv:2412.15119).

Letters: N codes, S forward passes, M codes of a group.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

ORDERS = ("random", "raster", "diagonal", "regions", "local")
GROWTHS = ("cosine", "arccos", "even")


def region_order(grid_size: tuple[int, ...], group_size: int) -> Tensor:
    """PAR's order: the picture is cut into sqrt(M) x sqrt(M) regions, a group is the same cell of each of them.

    Args:
        grid_size: (h, w) in codes.
        group_size: M, a square; its root divides both sides.

    Returns:
        [N] int64 raster position of the k-th code.

    Example:
        >>> region_order((6, 6), 4)[:8].tolist()
        [0, 3, 18, 21, 1, 4, 19, 22]
    """
    side = math.isqrt(group_size)
    if len(grid_size) != 2 or side * side != group_size or any(s % side for s in grid_size):
        raise ValueError(
            f"group_size must be the square of a number that divides both sides of the grid {tuple(grid_size)}, got {group_size}"
        )
    cells = torch.arange(math.prod(grid_size)).view(side, grid_size[0] // side, side, grid_size[1] // side)
    return cells.permute(1, 3, 0, 2).flatten()


def diagonal_order(grid_size: tuple[int, ...]) -> Tensor:
    """NAR's order: by distance from the first code, raster order at equal distance; [N] int64."""
    distance = grid_distance(grid_size)
    return torch.argsort(distance, stable=True)


def grid_distance(grid_size: tuple[int, ...]) -> Tensor:
    """Steps along the axes from the first code to every code: [N] int64."""
    cells = torch.cartesian_prod(*[torch.arange(side) for side in grid_size])
    return cells.reshape(-1, len(grid_size)).sum(1)


def make_order(name: str, grid_size: tuple[int, ...], seed: int = 0, group_sizes: tuple[int, ...] = ()) -> Tensor:
    """An order by name.

    Args:
        name: "random", "raster", "diagonal", "regions" (PAR's, four regions) or "local" (LPD's, made for the groups).
        grid_size: in codes.
        seed: of the random ones; the order is shared by all images of a call.
        group_sizes: read by "local" only.

    Returns:
        [N] int64 raster position of the k-th code.
    """
    num_codes = math.prod(grid_size)
    if name == "random":
        return torch.from_numpy(np.random.default_rng(seed).permutation(num_codes))
    if name == "raster":
        return torch.arange(num_codes)
    if name == "diagonal":
        return diagonal_order(grid_size)
    if name == "regions":
        return region_order(grid_size, 4)
    if name == "local":
        return local_order(grid_size, group_sizes, seed)
    raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {name!r}")


def group_sizes(num_codes: int, num_groups: int, growth: str = "cosine") -> tuple[int, ...]:
    """How many codes each of S passes draws.

    Args:
        num_codes: N.
        num_groups: S, in 1..N.
        growth: "cosine" (RandAR; few codes first), "arccos" (ARPG; the last group takes a large rest) or "even".

    Returns:
        S positive sizes with sum N.

    Example:
        >>> group_sizes(256, 32)[:8]
        (1, 1, 1, 2, 3, 4, 3, 5)
    """
    if not 1 <= num_groups <= num_codes:
        raise ValueError(f"num_groups must be in 1..{num_codes}, got {num_groups}")
    if growth not in GROWTHS:
        raise ValueError(f"growth must be one of {', '.join(GROWTHS)}, got {growth!r}")
    sizes, done = [], 0
    for s in range(num_groups - 1):
        left = num_groups - 1 - s  # passes after this one, each with a code at least
        wanted = _target(num_codes, num_groups, s + 1, growth) - done
        sizes.append(max(1, min(wanted, num_codes - done - left)))
        done += sizes[-1]
    return (*sizes, num_codes - done)


def _target(num_codes: int, num_groups: int, passes: int, growth: str) -> int:
    """Codes that are done after so many passes, in the rounding of the released code."""
    share = passes / num_groups
    if growth == "even":
        return round(num_codes * share)
    if growth == "arccos":
        return num_codes - int(num_codes * math.acos(share) * 2 / math.pi)
    return num_codes - int(num_codes * math.cos(math.pi / 2 * share))


def local_order(grid_size: tuple[int, ...], sizes: tuple[int, ...], seed: int = 0, repulsion: int = 2) -> Tensor:
    """LPD's order: each group lies near what is drawn and its members lie apart from each other.

    Candidates are taken by the sum of 1 / distance to their drawn neighbors (the eight around them), at least 1, outside
    a square of radius ``repulsion`` around the members of the group so far; the rest by farthest-point sampling.

    Args:
        grid_size: (h, w).
        sizes: of the groups, sum N.
        seed: decides the first position and breaks ties.
        repulsion: in codes.

    Returns:
        [N] int64 raster positions.
    """
    height, width = grid_size
    if sum(sizes) != height * width:
        raise ValueError(f"group sizes must sum to {height * width}, got {sum(sizes)}")
    rng = np.random.default_rng(seed)
    cells = np.stack(np.divmod(np.arange(height * width), width), axis=1)
    gaps = np.abs(cells[:, None] - cells[None])  # N N 2
    square, straight = gaps.max(-1), np.sqrt((gaps**2).sum(-1))
    nearness = np.where((square == 1), 1 / np.maximum(straight, 1), 0.0)
    drawn = np.zeros(len(cells), dtype=bool)
    order: list[int] = []
    for size in sizes:
        score = nearness[:, drawn].sum(1) + 1e-6 * rng.random(len(cells))
        group: list[int] = []
        for p in np.argsort(-score):
            apart = not group or square[p, group].min() > repulsion
            if len(group) < size and not drawn[p] and score[p] >= 1 and apart:
                group.append(int(p))
        while len(group) < size:
            taken = [*order, *group]
            free = ~drawn
            free[group] = False
            away = straight[:, taken].min(1) if taken else rng.random(len(cells))
            group.append(int(np.argmax(np.where(free, away, -1.0))))
        drawn[group] = True
        order += group
    return torch.tensor(order)
