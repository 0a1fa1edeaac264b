"""What constructors of backbones share: the checks of single arguments, and rules over several of them.

The bounds are wide: they stop what no machine holds before anything is allocated. Counts of weights are a little high.
The tables are in ``vargen.backbones.settings.discrete`` and ``.continuous``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from vargen.validation.checks import (
    MAX_BLOCKS,
    MAX_POSITIONS,
    MAX_ROWS,
    MAX_WIDTH,
    at_most,
    check_choice,
    check_integer,
    check_number,
    read_grid,
)

WIDTH = partial(check_integer, low=1, high=MAX_WIDTH)
HIDDEN = partial(check_integer, low=1, high=8 * MAX_WIDTH)  # of a feed-forward
BLOCKS = partial(check_integer, low=1, high=MAX_BLOCKS)
ROWS = partial(check_integer, low=1, high=MAX_ROWS)
MAYBE_ROWS = partial(check_integer, low=0, high=MAX_ROWS)
POSITIONS = partial(check_integer, low=1, high=MAX_POSITIONS)
MAYBE_POSITIONS = partial(check_integer, low=0, high=MAX_POSITIONS)
GRID = read_grid
VIDEO_GRID = partial(read_grid, lengths=(2, 3))
SHARE = partial(check_number, low=0.0, high=1.0)
DROPOUT = partial(check_number, low=0.0, high=1.0, open_high=True)
FACTOR = partial(check_number, low=0.0, high=64.0, open_low=True)
EPS = partial(check_number, low=0.0, high=1.0, open_low=True)
PERIOD = partial(check_number, low=0.0, high=1e12, open_low=True)
CLASS_OR_SLOTS = partial(check_choice, allowed=("class", "attributes"))


def check_condition(c: Any) -> None:
    """Raise ``ValueError`` unless the kind of condition has what it needs; settings of other kinds are not read."""
    slots = ("num_attributes", "num_condition_tokens")
    needed = {"class": ("num_classes",), "caption": ("num_condition_tokens",), "attributes": slots}
    for name in needed.get(c.condition_type, ()):
        if getattr(c, name) < 1:
            raise ValueError(f"condition_type={c.condition_type!r} needs {name} of at least 1, got {getattr(c, name)}")


def check_heads(dim: int, num_heads: int, multiple: int = 1, prefix: str = "") -> None:
    """Raise ``ValueError`` unless the width of a head is whole and such a multiple."""
    if dim % num_heads or dim // num_heads % multiple:
        rule = f"{prefix}num_heads must divide {prefix}dim"
        rule = rule if multiple == 1 else f"dim / num_heads must be a multiple of {multiple}"
        raise ValueError(f"{rule}, got {prefix}dim={dim}, {prefix}num_heads={num_heads}")


def check_rotary(c: Any) -> None:
    """Raise ``ValueError`` unless heads turn with the rows and columns of a grid."""
    check_heads(c.dim, c.num_heads, 4)


def check_hidden(dim: int, mlp_ratio: float) -> None:
    """Raise ``ValueError`` where a feed-forward would be empty."""
    if int(dim * mlp_ratio) < 1:
        raise ValueError(f"mlp_ratio must leave the feed-forward a width, got {mlp_ratio:g} times {dim}")


def condition_rows(kind: str, num_classes: int, num_attributes: int, num_condition_tokens: int) -> int:
    """Rows of a condition's tables."""
    held = {"class": num_classes + 1, "attributes": num_attributes + num_condition_tokens}
    return held.get(kind, num_condition_tokens)


def gated_blocks(dim: int, num_layers: int, hidden: int) -> int:
    """Weights of blocks whose feed-forwards are gated."""
    return num_layers * dim * (4 * dim + 3 * hidden + 8)


def area(grid_size: Sequence[int], num_condition_tokens: int | None) -> int:
    """Positions of a grid and its condition."""
    return math.prod(grid_size) + (num_condition_tokens or 0)


AREA = at_most(MAX_POSITIONS, "positions", area)
