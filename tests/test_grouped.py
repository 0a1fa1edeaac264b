"""Grouped speculative decoding: fewer forwards, another law, and a bound that says how far it can be."""

import pytest
import torch

from tests.toys import SpatialBackbone, TabularBackbone
from vargen.samplers.window.grouped import GroupedSpeculativeSampler
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler


def zeros(n):
    return torch.zeros(n, dtype=torch.int64)


def speed(sampler):
    out = sampler.sample(SpatialBackbone(), zeros(8), seeds=range(8))
    return out.stats.tokens_per_forward(256)


@pytest.mark.slow
@pytest.mark.parametrize("carry", ["independent", "maximal"])
def test_larger_groups_accept_more(carry):
    settings = {"top_k": 128, "window": 16, "carry": carry}
    exact = speed(SpeculativeJacobiSampler(**settings))
    small = speed(GroupedSpeculativeSampler(group_size=4, distance_threshold=None, **settings))
    large = speed(GroupedSpeculativeSampler(group_size=50, distance_threshold=None, **settings))
    assert large > small > exact


def test_a_group_of_one_is_the_exact_rule():
    """With a threshold of 0 no other code joins the group, so that codes and statistics are the exact sampler's."""
    backbone, settings = SpatialBackbone(32, (4, 5)), {"window": 6, "carry": "maximal"}
    grouped = GroupedSpeculativeSampler(prob_threshold=0.0, **settings).sample(backbone, zeros(5), seeds=range(5))
    exact = SpeculativeJacobiSampler(**settings).sample(backbone, zeros(5), seeds=range(5))
    assert torch.equal(grouped.codes, exact.codes)
    assert torch.equal(grouped.stats.commit_trace, exact.stats.commit_trace)
    assert grouped.stats.guarantee == "heuristic"


def test_distant_codes_leave_the_group():
    backbone = TabularBackbone(16, (1, 3))  # its embedding of code c is the number c
    settings = {"window": 3, "prob_threshold": 1.0}
    far = GroupedSpeculativeSampler(distance_threshold=0.5, **settings)  # neighbours lie at distance 1
    alone = GroupedSpeculativeSampler(distance_threshold=None, prob_threshold=0.0, window=3)
    everyone = GroupedSpeculativeSampler(distance_threshold=None, **settings)

    def run(sampler):
        return sampler.sample(backbone, zeros(200), seeds=range(200)).codes

    assert torch.equal(run(far), run(alone))
    assert not torch.equal(run(everyone), run(alone))


def test_codes_that_top_k_removed_stay_out():
    backbone = TabularBackbone(64, (1, 3), spread=0.1)
    sampler = GroupedSpeculativeSampler(window=3, top_k=32, prob_threshold=1.0, distance_threshold=None)
    for first, second, _ in sampler.sample(backbone, zeros(300), seeds=range(300)).codes.tolist():
        law = backbone.logits_after(0, (first,))[0]
        assert law[second] >= law.topk(32).values[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 3}, "group_size must be even, got 3; try 4"),
        ({"group_size": 0}, "group_size must be an integer in 2..4096, got 0"),
        ({"prob_threshold": -0.1}, "prob_threshold must be at least 0"),
        ({"distance_threshold": -1}, "distance_threshold must be at least 0"),
        ({"carry": "gumbel"}, "rule must be one of independent, maximal"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GroupedSpeculativeSampler(**settings)
