"""Parallel groups: several distant codes in one forward pass, in a trained or in any order.

PAR (Wang et al., 2024, arXiv:2412.15119) draws groups of M codes, one from each region, in the order that the model was
trained for. Any-order models (RandAR, Pang et al., 2024, arXiv:2412.01827) take any order and any group sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from vargen.features import Feature
from vargen.samplers.schedule.decoder import ScheduleSampler, ScheduleState
from vargen.samplers.schedule.orders import GROWTHS, ORDERS, group_sizes, make_order
from vargen.samplers.schedule.schedule import DecodeSchedule
from vargen.validation.checks import check_choice, check_integer


@dataclass(frozen=True, kw_only=True)
class ParallelGroupSampler(ScheduleSampler):
    """Draw group by group.

    The last four settings are read for any-order models only; PAR models have their order and group size in their
    configuration. PAR is sampled with a guidance scale of about 1.5, RandAR with ``guidance_scale=4`` and
    ``guidance_schedule="linear"``.

    Args:
        guidance_scale, temperature, top_k, top_p, guidance_interval, guidance_schedule: as in ``ScheduleSampler``.
        num_steps: forward passes.
        order: "random", "raster", "diagonal", "regions" (PAR's), or "local" (LPD's: near what is drawn, members apart).
        order_seed: of random orders; one order serves all images of a call.
        growth: group sizes: "cosine" (RandAR), "arccos" (ARPG) or "even".
    """

    required_features: ClassVar[frozenset[str]] = frozenset({Feature.GROUPS})

    num_steps: int = 32
    order: str = "random"
    order_seed: int = 0
    growth: str = "cosine"

    def check(self) -> None:
        """Raise ``ValueError`` for a setting out of range."""
        super().check()
        check_integer("num_steps", self.num_steps, low=1)
        check_integer("order_seed", self.order_seed, low=0)
        check_choice("order", self.order, ORDERS)
        check_choice("growth", self.growth, GROWTHS)

    def make_schedule(self, backbone: Any) -> DecodeSchedule:
        """The schedule that the backbone was trained for, or the one of the settings."""
        grid, num_condition = tuple(backbone.grid_size), int(backbone.num_condition_tokens)
        if "par" in backbone.schedules:
            return _regions(grid, int(backbone.config.group_size), num_condition)
        num_codes = int(backbone.num_codes)
        check_integer("num_steps", self.num_steps, low=1, high=num_codes, hint=f"the grid has {num_codes} codes")
        return _any_order(grid, num_condition, self.num_steps, self.order, int(self.order_seed), self.growth)

    def departures(self, state: ScheduleState) -> list[str]:
        """Any-order models are trained one code after the other: a group of independent draws is another distribution."""
        largest = max(state.schedule.group_sizes)
        if state.schedule.kind == "par" or largest == 1:
            return []
        return [f"up to {largest} codes of a group are drawn independently of each other"]


@lru_cache(maxsize=16)
def _regions(grid_size: tuple[int, ...], group_size: int, num_condition: int) -> DecodeSchedule:
    return DecodeSchedule.par(grid_size, group_size, num_condition)


@lru_cache(maxsize=16)
def _any_order(
    grid_size: tuple[int, ...], num_condition: int, num_steps: int, order: str, seed: int, growth: str
) -> DecodeSchedule:
    num_codes = 1
    for side in grid_size:
        num_codes *= side
    sizes = group_sizes(num_codes, num_steps, growth)
    places = make_order(order, grid_size, seed, sizes)
    return DecodeSchedule.groups(grid_size, places, sizes, num_condition)
