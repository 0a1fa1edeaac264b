"""The outcome of a row has the target distribution, whatever the draft: by integration over the uniforms, and by chi-square."""

from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chi2

from vargen.kernels.draw import draw
from vargen.kernels.verify import reference
from vargen.kernels.verify.verify import Draft, Label, VerifyNoise, verify_window
from vargen.kernels.warp import warp_logits
from vargen.random import Stream

V = 5
GRID = 20_000
GOLDEN_RATIO = 0.6180339887498949


def outcome_distribution(p, q, kind, carry="maximal", shared_noise=False):
    """Law of the outcome of one row, integrated over both uniforms on a lattice (error about log(GRID) / GRID)."""
    step = torch.arange(GRID)
    u = ((step + 0.5) / GRID).repeat(V)[:, None]
    r = u if shared_noise else ((step.double() * GOLDEN_RATIO) % 1.0).float().repeat(V)[:, None]
    token = torch.arange(V).repeat_interleave(GRID)[:, None]
    batch = len(token)
    zeros = torch.zeros(batch, dtype=torch.int64)
    draft = Draft(
        tokens=token,
        kind=torch.full((batch, 1), kind, dtype=torch.int8),
        prob=q[token],
        row=torch.zeros_like(token),
        logits=q.log().expand(1, batch, 1, V),
    )
    outcome = verify_window(
        p.log().expand(1, batch, 1, V),
        draft,
        carry=carry,
        seeds=zeros,
        positions=zeros[:, None],
        iteration=zeros,
        num_rows=torch.ones_like(zeros),
        noise=VerifyNoise(u, r, r),
    )
    given = torch.nn.functional.one_hot(outcome.tokens[:, 0], V).double().view(V, GRID, V).mean(1)
    return given, given.double().T @ q.double()  # given the draft; over the drafts


def distributions(seed, zeros=0):
    torch.manual_seed(seed)
    p, q = torch.rand(2, V).square().unbind()
    p[:zeros] = 0
    q[V - zeros :] = 0
    return p / p.sum(), q / q.sum()


@pytest.mark.parametrize("carry", ["maximal", "independent", "none"])
@pytest.mark.parametrize("zeros", [0, 2])
def test_outcome_distribution_is_the_target(carry, zeros):
    p, q = distributions(0, zeros)
    uniform = torch.full((V,), 1 / V)
    for label, kind in ((q, Label.ROW), (uniform, Label.UNIFORM)):
        given, distribution = outcome_distribution(p, label, kind, carry)
        assert torch.allclose(distribution, p.double(), atol=1e-3)
        accepted = given.diagonal()  # an accepted draft stays, and a rejected one never comes back
        assert torch.allclose(accepted, (p / label).clamp(max=1.0).nan_to_num(1.0).double(), atol=1e-3)
    given, _ = outcome_distribution(p, torch.ones(V), Label.POINT, carry)
    assert torch.allclose(
        given, p.double().expand(V, V), atol=1e-3
    )  # whatever the point, the outcome has distribution p


MUTANTS = {
    "accept where p >= q": {"accept": lambda p, q, u: q <= p},
    "p and q swapped": {"accept": lambda p, q, u: u * p < q},
    "inclusive test": {"accept": lambda p, q, u: (u * q <= p) | (p == 0)},
    "draw from p": {"residual": lambda p, q: p},
    "|p - q|": {"residual": lambda p, q: (p - q).abs()},
    "residual squared": {"residual": lambda p, q: (p - q).clamp(min=0).square()},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_seen(monkeypatch, mutant):
    for name, rule in MUTANTS[mutant].items():
        monkeypatch.setattr(reference, name, SimpleNamespace(fn=rule))
    p, q = distributions(0, 2)
    assert (outcome_distribution(p, q, Label.ROW)[1] - p.double()).abs().max() > 0.01


def test_one_number_for_test_and_residual_is_seen():
    p, q = distributions(0)
    assert (outcome_distribution(p, q, Label.ROW, shared_noise=True)[1] - p.double()).abs().max() > 0.01


def test_zero_probability_is_rejected_at_u_zero_and_equal_distributions_accept_at_the_largest_u():
    p, _ = distributions(3)
    p[2] = 0
    p /= p.sum()
    edge = torch.tensor([[0.0], [1.0 - 2.0**-24]])
    zeros = torch.zeros(2, dtype=torch.int64)
    draft = Draft(
        tokens=torch.tensor([[2], [4]]),
        kind=torch.tensor([[Label.POINT], [Label.ROW]], dtype=torch.int8),
        prob=torch.tensor([[1.0], [0.0]]),
        row=torch.zeros(2, 1, dtype=torch.int64),
        logits=p.log().expand(1, 2, 1, V),
    )
    distribution = warp_logits(draft.logits)[1, 0]
    draft.prob[1, 0] = (distribution[4] - distribution.logsumexp(-1)).exp()
    outcome = verify_window(
        p.log().expand(1, 2, 1, V),
        draft,
        carry="maximal",
        seeds=zeros,
        positions=zeros[:, None],
        iteration=zeros,
        num_rows=torch.ones_like(zeros),
        noise=VerifyNoise(edge, edge, edge),
    )
    assert outcome.accepted.tolist() == [[False], [True]]
    assert outcome.tokens[0, 0] != 2


def philox_counts(batch, **settings):
    """Outcomes of one row with every number from Philox: the draft drawn from q, then verified."""
    torch.manual_seed(4)
    logits = torch.randn(2, 1, 1, 1, 13) * 1.5
    target, label = logits.expand(2, 1, batch, 1, 13)
    seeds, step = torch.arange(batch) * 31 + 7, torch.full((batch,), 3)
    positions = torch.full((batch, 1), 11)
    tokens = draw(label, seeds=seeds, positions=positions, stream=Stream.DRAFT, iteration=step, **settings)
    distribution = warp_logits(label[:, :1], **settings)[0, 0].softmax(-1)
    draft = Draft(
        tokens=tokens,
        kind=torch.full((batch, 1), Label.ROW, dtype=torch.int8),
        prob=distribution[tokens],
        row=torch.zeros_like(tokens),
        logits=label,
    )
    outcome = verify_window(
        target,
        draft,
        carry="maximal",
        seeds=seeds,
        positions=positions,
        iteration=step,
        num_rows=torch.ones(batch, dtype=torch.int64),
        **settings,
    )
    return torch.bincount(outcome.tokens[:, 0], minlength=13), warp_logits(target[:, :1], **settings)[0, 0].softmax(-1)


def p_value(counts, distribution):
    expected = distribution.double() * counts.sum()
    keep = expected > 0
    assert counts[~keep].sum() == 0
    statistic = ((counts - expected).square() / expected)[keep].sum()
    return float(chi2.sf(float(statistic), int(keep.sum()) - 1))


@pytest.mark.parametrize("settings", [{}, {"top_k": 6}, {"temperature": 0.7, "top_p": 0.8}])
def test_philox_streams_give_the_target_distribution(settings):
    counts, distribution = philox_counts(100_000, **settings)
    assert p_value(counts, distribution) > 1e-4


def test_reusing_the_noise_of_the_draft_is_seen(monkeypatch):
    monkeypatch.setattr(reference, "Stream", SimpleNamespace(ACCEPT=1, FRESH=2, RESIDUAL=int(Stream.DRAFT)))
    counts, distribution = philox_counts(100_000)
    assert p_value(counts, distribution) < 1e-6
