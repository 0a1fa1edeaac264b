"""The window decoder: ragged commits, compaction, forced slots, streaming, what the statistics say."""

import copy

import pytest
import torch

from tests.enumeration import chi_square_p, table_law
from tests.toys import LinedBackbone, SpatialBackbone, TabularBackbone, perturbed
from vargen.samplers.window import decoder as window_module
from vargen.samplers.window.draft_model import DraftModelSampler
from vargen.samplers.window.drafted_jacobi import DraftedJacobiSampler
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.lantern import LanternSampler
from vargen.samplers.window.next_token import NextTokenSampler

CARRIES = ["gumbel", "maximal", "independent"]


def zeros(n):
    return torch.zeros(n, dtype=torch.int64)


@pytest.mark.parametrize("carry", CARRIES)
def test_statistics_agree_with_what_was_done(carry):
    backbone = SpatialBackbone(32, (4, 6))
    out = SpeculativeJacobiSampler(window=6, carry=carry).sample(backbone, zeros(5), seeds=range(5))
    trace, stats = out.stats.commit_trace, out.stats
    assert stats.num_forwards == backbone.num_forwards
    assert torch.equal(stats.forwards_per_image, trace[:, -1] + 1)
    assert stats.num_forwards == int(stats.forwards_per_image.max())
    assert bool((trace.diff(dim=1) >= 0).all()), "codes become permanent from left to right"
    assert bool((trace[:, 0] == 0).all()), "the prefill decides the first code"
    for row in trace:  # every forward until the image is complete commits at least one code and at most W
        counts = torch.bincount(row)
        assert counts.min() >= 1
        assert counts.max() <= 6
        assert counts[0] == 1
    assert len(set(stats.forwards_per_image.tolist())) > 1, "the batch is not ragged, so this test shows little"
    assert stats.tokens_per_forward(24) == pytest.approx(24 / stats.forwards_per_image.double().mean().item())


def test_finished_images_leave_the_batch():
    backbone = SpatialBackbone(32, (4, 6))
    sampler, rows = SpeculativeJacobiSampler(window=6), []
    for state in sampler.stream(backbone, zeros(6), seeds=range(6)):
        if not state.done:
            complete = (state.codes >= 0).all(1)
            assert state.rows.tolist() == (~complete).nonzero().flatten().tolist()
            assert len(state.session.length) == len(state.length) == len(state.rows)
        rows.append(len(state.rows))
    assert rows[0] == 6
    assert rows[-1] < 6
    # work is that of the images still decoded, and no window reaches past what the longest of them needs
    assert backbone.num_rows < 6 * (backbone.num_forwards - 1) * 6


@pytest.mark.parametrize("carry", CARRIES)
def test_an_image_depends_on_its_seed_only(carry):
    backbone, sampler = SpatialBackbone(64, (4, 5)), SpeculativeJacobiSampler(window=7, carry=carry, top_k=20)
    seeds = [9, 2**63 + 1, 3, 12, 5]
    together = sampler.sample(backbone, zeros(5), seeds=seeds)
    order = [3, 0, 4, 2, 1]
    shuffled = sampler.sample(backbone, zeros(5), seeds=[seeds[i] for i in order])
    assert torch.equal(shuffled.codes, together.codes[order])
    assert torch.equal(shuffled.stats.commit_trace, together.stats.commit_trace[order])
    for chunk in ([0], [1], [2, 3, 4]):
        part = sampler.sample(backbone, zeros(len(chunk)), seeds=[seeds[i] for i in chunk])
        assert torch.equal(part.codes, together.codes[chunk])
        assert torch.equal(part.stats.commit_trace, together.stats.commit_trace[chunk])


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("init", ["uniform", "repeat_left", "repeat_above"])
def test_a_run_goes_on_from_any_state(carry, init):
    backbone = SpatialBackbone(16, (3, 4))
    sampler = SpeculativeJacobiSampler(window=5, carry=carry, init=init)
    expected = sampler.sample(backbone, zeros(3), seeds=[1, 2, 3])
    parked = [copy.deepcopy(state) for state in sampler.stream(backbone, zeros(3), seeds=[1, 2, 3])]
    assert len(parked) == expected.stats.num_forwards
    for state in parked:
        while not state.done:
            state = sampler.step(state)
        out = sampler.finish(state)
        assert torch.equal(out.codes, expected.codes)
        assert torch.equal(out.stats.commit_trace, expected.stats.commit_trace)


def test_a_step_beyond_the_end_does_nothing():
    backbone, sampler = TabularBackbone(3), SpeculativeJacobiSampler(window=4)
    *_, state = sampler.stream(backbone, zeros(2), seeds=[1, 2])
    forwards = backbone.num_forwards
    assert sampler.step(state) is state
    assert backbone.num_forwards == forwards


@pytest.mark.parametrize("carry", CARRIES)
def test_the_callback_sees_only_what_stays(carry):
    seen = []
    sampler = SpeculativeJacobiSampler(window=4, carry=carry)
    out = sampler.sample(
        SpatialBackbone(8, (3, 4)),
        zeros(3),
        seeds=[1, 2, 3],
        callback=lambda step, state: seen.append((step, state.codes.clone(), state.num_committed.clone())),
    )
    assert [step for step, _, _ in seen] == list(range(out.stats.num_forwards))
    for step, codes, committed in seen:
        there = out.stats.commit_trace <= step
        assert torch.equal(codes, torch.where(there, out.codes, -1))
        assert torch.equal(committed, there.sum(1))


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("window", [1, 2, 5, 32])
def test_forced_positions_inside_the_window(carry, window):
    backbone = TabularBackbone(3, (1, 5), seed=2)
    forced = torch.tensor([-1, 2, -1, 0, -1])
    sampler = SpeculativeJacobiSampler(window=window, carry=carry)
    codes = sampler.sample(backbone, zeros(6000), seeds=range(6000), forced_codes=forced).codes
    # the law of a free code is the table's, given everything before it, the forced codes included
    law = {(): 1.0}
    for n in range(5):
        table = lambda x: backbone.logits_after(0, x)[0].double().softmax(-1).tolist()  # noqa: E731
        law = {
            (*x, v): w * (p if forced[n] < 0 else 1.0)
            for x, w in law.items()
            for v, p in enumerate(table(x))
            if forced[n] in (-1, v)
        }
    assert chi_square_p(codes, law) > 1e-4


def test_forced_codes_may_differ_between_images_and_a_known_prefix_costs_few_forwards():
    backbone = SpatialBackbone(64, (4, 6))
    whole = NextTokenSampler().sample(backbone, zeros(3), seeds=[1, 2, 3]).codes
    forced = torch.where(torch.arange(24) < 18, whole, -1)
    for carry in CARRIES:
        out = SpeculativeJacobiSampler(window=6, carry=carry).sample(
            backbone, zeros(3), seeds=[1, 2, 3], forced_codes=forced
        )
        assert torch.equal(out.codes[:, :18], whole[:, :18])
        # 17 codes behind the prefill, up to six at a time
        assert bool((out.stats.commit_trace[:, 17] <= 3).all())
        if carry == "gumbel":
            assert torch.equal(out.codes, whole)


@pytest.mark.parametrize(
    "sampler",
    [
        *(SpeculativeJacobiSampler(window=6, carry=carry) for carry in CARRIES),
        DraftModelSampler(num_drafts=3, carry="independent"),
        DraftedJacobiSampler(window=6),
        LanternSampler(relaxation="none", depth=4),
    ],
    ids=str,
)
def test_forced_codes_stay_with_their_image_when_others_leave(sampler):
    """Dies here: forced codes that are not selected with the images that are left."""
    backbone, seeds = SpatialBackbone(32, (4, 6)), range(8)
    drafter = perturbed(backbone, 0.3)
    generator = torch.Generator().manual_seed(0)
    forced = torch.randint(32, (8, 24), generator=generator)
    forced = torch.where(torch.rand(8, 24, generator=generator) < torch.linspace(0.9, 0.2, 8)[:, None], forced, -1)
    together = sampler.sample(backbone, zeros(8), seeds=seeds, forced_codes=forced, drafter=drafter)
    assert torch.equal(together.codes[forced >= 0], forced[forced >= 0])
    assert together.stats.forwards_per_image[0] < together.stats.forwards_per_image.max()  # rows move up
    for i in (0, 3, 7):
        alone = sampler.sample(backbone, zeros(1), seeds=[i], forced_codes=forced[i], drafter=drafter)
        assert torch.equal(alone.codes[0], together.codes[i])


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("init", ["uniform", "repeat_left", "repeat_above"])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_structural_slots_are_walked_over(carry, init, window):
    lined = LinedBackbone(3, (2, 2), seed=5)
    sampler = SpeculativeJacobiSampler(window=window, carry=carry, init=init)
    out = sampler.sample(lined, zeros(6000), seeds=range(6000))
    assert out.codes.shape == (6000, 4)
    assert chi_square_p(out.codes, table_law(lined, sampler)) > 1e-4
    if carry == "gumbel":  # the noise belongs to the code, wherever it stands in the stream
        plain = NextTokenSampler().sample(TabularBackbone(3, (2, 2), seed=5), zeros(6000), seeds=range(6000))
        assert torch.equal(out.codes, plain.codes)


def test_a_window_wider_than_the_image():
    backbone = TabularBackbone(3, (1, 4))
    for carry in CARRIES:
        out = SpeculativeJacobiSampler(window=100, carry=carry).sample(backbone, zeros(50), seeds=range(50))
        assert bool((out.codes >= 0).all())
        assert out.stats.num_forwards <= 4


@pytest.mark.parametrize("window", [3, 6, 40])
@pytest.mark.parametrize("carry", CARRIES)
def test_fixed_shapes_and_rare_looks_change_nothing(carry, window, monkeypatch):
    """What a GPU gets: the same window in every iteration, finished images decoded on until the next look."""
    backbone, samplers = SpatialBackbone(32, (4, 6)), [SpeculativeJacobiSampler(window=window, carry=carry)]
    if carry != "maximal":
        samplers.append(DraftModelSampler(num_drafts=window - 1, carry=carry))
    if carry == "gumbel":
        samplers.append(DraftedJacobiSampler(window=window))
    given = {"seeds": range(5), "drafter": perturbed(backbone, 0.3)}
    expected = [sampler.sample(backbone, zeros(5), **given) for sampler in samplers]
    monkeypatch.setattr(window_module, "looking_is_free", lambda device: False)
    for sampler, wanted in zip(samplers, expected, strict=True):
        out, widths = sampler.sample(backbone, zeros(5), **given), set()
        assert torch.equal(out.codes, wanted.codes)
        assert torch.equal(out.stats.commit_trace, wanted.stats.commit_trace)
        assert (
            wanted.stats.num_forwards <= out.stats.num_forwards <= wanted.stats.num_forwards + window_module.POLL_EVERY
        )
        widths.update(state.width for state in sampler.stream(backbone, zeros(5), **given))
        assert len(widths) == 1
