"""Drafters without a model: copies, tables of successors and of neighbours, in chains and trees."""

import copy
import math

import pytest
import torch

import vargen
from tests.enumeration import shared_noise_law, table_law, total_variation
from tests.toys import LinedBackbone, SpatialBackbone, TabularBackbone
from tests.tree_toys import TreeSpatial, TreeTabular
from vargen import CopyDrafter, NextTokenSampler, NgramDrafter, SpeculativeSampler, TokenRecyclingDrafter
from vargen.samplers.drafters.lookup import one_each

TREES = [
    {"tree": "chain", "num_draft_tokens": 5},
    {"tree": "siblings", "num_draft_tokens": 2},
    {"tree": "mc_sim_7b_63"},
    {"tree": "dynamic", "num_draft_tokens": 6, "depth": 3, "branching": 2},
]
TABLES = [TokenRecyclingDrafter, NgramDrafter]
SETTINGS = [{}, {"guidance_scale": 2.0, "top_k": 2}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0}]


@pytest.mark.parametrize("make", TABLES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_tables_change_no_code(tree, make):
    """64 seeds in four calls: the table is warm from the second on."""
    backbone = TreeTabular(3, (2, 3))
    drafter = make()
    for settings in SETTINGS:
        labels, seeds = torch.arange(2).repeat(8), range(16)
        for forced in (None, torch.tensor([-1, 2, -1, 0, -1, -1])):
            expected = NextTokenSampler(**settings).sample(backbone, labels, seeds=seeds, forced_codes=forced)
            sampler = SpeculativeSampler(**tree, **settings)
            out = sampler.sample(backbone, labels, seeds=seeds, drafter=drafter, forced_codes=forced)
            assert torch.equal(out.codes, expected.codes)
            assert out.stats.num_forwards <= expected.stats.num_forwards
            assert out.stats.num_drafter_forwards == 0


@pytest.mark.parametrize("make", TABLES, ids=lambda make: make.__name__)
def test_tables_work_between_structural_codes(make):
    backbone = LinedBackbone(3, (3, 4), seed=5)
    labels = torch.zeros(6, dtype=torch.int64)
    expected = NextTokenSampler().sample(backbone, labels, seeds=range(6)).codes
    sampler = SpeculativeSampler(num_draft_tokens=6)  # more than a row
    assert torch.equal(sampler.sample(backbone, labels, seeds=range(6), drafter=make()).codes, expected)


@pytest.mark.parametrize("make", [*TABLES, lambda: CopyDrafter(torch.tensor([1, 0, 1, 1, 0]))])
@pytest.mark.parametrize("tree", TREES[:3], ids=str)
def test_the_distribution_is_the_models(tree, make, monkeypatch):
    backbone, drafter = TreeTabular(2, (1, 5)), make()
    if isinstance(drafter, CopyDrafter) and tree["tree"] != "chain":
        pytest.skip("copies are chains")
    sample = SpeculativeSampler.sample
    monkeypatch.setattr(SpeculativeSampler, "sample", lambda *a, **k: sample(*a, **k, drafter=drafter))
    sampler = SpeculativeSampler(**tree)
    assert total_variation(shared_noise_law(sampler, backbone), table_law(backbone, sampler)) < 1e-12


@pytest.mark.parametrize("rule", ["shared-noise", "rejection"])
@pytest.mark.parametrize("drafts", [1, 3, 7, 29])
def test_a_perfect_source_is_accepted_window_by_window(drafts, rule):
    backbone, labels = SpatialBackbone(16, (6, 5)), torch.zeros(3, dtype=torch.int64)
    wanted = NextTokenSampler(temperature=0.0).sample(backbone, labels, seeds=range(3)).codes
    sampler = SpeculativeSampler(temperature=0.0, rule=rule, num_draft_tokens=drafts)
    out = sampler.sample(backbone, labels, seeds=range(3), drafter=CopyDrafter(wanted))
    assert torch.equal(out.codes, wanted)
    assert out.stats.num_forwards == 1 + math.ceil((30 - 1) / (drafts + 1))  # the prefill brings the first code


def test_a_source_an_image_follows_its_image():
    """Images leave the batch at different times; what is left keeps its own source."""
    backbone, labels = SpatialBackbone(16, (6, 5)), torch.zeros(4, dtype=torch.int64)
    wanted = NextTokenSampler().sample(backbone, labels, seeds=range(4)).codes
    source = wanted.clone()
    source[0] = (source[0] + 1) % 16
    source[2, 10:] = -1
    out = SpeculativeSampler(num_draft_tokens=5).sample(backbone, labels, seeds=range(4), drafter=CopyDrafter(source))
    assert torch.equal(out.codes, wanted)
    alone = SpeculativeSampler(num_draft_tokens=5).sample(
        backbone, labels[:1], seeds=[3], drafter=CopyDrafter(source[3])
    )
    assert out.stats.commit_trace[3].max() == alone.stats.commit_trace[0].max()
    assert alone.stats.num_forwards == 1 + math.ceil(29 / 6)


def test_recycled_codes_are_the_last_ones_that_were_named():
    drafter = TokenRecyclingDrafter(num_successors=2)
    drafter.prepare(4, torch.device("cpu"))
    left, above = torch.tensor([[1, 3]]), torch.tensor([[-1, 0]])
    assert drafter.lookup(left, above).argmax(-1).tolist() == [[1, 3]]  # unknown: itself
    logits = torch.tensor([[[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0], [0.0, 5.0, 4.0, 0.0]]])
    drafter.watch(torch.tensor([[1, -1, 1]]), logits)  # code 1 twice: the later row counts; -1 teaches nothing
    found = drafter.lookup(left, above)[0]
    assert found[0].isfinite().tolist() == [False, True, True, False]
    assert found[0, 1] == 5.0
    assert found[1].argmax() == 3


def test_counts_prefer_what_was_seen_in_the_same_place():
    drafter = NgramDrafter()
    drafter.prepare(5, torch.device("cpu"))

    def guess(left, above):
        return int(drafter.lookup(torch.tensor([[left]]), torch.tensor([[above]])).argmax())

    assert guess(1, 2) == 2
    for code in (4, 3, 3):
        drafter.learn(torch.tensor([code]), torch.tensor([1]), torch.tensor([2]))
    assert guess(1, 2) == 3
    assert guess(1, 0) == 3  # by the left neighbour alone
    assert guess(0, 2) == 3  # by the upper one
    assert guess(1, -1) == 3
    drafter.learn(torch.tensor([-1]), torch.tensor([1]), torch.tensor([2]))  # nothing
    assert guess(1, 2) == 3
    for code in range(4):  # more codes than the table of a context holds
        narrow = NgramDrafter(num_successors=2)
        narrow.prepare(5, torch.device("cpu"))
        for seen in (0, 1, 2, 3, code):
            narrow.learn(torch.tensor([seen]), torch.tensor([1]), torch.tensor([2]))
        assert int(narrow.lookup(torch.tensor([[1]]), torch.tensor([[2]])).argmax()) == code or code < 2


@pytest.mark.parametrize("make", TABLES, ids=lambda make: make.__name__)
def test_a_warm_table_needs_fewer_passes(make):
    backbone, labels = TreeSpatial(32, (6, 6), seed=1), torch.zeros(8, dtype=torch.int64)
    drafter, sampler = make(), SpeculativeSampler(tree="mc_sim_7b_63")
    first = sampler.sample(backbone, labels, seeds=range(8), drafter=drafter)
    again = sampler.sample(backbone, labels, seeds=range(8), drafter=drafter)
    assert torch.equal(first.codes, again.codes)
    assert again.stats.extra["mean_accepted"] > first.stats.extra["mean_accepted"]


@pytest.mark.parametrize("nodes", [1, 4, 9])
def test_the_budget_of_nodes_is_kept(nodes):
    backbone, labels = TreeSpatial(8, (6, 6), seed=1), torch.zeros(4, dtype=torch.int64)
    sampler = SpeculativeSampler(tree="dynamic", num_draft_tokens=nodes, depth=3, branching=3)
    backbone.num_forwards = backbone.num_rows = 0
    out = sampler.sample(backbone, labels, seeds=range(4), drafter="ngram")
    assert backbone.num_rows <= 4 * (nodes + 1) * out.stats.num_forwards


def test_one_row_is_written_once():
    assert one_each(torch.tensor([3, 1, 3, -1, 1, 0]), 4).tolist() == [4, 4, 3, 4, 1, 0]


def test_drafters_copy_and_load_by_name():
    for name in ("token-recycling", "ngram"):
        backbone = TreeTabular(3, (2, 3))
        out = SpeculativeSampler().sample(backbone, torch.zeros(2).long(), seeds=range(2), drafter=name)
        assert out.stats.guarantee == "exact"
    copy.deepcopy(TokenRecyclingDrafter())


@pytest.mark.parametrize(
    ("drafter", "settings", "message"),
    [
        (
            lambda: CopyDrafter(torch.zeros(4)),
            {},
            r"source must be integer codes \[N\] or \[B, N\], got torch.float32",
        ),
        (lambda: CopyDrafter(torch.zeros(4, dtype=torch.int64)), {}, r"source must be codes \[6\] or \[2, 6\]"),
        (lambda: CopyDrafter(torch.zeros(3, 6, dtype=torch.int64)), {}, r"source must be codes \[6\] or \[2, 6\]"),
        (lambda: CopyDrafter(torch.full((6,), 3)), {}, r"source must hold codes 0..2, or -1 for none"),
        (lambda: CopyDrafter(torch.zeros(6, dtype=torch.int64)), {"tree": "siblings"}, "CopyDrafter proposes chains"),
        (TokenRecyclingDrafter, {"rule": "rejection"}, "TokenRecyclingDrafter remembers earlier pictures"),
        (NgramDrafter, {"num_draft_tokens": "auto"}, "num_draft_tokens must be a number for NgramDrafter"),
        (lambda: TokenRecyclingDrafter(0), {}, "num_successors must be"),
    ],
)
def test_bad_input_is_one_clear_line(drafter, settings, message):
    backbone = TreeTabular(3, (2, 3))
    with pytest.raises(ValueError, match=message) as error:
        SpeculativeSampler(**settings).sample(backbone, torch.zeros(2).long(), seeds=range(2), drafter=drafter())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", TABLES, ids=lambda make: make.__name__)
def test_a_table_of_another_codebook_is_refused(make):
    drafter = make()
    SpeculativeSampler().sample(TabularBackbone(3, (1, 3)), torch.zeros(1).long(), seeds=[0], drafter=drafter)
    with pytest.raises(ValueError, match=r"has seen codes of a codebook of 3, the backbone has 4; make a new one"):
        SpeculativeSampler().sample(TabularBackbone(4, (1, 3)), torch.zeros(1).long(), seeds=[0], drafter=drafter)


def test_public_names():
    assert vargen.CopyDrafter is CopyDrafter
