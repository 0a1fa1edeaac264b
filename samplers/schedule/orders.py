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

from vargen.samplers.schedule.checks import MAX_CODES, check_grid, check_sizes
from vargen.validation.checks import MAX_SEED, check_choice, check_integer

ORDERS = ("random", "raster", "diagonal", "regions", "local")
GROWTHS = ("cosine", "arccos", "even")
MAX_LOCAL = 2**12  # codes that are put in the local order, whose cost grows with their square
_DIAGONAL = 1 / math.sqrt(2)
_AROUND = np.array([[_DIAGONAL, 1.0, _DIAGONAL], [1.0, 0.0, 1.0], [_DIAGONAL, 1.0, _DIAGONAL]])  # 1 / distance


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
    grid_size = check_grid(grid_size)
    side = math.isqrt(check_integer("group_size", group_size, low=1, high=math.prod(grid_size)))
    if len(grid_size) != 2 or side * side != group_size or any(s % side for s in grid_size):
        raise ValueError(
            f"group_size must be the square of a number that divides both sides of the grid {grid_size}, "
            f"got {group_size}"
        )
    cells = torch.arange(math.prod(grid_size)).view(side, grid_size[0] // side, side, grid_size[1] // side)
    return cells.permute(1, 3, 0, 2).flatten()


def diagonal_order(grid_size: tuple[int, ...]) -> Tensor:
    """NAR's order: by distance from the first code, raster order at equal distance; [N] int64."""
    distance = grid_distance(grid_size)
    return torch.argsort(distance, stable=True)


def grid_distance(grid_size: tuple[int, ...]) -> Tensor:
    """Steps along the axes from the first code to every code: [N] int64."""
    grid_size = check_grid(grid_size)
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
    check_choice("order", name, ORDERS)
    num_codes = math.prod(check_grid(grid_size))
    seed = check_integer("seed", seed, low=0, high=MAX_SEED - 1)
    if name == "random":
        return torch.from_numpy(np.random.default_rng(seed).permutation(num_codes))
    if name == "raster":
        return torch.arange(num_codes)
    if name == "diagonal":
        return diagonal_order(grid_size)
    if name == "regions":
        return region_order(grid_size, 4)
    return local_order(grid_size, group_sizes, seed)


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
    num_codes = check_integer("num_codes", num_codes, low=1, high=MAX_CODES)
    num_groups = check_integer("num_groups", num_groups, low=1, high=num_codes)
    check_choice("growth", growth, GROWTHS)
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
    grid_size = check_grid(grid_size)
    if len(grid_size) != 2:
        raise ValueError(f"the local order needs a grid_size of (height, width) codes, got {grid_size}")
    sizes = check_sizes(
        "group sizes", sizes, check_integer("codes of the local order", math.prod(grid_size), low=1, high=MAX_LOCAL)
    )
    rng = np.random.default_rng(check_integer("seed", seed, low=0, high=MAX_SEED - 1))
    repulsion = check_integer("repulsion", repulsion, low=0, high=MAX_CODES)
    grid = _Grid(grid_size[0], grid_size[1])
    num_codes = math.prod(grid_size)
    near = np.zeros(grid_size)  # sum of 1 / distance to the drawn neighbors
    away = np.full(num_codes, num_codes**2)  # squared distance to the nearest code that is taken
    free = np.ones(num_codes, dtype=bool)
    order: list[int] = []
    for size in sizes:
        score = near.flatten() + 1e-6 * rng.random(num_codes)
        group = _candidates(score, free, grid, size, repulsion)
        for p in group:
            np.minimum(away, grid.straight(p), out=away)
        free[group] = False
        while len(group) < size:
            p = int(np.argmax(np.where(free, away if order or group else rng.random(num_codes), -1.0)))
            np.minimum(away, grid.straight(p), out=away)
            free[p] = False
            group.append(p)
        for p in group:
            grid.add_neighbors(near, p)
        order += group
    return torch.tensor(order)


class _Grid:
    """Distances on a grid from one position to all, row by row."""

    def __init__(self, height: int, width: int) -> None:
        self.width, self.rows, self.columns = width, np.arange(height)[:, None], np.arange(width)

    def straight(self, p: int) -> np.ndarray:
        """Squared straight distances, ``[N]``."""
        row, column = divmod(p, self.width)
        return ((self.rows - row) ** 2 + (self.columns - column) ** 2).ravel()

    def square(self, p: int) -> np.ndarray:
        """The larger of the distances in rows and columns, ``[N]``."""
        row, column = divmod(p, self.width)
        return np.maximum(abs(self.rows - row), abs(self.columns - column)).ravel()

    def add_neighbors(self, near: np.ndarray, p: int) -> None:
        """Add 1 / distance to the eight cells around p in ``near [h, w]``."""
        row, column = divmod(p, self.width)
        top, left = max(row - 1, 0), max(column - 1, 0)
        part = near[top : row + 2, left : column + 2]
        part += _AROUND[top - row + 1 :, left - column + 1 :][: part.shape[0], : part.shape[1]]


def _candidates(score: np.ndarray, free: np.ndarray, grid: _Grid, size: int, repulsion: int) -> list[int]:
    """The free cells of the largest score, at least 1, that lie apart from each other."""
    group: list[int] = []
    apart = np.full(len(score), math.inf)
    for p in np.argsort(-score).tolist():
        if score[p] < 1 or len(group) == size:
            break
        if free[p] and apart[p] > repulsion:
            group.append(p)
            np.minimum(apart, grid.square(p), out=apart)
    return group
