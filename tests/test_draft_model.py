"""Speculative sampling with a draft model: exact for every drafter, fast for a good one."""

import pytest
import torch

from tests.enumeration import chi_square_p, shared_noise_law, table_law, total_variation
from tests.toys import LinedBackbone, SpatialBackbone, TabularBackbone, perturbed
from vargen.random import Stream
from vargen.samplers.drafters import chain
from vargen.samplers.window.draft_model import DraftModelSampler
from vargen.samplers.window.drafted_jacobi import DraftedJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler

EXACT_COPIES = [
    DraftModelSampler(num_drafts=1),
    DraftModelSampler(num_drafts=3),
    DraftModelSampler(num_drafts=30),
    DraftedJacobiSampler(window=1),
    DraftedJacobiSampler(window=2, num_sweeps=1),
    DraftedJacobiSampler(window=6, num_sweeps=2),
    DraftedJacobiSampler(window=32, num_sweeps=3, strength=1.0),
]
SETTINGS = [{}, {"guidance_scale": 2.0, "top_k": 20}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0}]


def zeros(n):
    return torch.zeros(n, dtype=torch.int64)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "plain")
@pytest.mark.parametrize("sampler", EXACT_COPIES, ids=str)
def test_shared_noise_gives_the_codes_of_next_token_sampling(sampler, settings):
    backbone = SpatialBackbone(64, (4, 6))
    expected = NextTokenSampler(**settings).sample(backbone, zeros(4), seeds=[7, 8, 9, 2**64 - 1]).codes
    for drafter in (backbone, perturbed(backbone, 0.3), SpatialBackbone(64, (4, 6), seed=5)):  # perfect, good, useless
        out = sampler.replace(**settings).sample(backbone, zeros(4), seeds=[7, 8, 9, 2**64 - 1], drafter=drafter)
        assert torch.equal(out.codes, expected)
        assert out.stats.guarantee == "exact"


@pytest.mark.parametrize("sampler", [DraftModelSampler(num_drafts=3), DraftedJacobiSampler(window=3)], ids=str)
def test_shared_noise_is_exact(sampler, monkeypatch):
    backbone, drafter = TabularBackbone(2, (1, 5)), TabularBackbone(2, (1, 5), seed=9)
    sample = type(sampler).sample
    monkeypatch.setattr(type(sampler), "sample", lambda *a, **k: sample(*a, **k, drafter=drafter))
    assert total_variation(shared_noise_law(sampler, backbone), table_law(backbone, sampler)) < 1e-12


def ratio_p(drafter, **settings):
    backbone = TabularBackbone(3, (2, 3), digits=1)
    sampler = DraftModelSampler(num_drafts=3, carry="independent", **settings)
    labels = torch.ones(20_000, dtype=torch.int64)
    out = sampler.sample(backbone, labels, seeds=range(20_000), drafter=drafter)
    return chi_square_p(out.codes, table_law(backbone, sampler, label=1))


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.3, 1.2, 3.0])
@pytest.mark.parametrize(
    "settings", [{}, {"guidance_scale": 2.0, "top_k": 2}, {"temperature": 0.7, "top_p": 0.8}], ids=str
)
def test_the_ratio_test_follows_the_law(settings, spread):
    p = ratio_p(TabularBackbone(3, (2, 3), seed=1, spread=spread), **settings)
    assert p > 1e-4, f"p = {p:.2g}; a right sampler fails once in 10,000 runs"


def sharper_drafts(patch):
    """Drafts are drawn at another temperature than their label says."""
    draw = chain.draw
    patch.setattr(chain, "draw", lambda *a, **k: draw(*a, **{**k, "temperature": 0.7}))


def label_before_top_k(patch):
    """The probability of a draft is taken before top-k cut its law."""
    warp = chain.warp_logits
    patch.setattr(chain, "warp_logits", lambda logits, **k: warp(logits, **{**k, "top_k": 0}))


def accept_noise(patch):
    """The drafter draws with the numbers of the acceptance test."""
    draw = chain.draw
    patch.setattr(chain, "draw", lambda *a, **k: draw(*a, **{**k, "stream": Stream.ACCEPT}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutate", "settings"), [(sharper_drafts, {}), (label_before_top_k, {"top_k": 2}), (accept_noise, {})]
)
def test_mutants_are_caught(mutate, settings, monkeypatch):
    mutate(monkeypatch)
    assert ratio_p(TabularBackbone(3, (2, 3), seed=1), **settings) < 1e-4


@pytest.mark.parametrize("carry", ["gumbel", "independent"])
def test_a_perfect_drafter_is_always_confirmed(carry):
    backbone = SpatialBackbone(32, (4, 6))
    sampler = DraftModelSampler(num_drafts=5, carry=carry)
    out = sampler.sample(backbone, zeros(3), seeds=[1, 2, 3], drafter=SpatialBackbone(32, (4, 6)))
    assert torch.bincount(out.stats.commit_trace[0]).tolist() == [1, 6, 6, 6, 5]


def test_forwards_of_target_and_drafter_are_counted_apart():
    backbone, drafter = SpatialBackbone(32, (4, 6)), perturbed(SpatialBackbone(32, (4, 6)), 0.3)
    for sampler in (DraftModelSampler(num_drafts=4), DraftedJacobiSampler(window=5, num_sweeps=2)):
        backbone.num_forwards = drafter.num_forwards = 0
        stats = sampler.sample(backbone, zeros(3), seeds=[1, 2, 3], drafter=drafter).stats
        assert stats.num_forwards == backbone.num_forwards
        assert stats.num_drafter_forwards == drafter.num_forwards
    assert stats.num_drafter_forwards == 1 + 3 * (stats.num_forwards - 1)  # two sweeps and one pass over the result


@pytest.mark.parametrize(
    "sampler",
    [
        DraftModelSampler(num_drafts=3),
        DraftModelSampler(num_drafts=3, carry="independent"),
        DraftedJacobiSampler(window=4),
    ],
    ids=str,
)
def test_an_image_depends_on_its_seed_only(sampler):
    backbone, drafter = SpatialBackbone(32, (4, 5)), perturbed(SpatialBackbone(32, (4, 5)), 0.3)
    seeds = [9, 2**63 + 1, 3, 12, 5]
    together = sampler.sample(backbone, zeros(5), seeds=seeds, drafter=drafter)
    for chunk in ([0], [4, 1], [3, 2, 0]):
        part = sampler.sample(backbone, zeros(len(chunk)), seeds=[seeds[i] for i in chunk], drafter=drafter)
        assert torch.equal(part.codes, together.codes[chunk])
        assert torch.equal(part.stats.commit_trace, together.stats.commit_trace[chunk])


@pytest.mark.parametrize("carry", ["gumbel", "independent"])
def test_forced_codes_are_kept(carry):
    backbone, drafter = TabularBackbone(3, (1, 5), seed=2), TabularBackbone(3, (1, 5), seed=4)
    forced = torch.tensor([-1, 2, -1, 0, -1])
    for sampler in (DraftModelSampler(num_drafts=3, carry=carry), DraftedJacobiSampler(window=4)):
        out = sampler.sample(backbone, zeros(500), seeds=range(500), drafter=drafter, forced_codes=forced)
        assert bool((out.codes[:, [1, 3]] == torch.tensor([2, 0])).all())
        expected = NextTokenSampler().sample(backbone, zeros(500), seeds=range(500), forced_codes=forced)
        assert torch.equal(out.codes, expected.codes) == (getattr(sampler, "rule", "shared-noise") == "shared-noise")


def test_structural_slots_are_walked_over():
    lined, drafter = LinedBackbone(3, (2, 2), seed=5), LinedBackbone(3, (2, 2), seed=6)
    drafter.law = lambda *a: LinedBackbone.law(drafter, *a).nan_to_num()  # a drafter is asked at every slot
    expected = NextTokenSampler().sample(lined, zeros(50), seeds=range(50)).codes
    for sampler in (DraftModelSampler(num_drafts=3), DraftedJacobiSampler(window=4)):
        assert torch.equal(sampler.sample(lined, zeros(50), seeds=range(50), drafter=drafter).codes, expected)


@pytest.mark.parametrize("sampler", [DraftModelSampler(), DraftedJacobiSampler()], ids=lambda s: type(s).__name__)
def test_a_missing_or_unfitting_drafter_is_one_clear_line(sampler):
    backbone = TabularBackbone(3)
    for drafter, message in (
        (None, "needs drafter=, a small backbone over the same codes"),
        (TabularBackbone(4), "need the same codebook_size, got 4 and 3"),
        (TabularBackbone(3, (1, 5)), "need the same num_codes, got 5 and 4"),
        (object(), "drafter object lacks ragged, window"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.sample(backbone, zeros(1), seeds=[0], drafter=drafter)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DraftModelSampler(num_drafts=0), "num_draft_tokens must be an integer at least 1"),
        (lambda: DraftModelSampler(carry="maximal"), "rule must be one of shared-noise, rejection"),
        (lambda: DraftedJacobiSampler(num_sweeps=0), "num_sweeps must be an integer in 1..256, got 0"),
        (lambda: DraftedJacobiSampler(strength=1.5), "strength must be at least 0 and at most 1"),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.slow
def test_a_corrected_stale_law_beats_both_of_its_sources():
    backbone = SpatialBackbone()
    drafter, settings = perturbed(backbone, 0.3), {"top_k": 128}  # total variation 0.19

    def speed(sampler):
        out = sampler.sample(backbone, zeros(8), seeds=range(8), drafter=drafter)
        return out.stats.tokens_per_forward(256)

    both = speed(DraftedJacobiSampler(window=32, **settings))
    assert both > 1.5 * speed(DraftedJacobiSampler(window=32, strength=0.0, **settings))  # stale laws alone
    assert both > 1.5 * speed(DraftModelSampler(num_drafts=16, **settings))  # the drafter alone
