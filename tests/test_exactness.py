"""Why the law does not change: exact enumeration, samples through the real decoder, and mutants that must be caught."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.enumeration import (
    chi_square_p,
    decoder_law,
    random_laws,
    rule_law,
    sequence_law,
    shared_noise_law,
    table_law,
    total_variation,
)
from tests.toys import TabularBackbone
from vargen.kernels.verify import reference
from vargen.kernels.verify.types import Label
from vargen.random import Stream
from vargen.samplers.acceptance import base as rules
from vargen.samplers.drafters import jacobi as drafters
from vargen.samplers.window import decoder as window
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler

EXACT = 1e-12
FALSE_ALARM = 1e-4  # p below which a sampling test fails: once in 10,000 runs of a right sampler
INITS = ["uniform", "repeat_left", "repeat_above"]


# ------------------------------------------------------------------------------------------------------------ the rule


@pytest.mark.parametrize("shape", [(3, 5, 3), (2, 6, 4), (3, 4, 3), (2, 6, 2)], ids=str)
@pytest.mark.parametrize("init", ["uniform", "point", "repeat_left"])
@pytest.mark.parametrize("carry", ["independent", "maximal"])
def test_the_rule_is_exact(carry, init, shape):
    law = random_laws(*shape[:2])
    assert total_variation(rule_law(law, *shape, carry=carry, init=init), sequence_law(law, shape[1])) < EXACT


@pytest.mark.parametrize(
    ("mistake", "shape", "carry", "strength"),
    [
        ("old_label", (2, 6, 4), "maximal", None),
        ("old_label", (3, 5, 3), "maximal", None),
        ("draw_from_p", (2, 6, 4), "independent", None),
        ("draw_from_p", (3, 4, 3), "independent", None),
        ("temper_residual", (3, 4, 3), "independent", 0.7),
        ("reuse", (2, 6, 4), "independent", 0.5),
        ("reuse", (3, 4, 3), "independent", 0.5),
    ],
)
def test_known_mistakes_are_far_from_exact(mistake, shape, carry, strength):
    law = random_laws(*shape[:2])
    wrong = rule_law(law, *shape, carry=carry, init="point", mistake=mistake, strength=strength)
    assert total_variation(wrong, sequence_law(law, shape[1])) > 1e-2


# --------------------------------------------------------------------------------------------------------- the decoder


@pytest.mark.parametrize("ragged", [False, True], ids=["alone", "ragged batch"])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("carry", ["independent", "maximal"])
@pytest.mark.parametrize(
    ("backbone", "settings"),
    [
        (TabularBackbone(2, (2, 3)), {"window": 4}),
        (TabularBackbone(3, (1, 4), seed=1), {"window": 3, "guidance_scale": 2.0, "temperature": 0.7}),
        (TabularBackbone(3, (2, 2), seed=2, digits=1), {"window": 2, "top_k": 2}),
        (TabularBackbone(3, (2, 2), seed=3), {"window": 4, "guidance_scale": 1.5, "top_p": 0.8}),
    ],
    ids=["plain", "guided and cool", "top-k", "guided top-p"],
)
def test_the_decoder_is_exact(backbone, settings, carry, init, ragged):
    sampler = SpeculativeJacobiSampler(carry=carry, init=init, **settings)
    law = decoder_law(sampler, backbone, label=1, ragged=ragged)
    assert total_variation(law, table_law(backbone, sampler, label=1)) < EXACT


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.0, "temperature": 0.7}, {"top_p": 0.7}], ids=str)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_shared_noise_is_exact(size, init, settings):
    backbone, sampler = TabularBackbone(2, (1, 5)), SpeculativeJacobiSampler(window=size, init=init, **settings)
    assert total_variation(shared_noise_law(sampler, backbone), table_law(backbone, sampler)) < EXACT


# ------------------------------------------------------------------------------------------------------------- samples

SETTINGS = {
    "plain": {},
    "guided": {"guidance_scale": 2.0},
    "top-k with ties": {"top_k": 2},
    "guided top-p": {"guidance_scale": 1.5, "top_p": 0.8},
    "cool": {"temperature": 0.7},
    "hot": {"temperature": 1.5, "top_k": 2, "guidance_scale": 3.0},
}


def p_value(sampler, backbone, num_images=20_000, first_seed=0):
    """Draw through the decoder with its own noise, all images in one ragged batch, and compare the joint law."""
    seeds = range(first_seed, first_seed + num_images)
    codes = sampler.sample(backbone, torch.ones(num_images, dtype=torch.int64), seeds=seeds).codes
    return chi_square_p(codes, table_law(backbone, sampler, label=1))


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("carry", ["gumbel", "maximal", "independent"])
def test_samples_follow_the_law(carry, settings):
    backbone = TabularBackbone(3, (2, 3), digits=1)
    for number, init in enumerate(INITS):
        sampler = SpeculativeJacobiSampler(window=4, carry=carry, init=init, **settings)
        p = p_value(sampler, backbone, first_seed=number << 20)
        p = p if p > FALSE_ALARM else p_value(sampler, backbone, first_seed=77 << 20)  # one retry with other seeds
        assert p > FALSE_ALARM, f"{init}: p = {p:.2g}; a right sampler fails once in 10^8 runs"


@pytest.mark.parametrize("carry", ["gumbel", "maximal", "independent"])
@pytest.mark.parametrize("batch", [1, 3])
def test_small_batches_give_the_images_of_the_large_one(carry, batch):
    """So that the law tested on one batch of thousands is the law of every batch."""
    backbone, sampler = TabularBackbone(3, (2, 3)), SpeculativeJacobiSampler(window=4, carry=carry, guidance_scale=2.0)
    expected = sampler.sample(backbone, torch.ones(30, dtype=torch.int64), seeds=range(30)).codes
    for start in range(0, 30, batch):
        labels = torch.ones(batch, dtype=torch.int64)
        codes = sampler.sample(backbone, labels, seeds=range(start, start + batch)).codes
        assert torch.equal(codes, expected[start : start + batch])


# ------------------------------------------------------------------------------------------------------------- mutants
# Each breaks the real decoder in one place; the tests above must see it.


def old_label(patch):
    """Codes accepted behind the first rejection keep the law of their first draw (released SCD)."""
    propose = drafters.JacobiDrafter.propose

    def broken(self, state, logits, outcome, slots, num_rows):
        new, old, logits = propose(self, state, logits, outcome, slots, num_rows), state.draft, logits.clone()
        images, columns = ((new.kind == Label.ROW) & outcome.accepted.gather(1, new.row)).nonzero(as_tuple=True)
        kind, prob, stats = new.kind.clone(), new.prob.clone(), new.stats.clone()
        for i, j in zip(images.tolist(), columns.tolist(), strict=True):
            row = int(new.row[i, j])
            kind[i, j], prob[i, j] = old.kind[i, row], old.prob[i, row]
            if old.logits is not None:
                logits[:, i, row] = old.logits[:, i, old.row[i, row]]
                stats[i, row] = old.stats[i, old.row[i, row]]
        return replace(new, kind=kind, prob=prob, logits=logits, stats=stats)

    patch.setattr(drafters.JacobiDrafter, "propose", broken)


def change_draft(change):
    """A mutant that changes every draft that the Jacobi drafter returns."""

    def mutate(patch):
        propose = drafters.JacobiDrafter.propose
        patch.setattr(drafters.JacobiDrafter, "propose", lambda self, *args: change(propose(self, *args)))

    return mutate


def change_rule(name, function):
    """A mutant of an acceptance rule."""
    return lambda patch: patch.setattr(reference, name, SimpleNamespace(fn=function))


def change_call(module, name, **changes):
    """A mutant that changes keyword arguments on the way into a function of the decoder."""

    def mutate(patch):
        function = getattr(module, name)

        def broken(*args, **kwargs):
            return function(*args, **{key: changes.get(key, lambda v: v)(value) for key, value in kwargs.items()})

        patch.setattr(module, name, broken)

    return mutate


def accept_noise_for_redraws(patch):
    """The redrawn code reads the very numbers that rejected the draft."""
    uniform = reference.uniform
    patch.setattr(reference, "uniform", lambda s, p, n, stream, i: uniform(s, p, n, Stream.RESIDUAL, i))


def commit_more(change):
    """The cache keeps another number of entries than the decoder believes."""

    def mutate(patch):
        commit = TabularBackbone.commit
        patch.setattr(TabularBackbone, "commit", lambda self, session, n: commit(self, session, change(n, session)))

    return mutate


def first_images(patch):
    """The cache keeps the first rows in place of the images that are still decoded."""
    select = TabularBackbone.select
    patch.setattr(
        TabularBackbone, "select", lambda self, session, rows: select(self, session, torch.arange(len(rows)))
    )


def without_threshold(draft):
    """The label is the law before top-k cut it."""
    law = draft.logits[0].log_softmax(-1)  # b w v
    rows = law.gather(1, draft.row[..., None].expand(-1, -1, law.shape[-1]))
    prob = rows.gather(-1, draft.tokens.clamp(min=0)[..., None])[..., 0].exp()
    lse = draft.logits[0].logsumexp(-1)
    stats = torch.stack([torch.full_like(lse, -torch.inf), lse], -1)
    return replace(draft, prob=torch.where(draft.kind == Label.ROW, prob, draft.prob), stats=stats)


def copied_as_uniform(draft):
    kind = torch.where(draft.kind == Label.POINT, int(Label.UNIFORM), draft.kind.long())
    return replace(draft, kind=kind.to(torch.int8), prob=torch.where(draft.kind == Label.POINT, 1 / 3, draft.prob))


def old_rows(draft):
    return replace(draft, row=(draft.row - 1).clamp(min=0))


MUTANTS = {
    "old label": ("maximal", {}, old_label),
    "redraw from p, not from the residual": ("maximal", {}, change_rule("residual", lambda p, q: p)),
    "redraw from p, independent": ("independent", {}, change_rule("residual", lambda p, q: p)),
    "residual |p - q|": ("independent", {}, change_rule("residual", lambda p, q: (p - q).abs())),
    "residual tempered again": (
        "maximal",
        {},
        change_rule("residual", lambda p, q: (p - q).clamp(min=0) ** 3),
    ),
    "accept iff p >= q": ("maximal", {}, change_rule("accept", lambda p, q, u: p >= q)),
    "p and q swapped": ("maximal", {}, change_rule("accept", lambda p, q, u: u * p < q)),
    "accept half too often": ("independent", {}, change_rule("accept", lambda p, q, u: u * q < 1.5 * p)),
    "label of the row before": ("maximal", {}, change_draft(old_rows)),
    "label without top-k": ("maximal", {"top_k": 2}, change_draft(without_threshold)),
    "label without guidance": (
        "maximal",
        {"guidance_scale": 3.0},
        change_draft(lambda d: replace(d, logits=d.logits[:1])),
    ),
    "label probability halved": ("maximal", {}, change_draft(lambda d: replace(d, prob=d.prob / 2))),
    "copied code with a uniform label": ("maximal", {"init": "repeat_left"}, change_draft(copied_as_uniform)),
    "test and redraw share numbers": ("maximal", {}, accept_noise_for_redraws),
    "numbers do not change between iterations": (
        "maximal",
        {},
        change_call(rules, "verify_window", iteration=torch.zeros_like),
    ),
    "all positions share their numbers": (
        "gumbel",
        {},
        lambda patch: patch.setattr(window.GumbelCache, "rows", shared_rows(window.GumbelCache.rows)),
    ),
    "temperature missing in the window": (
        "gumbel",
        {"temperature": 0.7},
        change_call(rules, "verify_window", temperature=lambda t: 1.0),
    ),
    "guidance missing in the window": (
        "gumbel",
        {"guidance_scale": 2.0},
        change_call(rules, "verify_window", guidance_scale=lambda s: 1.0),
    ),
    "cache one entry short": ("gumbel", {}, commit_more(lambda n, s: (n - 1).clamp(min=0))),
    "cache one entry long": ("gumbel", {}, commit_more(lambda n, s: (n + 1).clamp(max=s.fed))),
    "cache never rolled back": ("gumbel", {}, commit_more(lambda n, s: torch.full_like(n, s.fed))),
    "cache keeps the wrong images": ("gumbel", {}, first_images),
}


def shared_rows(rows):
    return lambda self, positions: rows(self, positions[:, :1]).expand(-1, positions.shape[1], -1)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught_by_the_samples(name, monkeypatch):
    carry, settings, mutate = MUTANTS[name]
    backbone = TabularBackbone(3, (2, 3), digits=1)
    sampler = SpeculativeJacobiSampler(window=4, carry=carry, **settings)
    mutate(monkeypatch)
    try:
        p = p_value(sampler, backbone)
    except (AssertionError, IndexError, RuntimeError):
        return  # the toy's cache noticed first
    assert p < FALSE_ALARM, f"a decoder with the mistake {name!r} passes with p = {p:.2g}"
