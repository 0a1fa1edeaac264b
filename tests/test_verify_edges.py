"""Verification where distributions degenerate, in reference and kernel: equal distributions, disjoint ones, single atoms, filters that keep all."""

import pytest
import torch

from tests.windows import NEG, assert_same, scene
from vargen.kernels.draw import draw
from vargen.kernels.verify.verify import Draft, Label, verify_window

B, W, V = 3, 2, 61
CARRIES = ["maximal", "independent", "none"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rows_of(carry, p, q, tokens, prob, **settings):
    """Arguments of a verification of drafts ``tokens [B, W]`` from the distributions of ``q`` against those of ``p``."""
    draft = Draft(
        tokens=tokens,
        kind=torch.full((B, W), Label.ROW, dtype=torch.int8),
        prob=prob,
        row=torch.arange(W).expand(B, -1).contiguous(),
        logits=q,
    )
    where = {
        "seeds": torch.arange(B) + 100,
        "positions": torch.arange(W).expand(B, -1).contiguous(),
        "iteration": torch.zeros(B, dtype=torch.int64),
        "num_rows": torch.full((B,), W),
    }
    return (p, draft), {"carry": carry, **where, **settings}


def decide(on_kernel, arguments, settings):
    reference = verify_window(*arguments, **settings)
    kernel = on_kernel(verify_window, *arguments, **settings)
    assert_same(kernel, reference, settings["num_rows"], settings)
    return reference


@pytest.mark.parametrize("carry", CARRIES)
def test_equal_distributions_always_accept(on_kernel, poisoned, carry):
    p = torch.randn(1, B, W, V)
    tokens = p[0].argmin(-1)  # the least likely code of all
    prob = p[0].softmax(-1).gather(-1, tokens[..., None])[..., 0]
    outcome = decide(on_kernel, *rows_of(carry, p, p.clone(), tokens, prob))
    assert outcome.accepted.all()
    assert torch.equal(outcome.tokens, tokens)


@pytest.mark.parametrize("carry", CARRIES)
def test_disjoint_distributions_never_accept_and_stay_in_the_targets_support(on_kernel, poisoned, carry):
    p, q = torch.randn(2, B, W, V), torch.randn(2, B, W, V)
    p[..., :30], q[..., 30:] = NEG, NEG
    prob, tokens = q[0].softmax(-1).max(-1)
    outcome = decide(on_kernel, *rows_of(carry, p, q, tokens, prob, guidance_scale=1.5))
    assert not outcome.accepted.any()
    assert outcome.num_committed.eq(1).all()
    assert (outcome.tokens[:, 0] >= 30).all()


@pytest.mark.parametrize("carry", ["gumbel", *CARRIES])
def test_a_single_atom_has_probability_one(on_kernel, poisoned, carry):
    p = torch.full((1, B, W, V), NEG)
    atom = torch.randint(V, (B, W), generator=torch.Generator().manual_seed(0))
    p.scatter_(-1, atom[None, ..., None], 0.3)
    tokens = atom.clone()
    tokens[:, 1] = (atom[:, 1] + 1) % V
    outcome = decide(on_kernel, *rows_of(carry, p, torch.zeros(1, B, W, V), tokens, torch.full((B, W), 1 / V)))
    assert torch.equal(outcome.tokens[:, :2], atom[:, :2])
    assert (outcome.prob[:, :2] == 1).all()
    assert outcome.num_committed.eq(2).all()


@pytest.mark.parametrize(
    ("carry", "kind"),
    [("gumbel", Label.POINT), ("maximal", Label.UNIFORM), ("independent", Label.POINT), ("none", Label.ROW)],
)
def test_a_missing_draft_is_rejected_whatever_its_label(on_kernel, poisoned, carry, kind):
    p = torch.randn(1, B, W, V)
    arguments, settings = rows_of(carry, p, p.clone(), torch.full((B, W), -1), torch.ones(B, W))
    draft = Draft(**{**vars(arguments[1]), "kind": torch.full((B, W), kind, dtype=torch.int8)})
    outcome = decide(on_kernel, (p, draft), settings)
    assert not outcome.accepted.any()
    assert outcome.num_committed.eq(1).all()
    assert ((outcome.tokens[:, 0] >= 0) & (outcome.tokens[:, 0] < V)).all()


@pytest.mark.parametrize("settings", [{"top_k": 0, "top_p": 1.0}, {"top_k": V}], ids=str)
def test_filters_that_keep_everything_change_nothing(on_kernel, poisoned, settings):
    logits, draft, where = scene(V, window=3, seed=11)
    plain = verify_window(logits, draft, carry="maximal", **where)
    outcome = decide(on_kernel, (logits, draft), {"carry": "maximal", **where, **settings})
    assert torch.equal(outcome.tokens, plain.tokens)


def widened(value):
    """The same numbers as a view into the logits of a larger vocabulary, as of a sliced head."""
    return torch.nn.functional.pad(value, (5, 9))[..., 5:-9]


@pytest.mark.parametrize(
    ("carry", "dtype"), [("gumbel", torch.float32), ("maximal", torch.float16), ("independent", torch.bfloat16)]
)
def test_views_of_a_sliced_head(on_kernel, poisoned, carry, dtype):
    settings = {"guidance_scale": 2.0, "top_k": 20}
    logits, draft, where = scene(V, batch=2, window=2, seed=12, dtype=dtype, **settings)
    view = widened(logits)
    assert not view.is_contiguous()
    dense = verify_window(logits, draft, carry=carry, **where, **settings)
    strided = (view, draft.with_logits(widened(draft.logits)))
    outcome = decide(on_kernel, strided, {"carry": carry, **where, **settings})
    assert torch.equal(outcome.tokens, dense.tokens)


def test_large_codebooks_that_are_no_power_of_two(on_kernel, poisoned):
    codes, settings = 65001, {"guidance_scale": 1.5, "top_k": 2000}
    logits, draft, where = scene(codes, 2, 2, seed=14, dtype=torch.bfloat16, **settings)
    decide(on_kernel, (logits, draft), {"carry": "maximal", **where, **settings})
    place = {name: where[name] for name in ("seeds", "positions")}
    drawn = draw(logits, **place, **settings)
    assert torch.equal(on_kernel(draw, logits, **place, **settings), drawn)
