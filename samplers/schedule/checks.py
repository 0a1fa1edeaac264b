"""What the builders of decode schedules refuse, before they make anything: no grid, too many codes, groups that do not fit.

Letters: N codes, T condition positions, g targets of a step, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from vargen.validation.checks import check_integer, check_list

MAX_CODES = 2**14  # of a scheduled grid: 128 x 128
MAX_MIX = 2**26  # weights between items and targets of all steps, 256 MiB

_SIDE = partial(check_integer, low=1, high=MAX_CODES)


def check_grid(grid_size: Any) -> tuple[int, ...]:
    """Return a grid of one to three sides as a tuple."""
    words = "(height, width) or (frames, height, width) in codes"
    grid = check_list("grid_size", grid_size, item=_SIDE, lengths=(1, 2, 3), words=words)
    if math.prod(grid) > MAX_CODES:
        raise ValueError(f"grid_size must have at most {MAX_CODES} codes in all, got {grid}")
    return grid


def check_num_condition(num_condition: Any, low: int = 1) -> int:
    """Return T; schedules whose first code is guessed by the condition need one position."""
    return check_integer("num_condition", num_condition, low=low, high=MAX_CODES)


def check_sizes(name: str, sizes: Any, num_codes: int) -> tuple[int, ...]:
    """Return sizes of groups: positive, with sum N."""
    words = f"a list of positive integers with sum {num_codes}"
    item = partial(check_integer, low=1, high=num_codes)
    found = check_list(name, sizes, item=item, lengths=range(1, num_codes + 1), words=words)
    if sum(found) != num_codes:
        raise ValueError(f"{name} must be positive and sum to {num_codes}, got a sum of {sum(found)}")
    return found


def check_order(order: Any, num_codes: int) -> list[int]:
    """Return a permutation of the N positions."""
    words = f"a list of each of the {num_codes} positions once"
    item = partial(check_integer, low=0, high=num_codes - 1)
    given = order.tolist() if hasattr(order, "tolist") else order
    found = check_list("order", given, item=item, lengths=(num_codes,), words=words)
    if len(set(found)) < num_codes:
        raise ValueError(f"order must hold each of the {num_codes} positions once")
    return list(found)


def check_sides_of_block(block: Any, grid_size: Sequence[int]) -> int | tuple[int, ...]:
    """Return M, or the sides of a block."""
    if hasattr(block, "__len__"):
        words = f"a number of codes or {len(grid_size)} sides"
        return check_list("block", block, item=_SIDE, lengths=(len(grid_size),), words=words)
    return check_integer("block", block, low=1, high=MAX_CODES)


def check_room(groups: Iterable[int], first: int, heads: int = 1) -> None:
    """Raise ``ValueError`` for groups so large that the weights of their steps would fill the memory.

    Args:
        groups: g of every step; a step reads at most its own queries and twice the group before.
        first: items in front of the first group.
        heads: H.
    """
    total, before = 0, first
    for size in groups:
        total += heads * size * (size + before)
        before = 2 * size
    if total > MAX_MIX:
        raise ValueError(
            f"the groups are too large: {total} weights between items and codes, {MAX_MIX} is the most; use a smaller "
            "grid_size, block or groups, or fewer num_condition and prefix positions"
        )
