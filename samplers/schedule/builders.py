"""Builders of decode schedules, one for each published family.

NAR (arXiv:2503.10696), NBP (arXiv:2502.07737), PAR (arXiv:2412.15119), RandAR (arXiv:2412.01827), ARPG
(arXiv:2503.10568), LPD (arXiv:2507.01957), MaskGIT (arXiv:2202.04200). Codes lie in the cache in the order in which they
are drawn, so that the written slots are a prefix and most passes need no mask.

Letters: N codes, T condition positions, M group or block size, S forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from vargen.orders import block_order, neighbors
from vargen.protocols import Item, Step
from vargen.samplers.schedule.blocks import merged
from vargen.samplers.schedule.checks import (
    check_grid,
    check_num_condition,
    check_order,
    check_room,
    check_sides_of_block,
    check_sizes,
)
from vargen.samplers.schedule.orders import diagonal_order, grid_distance, region_order
from vargen.validation.checks import check_choice, check_flag, check_integer

QUERY_STYLES = ("randar", "arpg", "lpd")


class ScheduleBuilders:
    """The builders; mixed into ``DecodeSchedule``, so that they are called as ``DecodeSchedule.nar2d(...)``."""

    @classmethod
    def raster(cls, grid_size: tuple[int, ...], num_condition: int = 1) -> Self:
        """Next-token: one code a pass, row by row; N passes."""
        grid_size, num_condition = check_grid(grid_size), check_num_condition(num_condition)
        num_codes = math.prod(grid_size)
        steps = [_condition_step(num_condition, torch.tensor([0]), 1)]
        for p in range(1, num_codes):
            slot = num_condition + p - 1
            steps.append(_step([(Item.CODE, p - 1, slot, slot)], [p], _identity(1), counted=p))
        return cls._make("raster", grid_size, num_condition, num_condition + num_codes, steps)

    @classmethod
    def next_row(cls, grid_size: tuple[int, ...], num_condition: int = 1, prefix: int = 0) -> Self:
        """NBP with blocks of one row."""
        return cls.next_block(grid_size, check_grid(grid_size)[-1], num_condition, prefix)

    @classmethod
    def next_block(
        cls,
        grid_size: tuple[int, ...],
        block: int | tuple[int, ...],
        num_condition: int = 1,
        prefix: int = 0,
        hybrid: bool = False,
    ) -> Self:
        """NBP: code j of a block guesses code j of the next block.

        Without a prefix the first block is drawn code by code, then one pass reads its last code beside M - 1 learned
        tokens ("hybrid"): N / M + M - 1 passes. The condition is text, which all see, and a last position that begins
        the picture.

        Args:
            grid_size: (h, w) or (t, h, w).
            block: M consecutive codes, divides N; one row or one frame in the published models. Or the sides of a block,
                which divide those of the grid.
            num_condition: T.
            prefix: codes given beforehand (whole blocks: the first frames of a video); then there is no code-by-code
                start and (N - prefix) / M passes.
            hybrid: lay the given codes out as the code-by-code start would have left them, learned tokens included: for
                models that were trained with that start.
        """
        grid_size = check_grid(grid_size)
        num_codes = math.prod(grid_size)
        sides = check_sides_of_block(block, grid_size)
        order = torch.arange(num_codes) if isinstance(sides, int) else block_order(grid_size, sides)
        block = sides if isinstance(sides, int) else math.prod(sides)
        if num_codes % block:
            raise ValueError(f"block must divide the {num_codes} codes of the grid {grid_size}, got {block}")
        prefix = check_integer("prefix", prefix, low=0, high=num_codes - 1, hint="it leaves a code to draw")
        if prefix % block:
            raise ValueError(f"prefix must be whole blocks of {block} codes and leave one to draw, got {prefix}")
        hybrid = check_flag("hybrid", hybrid)
        num_condition = check_num_condition(num_condition, low=int(prefix == 0 or hybrid))
        check_room([block] * ((num_codes - prefix) // block), num_condition + prefix + block)
        if prefix and set(order[:prefix].tolist()) != set(range(prefix)):
            raise ValueError(
                f"the first blocks must hold the first {prefix} codes, which the prefix gives; use whole frames"
            )
        stamps = [0] * (num_condition - 1) + [min(num_condition - 1, 1)] if num_condition else []
        if prefix == 0 or hybrid:
            steps = _grouped_steps(order, block, stamps)
            known = prefix // block + block - 1 if prefix else 0  # passes whose codes are given
            steps = [merged(steps[: known + 1]), *steps[known + 1 :]]
            slots = num_condition + num_codes + block - 1
        else:
            steps = _prefixed_steps(order, block, prefix, stamps)
            slots = num_condition + num_codes
        return cls._make("next_block", grid_size, num_condition, slots, steps, group_size=block, prefix=prefix)

    @classmethod
    def nar2d(cls, grid_size: tuple[int, ...], num_condition: int = 1) -> Self:
        """NAR: one anti-diagonal a pass, each code the average guess of its upper and its left neighbor; h + w - 1 passes."""
        if len(check_grid(grid_size)) != 2:
            raise ValueError(f"nar2d needs a grid_size of (height, width) codes, got {grid_size}; videos: nar3d")
        return cls._nar("nar2d", grid_size, num_condition)

    @classmethod
    def nar3d(cls, grid_size: tuple[int, ...], num_condition: int = 1) -> Self:
        """NAR for videos: one plane t + h + w = const a pass; T + H + W - 2 passes."""
        if len(check_grid(grid_size)) != 3:
            raise ValueError(f"nar3d needs a grid_size of (frames, height, width) codes, got {grid_size}")
        return cls._nar("nar3d", grid_size, num_condition)

    @classmethod
    def par(cls, grid_size: tuple[int, ...], group_size: int = 4, num_condition: int = 1) -> Self:
        """PAR: the first code of each of M regions one by one, then the same cell of all regions; N / M + M - 1 passes.

        Args:
            grid_size: (h, w).
            group_size: M, the square of a number that divides both sides.
            num_condition: T.
        """
        num_condition = check_num_condition(num_condition)
        order = region_order(grid_size, group_size)
        check_room([group_size] * (len(order) // group_size), num_condition)
        steps = _grouped_steps(order, group_size, list(range(num_condition)), restart=True)
        slots = num_condition + len(order) + group_size - 1
        return cls._make("par", grid_size, num_condition, slots, steps, group_size=group_size)

    @classmethod
    def groups(
        cls,
        grid_size: tuple[int, ...],
        order: Tensor | Sequence[int],
        sizes: Sequence[int],
        num_condition: int = 1,
        style: str = "randar",
    ) -> Self:
        """Any-order models: queries ask for the codes of a group at their positions; one pass a group.

        Args:
            grid_size: in codes.
            order: [N] raster position of the k-th code, see samplers/schedule/orders.py.
            sizes: of the groups, sum N.
            num_condition: T.
            style: "randar" (queries stand before their codes, everything in causal order), "lpd" (the queries of a group
                see each other, codes take their slots) or "arpg" (queries read the codes only and leave no trace).
        """
        check_choice("style", style, QUERY_STYLES)
        grid_size, num_condition = check_grid(grid_size), check_num_condition(num_condition, low=0)
        num_codes = math.prod(grid_size)
        listed, sizes = check_order(order, num_codes), check_sizes("sizes", sizes, num_codes)
        check_room(sizes, num_condition)
        make = {"randar": _randar_steps, "lpd": _lpd_steps, "arpg": _arpg_steps}[style]
        slots = num_condition + num_codes * (2 if style == "randar" else 1)
        return cls._make(style, grid_size, num_condition, slots, make(listed, list(sizes), num_condition))

    @classmethod
    def maskgit(cls, grid_size: tuple[int, ...], num_steps: int, num_condition: int = 1) -> Self:
        """MaskGIT: every pass reads and scores all codes; which of them stay is decided by confidence. S passes, no cache."""
        grid_size, num_condition = check_grid(grid_size), check_num_condition(num_condition, low=0)
        num_codes = math.prod(grid_size)
        num_steps = check_integer("num_steps", num_steps, low=1, high=num_codes)
        check_room([num_codes], num_condition)
        items = [(Item.CONDITION, i, -1, 0) for i in range(num_condition)]
        items += [(Item.CODE, p, -1, 0) for p in range(num_codes)]
        step = _step(items, list(range(num_codes)), _identity(num_codes, num_condition))
        return cls._make("maskgit", grid_size, num_condition, 0, [step] * num_steps, revising=True)

    @classmethod
    def _nar(cls, kind: str, grid_size: tuple[int, ...], num_condition: int) -> Self:
        grid_size, num_condition = check_grid(grid_size), check_num_condition(num_condition)
        order, distance = diagonal_order(grid_size), grid_distance(grid_size)
        check_room(distance.bincount().tolist(), num_condition, heads=len(grid_size))
        sources, weights = neighbors(grid_size)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        steps = [_condition_step(num_condition, order[:1], len(grid_size))]
        for d in range(1, int(distance.max()) + 1):
            fed, targets = order[distance[order] == d - 1], order[distance[order] == d]
            slots = (num_condition + places[fed]).tolist()
            items = [(Item.CODE, p, s, num_condition + d - 1) for p, s in zip(fed.tolist(), slots, strict=True)]
            near = sources[:, targets, None] == fed  # H g w
            steps.append(_step(items, targets, near * weights[:, targets, None], counted=int(places[targets[0]])))
        return cls._make(kind, grid_size, num_condition, num_condition + len(order), steps)

    @classmethod
    def _make(
        cls, kind: str, grid_size: tuple[int, ...], num_condition: int, num_slots: int, steps: Any, **more: Any
    ) -> Self:
        return cls(kind, tuple(grid_size), num_condition, num_slots, tuple(steps), **more)  # type: ignore[call-arg]


def _step(
    items: Sequence[tuple[Item, int, int, int]],  # kind, index, slot, stamp
    targets: Sequence[int] | Tensor,
    mix: Tensor,
    *,
    commit: Sequence[bool] | None = None,
    counted: int = 0,
) -> Step:
    kinds, index, slots, tau = torch.tensor(items, dtype=torch.int64).reshape(-1, 4).T.contiguous()
    kept = torch.ones(len(kinds), dtype=torch.bool) if commit is None else torch.tensor(commit)
    return Step(kinds, index, slots, tau, tau.clone(), torch.as_tensor(targets), mix, kept, counted)


def _identity(count: int, offset: int = 0) -> Tensor:
    """Target i is read off item offset + i by the one head: [1, g, w]."""
    mix = torch.zeros(1, count, offset + count, dtype=torch.float32)
    mix[0].diagonal(offset).fill_(1.0)
    return mix


def _condition_step(num_condition: int, targets: Tensor, num_heads: int) -> Step:
    """The condition in causal order; its last position guesses the first code, all heads averaged."""
    mix = torch.zeros(num_heads, 1, num_condition, dtype=torch.float32)
    mix[:, 0, -1] = 1 / num_heads
    return _step([(Item.CONDITION, i, i, i) for i in range(num_condition)], targets, mix)


def _grouped_steps(order: Tensor, size: int, stamps: list[int], restart: bool = False) -> list[Step]:
    """M codes one by one, one pass with learned tokens, then group by group (PAR; NBP's hybrid start).

    ``restart``: a guidance interval counts from 0 again when the groups begin, as PAR's code does.
    """
    positions, offset = order.tolist(), len(stamps)
    mix = torch.zeros(1, 1, offset, dtype=torch.float32)
    mix[0, 0, -1] = 1.0
    first = [(Item.CONDITION, i, i, stamp) for i, stamp in enumerate(stamps)]
    steps = [_step(first, positions[:1], mix)]
    stamp, slot = stamps[-1], offset
    for k in range(1, size):
        stamp += 1
        steps.append(
            _step([(Item.CODE, positions[k - 1], slot, stamp)], positions[k : k + 1], _identity(1), counted=k)
        )
        slot += 1
    for start in range(size, len(positions), size):
        stamp += 1
        fed = [(Item.CODE, p) for p in positions[start - size : start]]
        if start == size:
            fed = [fed[-1], *[(Item.SPECIAL, i) for i in range(size - 1)]]
        items = [(kind, i, slot + j, stamp) for j, (kind, i) in enumerate(fed)]
        made = start - size if restart else start
        steps.append(_step(items, positions[start : start + size], _identity(size), counted=made))
        slot += size
    return steps


def _prefixed_steps(order: Tensor, size: int, prefix: int, stamps: list[int]) -> list[Step]:
    """Known blocks in one pass, then block by block."""
    positions, offset, base = order.tolist(), len(stamps), (stamps[-1] + 1 if stamps else 0)

    def codes(start: int, stop: int) -> list[tuple[Item, int, int, int]]:
        return [(Item.CODE, positions[k], offset + k, base + k // size) for k in range(start, stop)]

    items = [(Item.CONDITION, i, i, stamp) for i, stamp in enumerate(stamps)] + codes(0, prefix)
    steps = [_step(items, order[prefix : prefix + size], _identity(size, len(items) - size))]
    for start in range(prefix + size, len(positions), size):
        counted = start - prefix
        steps.append(_step(codes(start - size, start), order[start : start + size], _identity(size), counted=counted))
    return steps


def _randar_steps(order: list[int], sizes: list[int], offset: int) -> list[Step]:
    """Code k and its query stand at slots T + 2k + 1 and T + 2k; the queries of a running group move together."""
    steps, done, last = [], 0, 0
    for size in sizes:
        items: list[tuple[Item, int, int, int]] = []
        if done == 0:
            items += [(Item.CONDITION, i, i, i) for i in range(offset)]
        for k in range(done - last, done):
            slot = offset + 2 * k
            if k > done - last:  # the group's first query stands where it belongs already
                items.append((Item.QUERY, order[k], slot, slot))
            items.append((Item.CODE, order[k], slot + 1, slot + 1))
        settled = len(items)
        base = offset + 2 * done
        items += [(Item.QUERY, order[done + j], base + j, base + j) for j in range(size)]
        commit = [True] * (settled + 1) + [False] * (size - 1)
        steps.append(_step(items, order[done : done + size], _identity(size, settled), commit=commit, counted=done))
        done, last = done + size, size
    return steps


def _lpd_steps(order: list[int], sizes: list[int], offset: int) -> list[Step]:
    """The codes of the last group at its slots, then the queries of this group at its own."""
    steps, done, last = [], 0, 0
    for number, size in enumerate(sizes):
        items: list[tuple[Item, int, int, int]] = []
        if done == 0:
            items += [(Item.CONDITION, i, i, 0) for i in range(offset)]
        items += [(Item.CODE, order[k], offset + k, number) for k in range(done - last, done)]
        settled = len(items)
        items += [(Item.QUERY, order[done + j], offset + done + j, number + 1) for j in range(size)]
        commit = [True] * settled + [False] * size
        steps.append(_step(items, order[done : done + size], _identity(size, settled), commit=commit, counted=done))
        done, last = done + size, size
    return steps


def _arpg_steps(order: list[int], sizes: list[int], offset: int) -> list[Step]:
    """As LPD, but queries see codes and condition only and are never kept."""
    return [_detach_queries(step) for step in _lpd_steps(order, sizes, offset)]


def _detach_queries(step: Step) -> Step:
    queries = step.kinds == Item.QUERY
    slots = torch.where(queries, -1, step.slots)
    view = step.nu - queries.long()  # the stamp of this group is that of the next codes: not theirs to see
    commit = torch.ones_like(step.commit)
    return Step(step.kinds, step.index, slots, step.tau, view, step.targets, step.mix, commit, step.counted)
