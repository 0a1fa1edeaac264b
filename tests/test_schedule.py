"""Decode schedules: what the builders promise, and that validation finds every kind of mistake."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vargen.orders import neighbors
from vargen.protocols import Item
from vargen.samplers.schedule.orders import GROWTHS, ORDERS, group_sizes, local_order, make_order, region_order
from vargen.samplers.schedule.schedule import DecodeSchedule

SIDES = st.integers(1, 6)
# the lists of nar_nbp.md, from the released code
COSINE_32 = "1,1,1,2,3,4,3,5,5,6,6,7,7,8,8,8,10,9,10,10,11,11,11,12,11,12,12,13,12,12,13,12"
ARCCOS_32 = "6,5,5,5,5,5,5,6,5,5,6,5,6,5,6,6,6,6,6,7,6,7,7,8,8,8,9,10,11,14,17,40"


def check(schedule, num_forwards):
    """Valid, every code once, the promised number of passes; returns the schedule."""
    schedule.validate()
    assert schedule.num_forwards == num_forwards
    assert sorted(schedule.order.tolist()) == list(range(schedule.prefix, schedule.num_codes))
    assert sum(schedule.group_sizes) == schedule.num_codes - schedule.prefix
    inverse = schedule.inverse()
    assert (inverse[schedule.order] == torch.arange(len(schedule.order))).all()
    return schedule


@settings(deadline=None, max_examples=25)
@given(height=SIDES, width=SIDES, num_condition=st.integers(1, 4))
def test_raster_and_diagonals(height, width, num_condition):
    grid = (height, width)
    raster = check(DecodeSchedule.raster(grid, num_condition), height * width)
    assert raster.order.tolist() == list(range(height * width))
    schedule = check(DecodeSchedule.nar2d(grid, num_condition), height + width - 1)
    for d, step in enumerate(schedule.steps):
        rows, columns = step.targets // width, step.targets % width
        assert (rows + columns == d).all()
        assert rows.tolist() == sorted(rows.tolist())  # top right first


@settings(deadline=None, max_examples=15)
@given(frames=st.integers(1, 4), height=st.integers(1, 4), width=st.integers(1, 4))
def test_planes_of_a_video(frames, height, width):
    schedule = check(DecodeSchedule.nar3d((frames, height, width)), frames + height + width - 2)
    for d, step in enumerate(schedule.steps):
        t, rest = step.targets // (height * width), step.targets % (height * width)
        assert (t + rest // width + rest % width == d).all()
        assert step.targets.tolist() == sorted(step.targets.tolist())  # t ascending, then h


@settings(deadline=None, max_examples=20)
@given(side=st.integers(2, 4), rows=st.integers(1, 3), columns=st.integers(1, 3), num_condition=st.integers(1, 3))
def test_regions(side, rows, columns, num_condition):
    grid, size = (side * rows, side * columns), side * side
    num_groups = rows * columns
    schedule = check(DecodeSchedule.par(grid, size, num_condition), size + num_groups - 1)
    assert schedule.group_sizes == (1,) * size + (size,) * (num_groups - 1)
    first = schedule.order[:size].tolist()
    assert first == [a * rows * grid[1] + b * columns for a in range(side) for b in range(side)]


@settings(deadline=None, max_examples=20)
@given(num_blocks=st.integers(1, 6), block=st.integers(1, 6), num_condition=st.integers(1, 4), data=st.data())
def test_blocks(num_blocks, block, num_condition, data):
    grid = (num_blocks, block)
    check(DecodeSchedule.next_row(grid, num_condition), num_blocks + block - 1)
    if num_blocks > 1:
        known = data.draw(st.integers(1, num_blocks - 1))
        schedule = DecodeSchedule.next_block(grid, block, num_condition, prefix=known * block)
        check(schedule, num_blocks - known)
        assert schedule.steps[0].targets.tolist() == list(range(known * block, (known + 1) * block))


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    num_condition=st.integers(1, 3),
    style=st.sampled_from(["randar", "lpd", "arpg"]),
    growth=st.sampled_from(GROWTHS),
    data=st.data(),
)
def test_any_order_groups(height, width, num_condition, style, growth, data):
    num_codes = height * width
    sizes = group_sizes(num_codes, data.draw(st.integers(1, num_codes)), growth)
    order = data.draw(st.permutations(range(num_codes)))
    schedule = check(DecodeSchedule.groups((height, width), order, sizes, num_condition, style), len(sizes))
    assert schedule.group_sizes == sizes
    assert schedule.order.tolist() == order


def test_visibility_follows_the_table_of_the_methods():
    """tau and nu of nar_nbp.md d.1, method by method."""
    nar = DecodeSchedule.nar2d((3, 3), 2)
    assert nar.steps[0].tau.tolist() == [0, 1]
    assert [step.tau.unique().tolist() for step in nar.steps[1:]] == [[2], [3], [4], [5]]
    par = DecodeSchedule.par((4, 4), 4)
    assert [step.tau.unique().tolist() for step in par.steps] == [[0], [1], [2], [3], [4], [5], [6]]
    assert par.steps[4].kinds.tolist() == [Item.CODE, *[Item.SPECIAL] * 3]
    hybrid = DecodeSchedule.next_block((3, 4), 4, num_condition=9)  # eight words and the begin-of-video token
    assert hybrid.steps[0].tau.tolist() == [0] * 8 + [1]
    assert [step.tau.unique().tolist() for step in hybrid.steps[1:]] == [[2], [3], [4], [5], [6]]
    randar = DecodeSchedule.groups((2, 3), range(6), (1, 2, 3))
    assert [step.slots.tolist() for step in randar.steps] == [[0, 1], [2, 3, 4], [4, 5, 6, 7, 8, 9]]
    assert [len(step.kinds) for step in randar.steps] == [2, 1 + 2, 2 * 2 - 1 + 3]  # 2a - 1 + b behind the first
    lpd = DecodeSchedule.groups((2, 3), range(6), (1, 2, 3), style="lpd")
    assert [step.nu.tolist() for step in lpd.steps] == [[0, 1], [1, 2, 2], [2, 2, 3, 3, 3]]
    assert lpd.steps[1].commit.tolist() == [True, False, False]
    arpg = DecodeSchedule.groups((2, 3), range(6), (1, 2, 3), style="arpg")
    assert [step.slots.tolist() for step in arpg.steps] == [[0, -1], [1, -1, -1], [2, 3, -1, -1, -1]]
    assert [step.nu.tolist() for step in arpg.steps] == [[0, 0], [1, 1, 1], [2, 2, 2, 2, 2]]


def test_neighbors_of_images_and_videos():
    positions, weights = neighbors((2, 3))
    assert positions[:, 4].tolist() == [3, 1]  # left, above
    assert weights[:, 4].tolist() == [0.5, 0.5]
    assert weights[:, 1].tolist() == [1.0, 0.0]
    assert positions[:, 0].tolist() == [-1, -1]
    positions, weights = neighbors((2, 2, 2))
    assert positions[:, 7].tolist() == [6, 5, 3]
    torch.testing.assert_close(weights.sum(0), torch.ones(8))
    # the schedule mixes what the table says
    step = DecodeSchedule.nar2d((3, 3)).steps[3]  # reads 2, 4, 6; draws 5, 7
    assert step.targets.tolist() == [5, 7]
    assert step.mix[0].tolist() == [[0, 0.5, 0], [0, 0, 0.5]]
    assert step.mix[1].tolist() == [[0.5, 0, 0], [0, 0.5, 0]]


def test_group_sizes_are_those_of_the_released_code():
    assert ",".join(map(str, group_sizes(256, 32, "cosine"))) == COSINE_32
    assert ",".join(map(str, group_sizes(256, 32, "arccos"))) == ARCCOS_32
    assert region_order((6, 6), 4)[:16].tolist() == [0, 3, 18, 21, 1, 4, 19, 22, 2, 5, 20, 23, 6, 9, 24, 27]


@settings(deadline=None, max_examples=30)
@given(num_codes=st.integers(1, 80), growth=st.sampled_from(GROWTHS), data=st.data())
def test_group_sizes_sum_up(num_codes, growth, data):
    num_groups = data.draw(st.integers(1, num_codes))
    sizes = group_sizes(num_codes, num_groups, growth)
    assert (len(sizes), sum(sizes), min(sizes) >= 1) == (num_groups, num_codes, True)


def test_orders_are_permutations_and_local_groups_lie_apart():
    sizes = group_sizes(64, 12)
    for name in ORDERS:
        order = make_order(name, (8, 8), 3, sizes)
        assert sorted(order.tolist()) == list(range(64))
    assert not torch.equal(make_order("random", (8, 8), 1), make_order("random", (8, 8), 2))
    order = local_order((8, 8), sizes, seed=1)
    apart = []
    start = sizes[0]
    for size in sizes[1:6]:
        cells = torch.stack([order[start : start + size] // 8, order[start : start + size] % 8], 1)
        gaps = (cells[:, None] - cells).abs().amax(-1)[~torch.eye(size, dtype=torch.bool)]
        apart += gaps.tolist()
        start += size
    assert min(apart) > 2  # the repulsion radius
    recorded = [3, 4, 15, 0, 9, 16, 1, 18, 7, 2, 8, 10, 5, 6, 11, 12, 13, 14, 17, 19]
    assert local_order((4, 5), (1, 3, 6, 10), 1).tolist() == recorded
    with pytest.raises(ValueError, match="sum to 64"):
        local_order((8, 8), (1, 2))
    with pytest.raises(ValueError, match="order must be one of random"):
        make_order("spiral", (2, 2))


def broken(**changes):
    """nar2d on 3x3 with step 2 changed."""
    schedule = DecodeSchedule.nar2d((3, 3))
    steps = list(schedule.steps)
    steps[2] = replace(steps[2], **{name: change(getattr(steps[2], name)) for name, change in changes.items()})
    return replace(schedule, steps=tuple(steps))


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (broken(targets=lambda t: torch.tensor([0, 4, 6])), "step 2: draws code 0 twice"),
        (broken(targets=lambda t: torch.tensor([2, 4, 4])), "step 2: draws code positions twice"),
        (broken(targets=lambda t: t + 9), r"targets must lie in 0..8"),
        (broken(index=lambda i: i + 4), "reads code 5, which is not drawn yet"),
        (broken(index=lambda i: i * 0 + 9), r"code items must lie in 0..8"),
        (broken(slots=lambda s: s * 0 + 1), "slot 1 is written twice"),
        (broken(slots=lambda s: s + 90), r"slot 93 is outside 0..9"),
        (broken(mix=lambda m: m * 2), "the weights of code 2 do not sum to 1"),
        (broken(mix=lambda m: m[:, :2]), r"mix must have shape \[heads, 3, 2\]"),
        (broken(nu=lambda n: n - 1), r"does not see its own stamp"),
        (broken(tau=lambda t: t * 0, nu=lambda n: n), "stamp 0 is earlier than 1"),
        (broken(commit=lambda c: c[:1]), "commit must have 2 entries"),
        (broken(kinds=lambda k: k * 0 + 7), "kinds must lie in 0..3"),
        (replace(DecodeSchedule.nar2d((3, 3)), num_condition=2), "step 0: must hold all 2 condition positions"),
        (replace(DecodeSchedule.nar2d((3, 3)), num_slots=0), "has no cache"),
        (replace(DecodeSchedule.nar2d((3, 3)), steps=DecodeSchedule.nar2d((3, 3)).steps[:-1]), "never draws code 8"),
        (replace(DecodeSchedule.nar2d((3, 3)), steps=()), "has no steps"),
    ],
)
def test_validation_finds(schedule, words):
    with pytest.raises(ValueError, match=words) as caught:
        schedule.validate()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: DecodeSchedule.par((6, 6), 5), "group_size must be the square of a number that divides both sides"),
        (lambda: DecodeSchedule.par((6, 5), 4), "divides both sides of the grid"),
        (lambda: DecodeSchedule.nar2d((2, 3, 4)), "videos: nar3d"),
        (lambda: DecodeSchedule.nar3d((3, 4)), "nar3d needs a grid_size of"),
        (lambda: DecodeSchedule.next_block((4, 4), 5), "block must divide the 16 codes"),
        (lambda: DecodeSchedule.next_block((4, 4), 4, prefix=6), "whole blocks of 4"),
        (lambda: DecodeSchedule.next_block((4, 4), 4, 0), "num_condition must be an integer in 1.."),
        (lambda: DecodeSchedule.maskgit((4, 4), 17), "num_steps must be an integer in 1..16"),
        (lambda: DecodeSchedule.groups((2, 2), [0, 1, 2, 2], (4,)), "each of the 4 positions once"),
        (lambda: DecodeSchedule.groups((2, 2), range(4), (1, 2)), "sum to 4, got a sum of 3"),
        (lambda: DecodeSchedule.groups((2, 2), range(4), (4,), style="maskgit"), "style must be one of"),
        (lambda: group_sizes(16, 17), "num_groups must be an integer in 1..16"),
        (lambda: group_sizes(16, 4, "fast"), "growth must be one of"),
    ],
)
def test_builders_refuse(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_masked_passes_share_one_step_and_move_to_devices_together():
    schedule = DecodeSchedule.maskgit((3, 3), 5, 2)
    schedule.validate()
    assert schedule.num_forwards == 5
    assert schedule.revising
    moved = schedule.to("meta")
    assert len({id(step) for step in moved.steps}) == 1
    assert moved.steps[0].slots.device.type == "meta"
    assert schedule.to("cpu") is schedule


def test_thirty_one_forwards_against_256():
    assert DecodeSchedule.nar2d((16, 16)).num_forwards == 31
    assert DecodeSchedule.raster((16, 16)).num_forwards == 256
    assert DecodeSchedule.par((16, 16), 4).num_forwards == 67
    assert DecodeSchedule.par((24, 24), 16).num_forwards == 51
    assert DecodeSchedule.nar3d((4, 16, 16)).num_forwards == 34
    assert DecodeSchedule.next_row((5, 16, 16), 9).num_forwards == 95
    assert DecodeSchedule.next_row((5, 16, 16), 0, prefix=512).num_forwards == 48
    assert math.prod(DecodeSchedule.nar2d((16, 16)).grid_size) == 256
