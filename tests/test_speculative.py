"""Speculative decoding: shared noise gives next-token's own codes in every chain and tree; old settings still load."""

import json

import pytest
import torch

import vargen
from tests.enumeration import shared_noise_law, table_law, total_variation
from tests.toys import LinedBackbone, SpatialBackbone, TabularBackbone, perturbed
from tests.tree_toys import TreeTabular
from vargen import DraftModelSampler, LanternSampler, NextTokenSampler, RowAboveDrafter, SpeculativeSampler
from vargen.samplers.acceptance import shared_noise_tree
from vargen.samplers.base import Sampler
from vargen.samplers.registry import ALIASES, DRAFTERS, RULES, SAMPLERS, find_drafter
from vargen.samplers.window.grouped import GroupedSpeculativeSampler
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler

TARGET = TreeTabular(3, (2, 3), seed=0)
DRAFTS = (TARGET, TreeTabular(3, (2, 3), seed=0, spread=1.2), TreeTabular(3, (2, 3), seed=5))  # perfect, fair, useless
TREES = [
    {"tree": "siblings", "num_draft_tokens": 2},
    {"tree": "mc_sim_7b_63"},
    {"tree": "naive_extend_57", "proposal": "with_replacement"},
    {"tree": "reverse_balanced_25", "proposal": "top"},
    {"tree": "dynamic", "num_draft_tokens": 5, "depth": 3, "branching": 2},
]
SETTINGS = [{}, {"guidance_scale": 2.0, "top_k": 2}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_shared_noise_in_a_tree_gives_the_codes_of_next_token_sampling(tree, settings):
    labels, seeds = torch.arange(2).repeat(4), range(8)
    for forced in (None, torch.tensor([-1, 2, -1, 0, -1, -1])):
        expected = NextTokenSampler(**settings).sample(TARGET, labels, seeds=seeds, forced_codes=forced)
        for drafter in DRAFTS:
            out = SpeculativeSampler(**tree, **settings).sample(
                TARGET, labels, seeds=seeds, drafter=drafter, forced_codes=forced
            )
            assert torch.equal(out.codes, expected.codes)
            assert out.stats.guarantee == "exact"
            assert out.stats.num_forwards <= expected.stats.num_forwards


def test_good_drafts_are_kept_in_a_tree():
    out = SpeculativeSampler(tree="mc_sim_7b_63").sample(TARGET, torch.zeros(8).long(), seeds=range(8), drafter=TARGET)
    assert out.stats.num_forwards == 2  # the prefill, then five proposals and the code behind them
    assert out.stats.extra["mean_accepted"] == 4.0  # the last slot is never proposed for


@pytest.mark.parametrize("tree", [TREES[0], TREES[1], TREES[4]], ids=str)
def test_shared_noise_in_a_tree_is_exact(tree, monkeypatch):
    backbone, drafter = TreeTabular(2, (1, 5)), TreeTabular(2, (1, 5), seed=9)
    sample = SpeculativeSampler.sample
    monkeypatch.setattr(SpeculativeSampler, "sample", lambda *a, **k: sample(*a, **k, drafter=drafter))
    sampler = SpeculativeSampler(**tree)
    assert total_variation(shared_noise_law(sampler, backbone), table_law(backbone, sampler)) < 1e-12


def test_enumeration_sees_a_tree_that_keeps_any_child(monkeypatch):
    rule = shared_noise_tree.SharedNoiseTree
    find_path = rule.find_path

    def broken(self, rows, draft, noise):
        found = find_path(self, rows, draft, noise)
        if draft.tokens.shape[1] == 1:
            return found
        kept = draft.tokens[:, 1]  # the first child, whatever was drawn
        found.tokens[:, 0] = kept.where((kept >= 0) & (rows.num_rows > 1), found.tokens[:, 0])
        return found

    monkeypatch.setattr(rule, "find_path", broken)
    with pytest.raises(AssertionError):
        test_shared_noise_in_a_tree_is_exact(TREES[1], monkeypatch)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_images_do_not_depend_on_the_batch(tree):
    sampler, labels = SpeculativeSampler(**tree), torch.ones(9, dtype=torch.int64)
    together = sampler.sample(TARGET, labels, seeds=range(9), drafter=DRAFTS[1])
    for start, size in ((0, 1), (4, 5)):
        seeds = range(start, start + size)
        part = sampler.sample(TARGET, labels[:size], seeds=seeds, drafter=DRAFTS[1])
        assert torch.equal(part.codes, together.codes[start : start + size])
        assert torch.equal(part.stats.commit_trace, together.stats.commit_trace[start : start + size])


# ------------------------------------------------------------------------------------------- drafters without a model


class Rows(SpatialBackbone):
    """A model that repeats the row above."""

    def law(self, labels, branch, codes, slots):
        logits = super().law(labels, branch, codes, slots)
        width = self.grid_size[1]
        source = (slots - width).clamp(min=0)
        above = codes.gather(1, source).clamp(min=0)
        return logits + 20.0 * torch.nn.functional.one_hot(above, logits.shape[-1]) * (slots >= width)[..., None]


@pytest.mark.parametrize("rule", ["shared-noise", "rejection"])
def test_the_row_above_is_right_where_rows_repeat(rule):
    backbone, zeros = Rows(16, (6, 5)), torch.zeros(3, dtype=torch.int64)
    sampler = SpeculativeSampler(rule=rule, num_draft_tokens=7)
    out = sampler.sample(backbone, zeros, seeds=range(3), drafter="row-above")
    rows = out.codes.view(3, 6, 5)
    assert bool((rows == rows[:, :1]).float().mean() > 0.9)
    assert out.stats.num_forwards <= 12  # of 30: the first row is drawn, the others are copied eight at a time
    assert out.stats.num_drafter_forwards == 0


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_row_above_changes_no_code(settings):
    for backbone in (SpatialBackbone(32, (4, 5)), TabularBackbone(3, (2, 3)), LinedBackbone(3, (2, 2), seed=5)):
        zeros = torch.zeros(6, dtype=torch.int64)
        limited = {name: value for name, value in settings.items() if name != "top_k"}
        expected = NextTokenSampler(**limited).sample(backbone, zeros, seeds=range(6)).codes
        sampler = SpeculativeSampler(num_draft_tokens=7, **limited)
        for drafter in ("row-above", RowAboveDrafter()):
            assert torch.equal(sampler.sample(backbone, zeros, seeds=range(6), drafter=drafter).codes, expected)


def test_a_drafter_is_a_short_file_and_a_line():
    import inspect

    module = inspect.getmodule(RowAboveDrafter)
    assert len(inspect.getsource(module).splitlines()) <= 40
    assert all(hasattr(find_drafter(name), "guess") or hasattr(find_drafter(name), "lookup") for name in DRAFTERS)


@pytest.mark.parametrize(
    ("settings", "drafter", "message"),
    [
        ({"tree": "mc_sim_7b_63"}, "row-above", "RowAboveDrafter proposes chains for the rules"),
        ({"rule": "recursive"}, "row-above", "RowAboveDrafter proposes chains for the rules"),
        (
            {},
            "row-abov",
            "drafter must be one of row-above, token-recycling, ngram, got 'row-abov'; did you mean 'row-above'",
        ),
        ({}, None, "SpeculativeSampler needs drafter="),
    ],
)
def test_drafters_that_do_not_fit_are_refused_before_any_work(settings, drafter, message):
    before = TARGET.num_forwards
    with pytest.raises(ValueError, match=message):
        SpeculativeSampler(**settings).sample(TARGET, torch.zeros(1).long(), seeds=[0], drafter=drafter)
    assert TARGET.num_forwards == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "shared_noise"}, "rule must be one of .*did you mean 'shared-noise'"),
        ({"rule": "rejection", "tree": "siblings"}, "take rule='recursive'"),
        ({"rule": "k-seq", "proposal": "top"}, "needs proposal='with_replacement'"),
        ({"rule": "typical", "temperature": 0}, "needs a temperature above 0"),
        ({"num_draft_tokens": 0}, "num_draft_tokens must be an integer at least 1"),
        ({"rule": "recursive", "num_draft_tokens": 257}, r"num_draft_tokens must be an integer in 1\.\.256"),
        ({"tree": "oak"}, "tree must be one of"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, message):
    with pytest.raises(ValueError, match=message):
        SpeculativeSampler(**settings)


def test_an_unknown_input_is_one_clear_line():
    with pytest.raises(ValueError, match="NextTokenSampler takes no input 'force_codes'; did you mean 'forced_codes'"):
        NextTokenSampler().sample(TARGET, torch.zeros(1).long(), seeds=[0], force_codes=None)


# ------------------------------------------------------------------------------------------------------------- aliases


def test_every_public_sampler_is_registered_once():
    assert sorted(SAMPLERS.values()) == sorted(name for name in vargen._names if name.endswith("Sampler"))
    classes = {base.__name__ for name in SAMPLERS.values() for base in getattr(vargen, name).__mro__}
    assert set(ALIASES) <= classes  # old names belong to a sampler or to what it extends
    assert all(SpeculativeSampler(rule=rule).rule == rule for rule in RULES)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (lambda: SpeculativeJacobiSampler(carry="gumbel"), SpeculativeJacobiSampler(rule="shared-noise")),
        (lambda: SpeculativeJacobiSampler(carry="maximal"), SpeculativeJacobiSampler(rule="maximal")),
        (
            lambda: SpeculativeJacobiSampler().replace(carry="independent"),
            SpeculativeJacobiSampler(rule="independent"),
        ),
        (lambda: GroupedSpeculativeSampler(carry="maximal"), GroupedSpeculativeSampler(rule="maximal")),
        (lambda: DraftModelSampler(num_drafts=7, carry="gumbel"), DraftModelSampler(num_draft_tokens=7)),
        (lambda: DraftModelSampler(carry="independent"), DraftModelSampler(rule="rejection")),
        (
            lambda: LanternSampler(relaxation="none", depth=5, acceptance="recursive"),
            SpeculativeSampler(rule="recursive", num_draft_tokens=5, depth=5),
        ),
        (
            lambda: LanternSampler().replace(relaxation="none", tree="dynamic"),
            SpeculativeSampler(rule="recursive", tree="dynamic", num_draft_tokens=58),
        ),
        (
            lambda: LanternSampler(relaxation="none", acceptance="typical", tree="siblings", branching=3),
            SpeculativeSampler(rule="typical", tree="siblings", num_draft_tokens=3, branching=3),
        ),
    ],
)
def test_old_settings_build_the_sampler_of_today(old, new):
    assert old() == new


@pytest.mark.parametrize(
    ("config", "sampler"),
    [
        (
            {"_class_name": "SpeculativeJacobiSampler", "window": 8, "carry": "gumbel", "init": "uniform"},
            SpeculativeJacobiSampler(window=8, init="uniform"),
        ),
        (
            {"_class_name": "DraftModelSampler", "num_drafts": 6, "carry": "independent", "top_k": 3},
            DraftModelSampler(num_draft_tokens=6, rule="rejection", top_k=3),
        ),
        (
            {"_class_name": "LanternSampler", "relaxation": "none", "acceptance": "k-seq", "tree": "mc_sim_7b_63",
             "proposal": "with_replacement", "k": 10, "delta": 0.1, "lam": 5.0, "residual": "paper", "depth": 8,
             "branching": 10, "num_nodes": 59, "typical_epsilon": 0.09, "typical_alpha": 0.3},
            SpeculativeSampler(rule="k-seq", tree="mc_sim_7b_63", proposal="with_replacement", num_draft_tokens=8),
        ),
        (
            {"_class_name": "LanternSampler", "relaxation": "lantern", "acceptance": "recursive", "delta": 0.2,
             "typical_epsilon": 0.09, "typical_alpha": 0.3, "tree": "chain"},
            LanternSampler(relaxation="lantern", delta=0.2),
        ),
    ],
)  # fmt: skip
def test_old_configurations_load(config, sampler, tmp_path):
    assert Sampler.from_config(config) == sampler
    (tmp_path / "sampler_config.json").write_text(json.dumps(config))
    loaded = getattr(vargen, config["_class_name"]).from_pretrained(tmp_path)
    assert loaded == sampler
    loaded.save_pretrained(tmp_path)
    assert Sampler.from_pretrained(tmp_path) == sampler


def test_a_setting_under_two_names_is_refused():
    with pytest.raises(ValueError, match="give rule only once: carry and rule"):
        SpeculativeJacobiSampler(carry="gumbel", rule="maximal")


def test_a_rule_is_not_taken_over_from_another_sampler():
    jacobi = SpeculativeJacobiSampler(rule="maximal", top_k=3)
    assert SpeculativeSampler.from_config(jacobi.config) == SpeculativeSampler(top_k=3)
    assert DraftModelSampler.from_config(SpeculativeSampler(rule="rejection").config).rule == "rejection"


@pytest.mark.parametrize("rule", ["shared-noise", "rejection"])
def test_the_old_name_draws_the_same_codes(rule):
    backbone, zeros = SpatialBackbone(32, (4, 5)), torch.zeros(3, dtype=torch.int64)
    drafter = perturbed(backbone, 0.3)
    old, new = (c(rule=rule).sample(backbone, zeros, seeds=range(3), drafter=drafter) for c in (DraftModelSampler, SpeculativeSampler))  # fmt: skip
    assert torch.equal(old.codes, new.codes)
