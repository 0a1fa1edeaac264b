"""Builders of decode schedules and orders meet every kind of wrong argument: a valid result, or one line."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.test_errors import one_line
from tests.wrong import WRONG
from vargen.samplers.schedule.orders import (
    diagonal_order,
    grid_distance,
    group_sizes,
    local_order,
    make_order,
    region_order,
)
from vargen.samplers.schedule.schedule import DecodeSchedule

# builder -> arguments that work
BUILDERS: dict[str, dict[str, Any]] = {
    "raster": {"grid_size": (2, 3), "num_condition": 2},
    "next_row": {"grid_size": (2, 3), "num_condition": 2, "prefix": 3},
    "next_block": {"grid_size": (2, 2, 2), "block": (1, 2, 2), "num_condition": 2, "prefix": 4, "hybrid": True},
    "nar2d": {"grid_size": (2, 3), "num_condition": 2},
    "nar3d": {"grid_size": (2, 3, 2), "num_condition": 2},
    "par": {"grid_size": (4, 4), "group_size": 4, "num_condition": 2},
    "groups": {"grid_size": (2, 2), "order": [1, 0, 3, 2], "sizes": (1, 3), "num_condition": 2, "style": "lpd"},
    "maskgit": {"grid_size": (2, 2), "num_steps": 3, "num_condition": 2},
}
ORDERS: dict[Callable[..., Any], dict[str, Any]] = {
    region_order: {"grid_size": (4, 4), "group_size": 4},
    diagonal_order: {"grid_size": (4, 4)},
    grid_distance: {"grid_size": (4, 4)},
    make_order: {"name": "local", "grid_size": (4, 4), "seed": 1, "group_sizes": (4, 12)},
    group_sizes: {"num_codes": 16, "num_groups": 4, "growth": "arccos"},
    local_order: {"grid_size": (4, 4), "sizes": (4, 12), "seed": 1, "repulsion": 2},
}
SPOKEN = {"name": "order", "group_sizes": "group sizes", "sizes": "sizes"}  # argument -> how a message calls it
SMALL = st.one_of(
    st.integers(-1, 5),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.lists(st.integers(0, 5), max_size=5),
    st.permutations(range(4)),
    st.sampled_from(["randar", "arpg", "lpd", True, False]),
    st.sampled_from(WRONG),
)


def outcome(call: Callable[..., Any], arguments: dict[str, Any], named: str = "") -> Any:
    """What a call gives; None where it refuses in one line that names the argument, or what the argument does not fit."""
    try:
        return call(**arguments)
    except ValueError as error:
        message = str(error)
    assert "\n" not in message, message
    assert len(message) < 400, message
    fits_alone = isinstance(arguments.get(named), int | list | tuple | np.integer)
    spoken = [SPOKEN.get(name, name) for name in arguments] if fits_alone else [SPOKEN.get(named, named)]
    assert any(name in message for name in spoken), message
    return None


@pytest.mark.parametrize("name", BUILDERS)
def test_every_argument_of_a_builder_meets_every_wrong_value(name: str) -> None:
    builder = getattr(DecodeSchedule, name)
    assert set(inspect.signature(builder).parameters) == set(BUILDERS[name])
    builder(**BUILDERS[name]).validate()
    for argument in BUILDERS[name]:
        for value in WRONG:
            schedule = outcome(builder, {**BUILDERS[name], argument: value}, argument)
            if schedule is not None:
                schedule.validate()


def test_every_public_builder_is_here() -> None:
    public = {
        name
        for name, member in inspect.getmembers(DecodeSchedule, inspect.ismethod)
        if not name.startswith("_") and member.__self__ is DecodeSchedule
    }
    assert public == set(BUILDERS)


@pytest.mark.parametrize("order", ORDERS)
def test_every_argument_of_an_order_meets_every_wrong_value(order: Callable[..., Any]) -> None:
    assert set(inspect.signature(order).parameters) == set(ORDERS[order])
    for argument in ORDERS[order]:
        for value in WRONG:
            found = outcome(order, {**ORDERS[order], argument: value}, argument)
            if isinstance(found, torch.Tensor) and order is not grid_distance:
                assert sorted(found.tolist()) == list(range(len(found)))
            elif isinstance(found, tuple):
                assert min(found) > 0


@settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(BUILDERS)), data=st.data())
def test_builders_give_valid_schedules_or_refuse(name: str, data: st.DataObject) -> None:
    arguments = dict(BUILDERS[name])
    for argument in data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, unique=True)):
        arguments[argument] = data.draw(SMALL)
    if data.draw(st.booleans()) and name == "groups":  # a partition that fits whatever grid was drawn
        grid = arguments["grid_size"] if isinstance(arguments["grid_size"], tuple) else (2, 2)
        if (count := math.prod(grid)) <= 64:
            arguments |= {"grid_size": grid, "order": range(count), "sizes": [1] * count}
    schedule = outcome(getattr(DecodeSchedule, name), arguments)
    if schedule is not None:
        schedule.validate()


def test_large_grids_are_refused_before_anything_is_made() -> None:
    one_line(lambda: DecodeSchedule.raster((129, 128)), "grid_size must have at most 16384 codes")
    one_line(lambda: DecodeSchedule.maskgit((128, 128), 8), "groups are too large", "grid_size")
    one_line(lambda: DecodeSchedule.next_block((128, 128), 8192), "groups are too large", "block")
    one_line(lambda: DecodeSchedule.groups((128, 128), range(2**14), (2**14,)), "groups are too large")
    one_line(lambda: make_order("local", (65, 64), 0, (65 * 64,)), "local order", "in 1..4096, got 4160")
    assert DecodeSchedule.next_block((128, 128), 128).num_forwards == 255
