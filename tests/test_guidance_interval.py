"""Guidance that stops after some codes: per position, so that windows, chains and trees keep next-token's codes."""

import pytest
import torch

import vargen
from tests.enumeration import shared_noise_law, table_law, total_variation
from tests.toys import LinedBackbone, SpatialBackbone, perturbed
from tests.tree_toys import TreeTabular
from vargen import NextTokenSampler, SpeculativeJacobiSampler, SpeculativeSampler

GUIDED = {"guidance_scale": 3.0}


class Stopped(TreeTabular):
    """A model whose second branch is the first from code ``interval + 2`` on: what an interval must come to."""

    def __init__(self, *args, interval, **kwargs):
        super().__init__(*args, **kwargs)
        self.interval = interval

    def law(self, labels, branch, cache, slots):
        both = [super(Stopped, self).law(labels, b, cache, slots) for b in (branch, 0)]
        return torch.where((slots > self.interval + 1)[..., None], both[1], both[0])


@pytest.mark.parametrize("interval", [0, 1, 3, 99])
def test_later_codes_follow_the_conditional_branch(interval):
    plain, stopped = TreeTabular(3, (2, 3)), Stopped(3, (2, 3), interval=interval)
    labels = torch.arange(2).repeat(16)
    cut = NextTokenSampler(**GUIDED, guidance_interval=interval).sample(plain, labels, seeds=range(32)).codes
    assert torch.equal(cut, NextTokenSampler(**GUIDED).sample(stopped, labels, seeds=range(32)).codes)
    whole = NextTokenSampler(**GUIDED).sample(plain, labels, seeds=range(32)).codes
    assert torch.equal(cut, whole) == (interval == 99)
    assert torch.equal(cut[:, : interval + 2], whole[:, : interval + 2])


@pytest.mark.parametrize("interval", [0, 2])
@pytest.mark.parametrize(
    "sampler",
    [
        SpeculativeJacobiSampler(window=4, **GUIDED),
        SpeculativeJacobiSampler(window="auto", **GUIDED),
        SpeculativeJacobiSampler(window=[1, 2, 1, 3, 2, 2], **GUIDED),
        SpeculativeSampler(num_draft_tokens=3, **GUIDED),
        SpeculativeSampler(num_draft_tokens="auto", **GUIDED),
        SpeculativeSampler(tree="mc_sim_7b_63", **GUIDED),
        SpeculativeSampler(tree="dynamic", depth=3, branching=2, num_draft_tokens=5, **GUIDED),
        vargen.DraftedJacobiSampler(window=4, **GUIDED),
    ],
    ids=str,
)
def test_windows_chains_and_trees_keep_the_codes(sampler, interval):
    backbone, drafter = TreeTabular(3, (2, 3)), TreeTabular(3, (2, 3), spread=1.0)
    labels = torch.arange(2).repeat(8)
    for forced in (None, torch.tensor([-1, 2, -1, -1, 0, -1])):
        options = {"seeds": range(16), "forced_codes": forced}
        expected = NextTokenSampler(**GUIDED, guidance_interval=interval).sample(backbone, labels, **options)
        given = {} if isinstance(sampler, SpeculativeJacobiSampler) else {"drafter": drafter}
        out = sampler.replace(guidance_interval=interval).sample(backbone, labels, **options, **given)
        assert torch.equal(out.codes, expected.codes)


def test_drafts_stop_being_guided_as_well():
    """A perfect chain of the target itself is kept whole, which it would not be if its rows were guided."""
    backbone = SpatialBackbone(16, (4, 5))
    sampler = SpeculativeSampler(num_draft_tokens=6, rule="rejection", guidance_interval=3, **GUIDED)
    out = sampler.sample(backbone, torch.zeros(4).long(), seeds=range(4), drafter=perturbed(backbone, 0.0))
    assert out.stats.num_forwards == 1 + -(-19 // 7)


def test_enumeration():
    plain, stopped = TreeTabular(2, (1, 5)), TreeTabular(2, (1, 5))
    later = stopped.first[3]  # prefixes of three codes and more
    stopped.table[:, 1, later:] = stopped.table[:, 0, later:]
    told = TreeTabular(2, (1, 5))
    told.logits_after = stopped.logits_after  # where the enumeration cuts the noise
    for sampler in (SpeculativeJacobiSampler(window=3, **GUIDED), NextTokenSampler(**GUIDED)):
        law = shared_noise_law(sampler.replace(guidance_interval=1), told)
        assert total_variation(law, table_law(stopped, sampler)) < 1e-12
        assert total_variation(law, table_law(plain, sampler)) > 1e-3  # the control


def test_structural_slots_are_not_counted():
    backbone = LinedBackbone(3, (3, 2), seed=5)
    sampler = NextTokenSampler(**GUIDED)
    whole = sampler.sample(backbone, torch.zeros(64).long(), seeds=range(64)).codes
    cut = sampler.replace(guidance_interval=2).sample(backbone, torch.zeros(64).long(), seeds=range(64)).codes
    assert torch.equal(cut[:, :4], whole[:, :4])
    assert not torch.equal(cut[:, 4], whole[:, 4])


@pytest.mark.parametrize("settings", [{"window": 4}, {"window": "auto"}], ids=str)
def test_the_order_of_the_filters_is_that_of_every_sampler(settings):
    filters = {"top_k": 3, "top_p": 0.6, "temperature": 1.5, "top_p_first": True}
    backbone, labels, seeds = SpatialBackbone(16, (4, 5)), torch.zeros(32).long(), range(32)
    expected = NextTokenSampler(**filters).sample(backbone, labels, seeds=seeds).codes
    assert torch.equal(
        SpeculativeJacobiSampler(**settings, **filters).sample(backbone, labels, seeds=seeds).codes, expected
    )
    drafted = SpeculativeSampler(num_draft_tokens=3, **filters)
    assert torch.equal(drafted.sample(backbone, labels, seeds=seeds, drafter=perturbed(backbone, 0.3)).codes, expected)
    other = NextTokenSampler(**{**filters, "top_p_first": False}).sample(backbone, labels, seeds=seeds).codes
    assert not torch.equal(other, expected)


def test_bad_interval():
    with pytest.raises(ValueError, match=r"guidance_interval must be an integer at least -1.*-1 is always"):
        NextTokenSampler(guidance_interval=-2)
