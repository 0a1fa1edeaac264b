"""Continuous speculative decoding: closed forms, toys, couplings, guidance, ragged batches, and the official rule that fails."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from tests.continuous_official import OfficialSampler
from tests.continuous_toys import DTYPE, ToyCausal, compare, linear_gaussian, mixture, normality, whiten
from tests.golden_files import load_file
from vargen.backbones.mar.causal import CausalMARTransformer
from vargen.backbones.mar.model import MARTransformer
from vargen.random import Stream, uniform
from vargen.samplers.acceptance import gaussian as continuous_rules
from vargen.samplers.acceptance.gaussian import accept, couple_step, draw_residual, log_ratio, reflect, survive
from vargen.samplers.window.continuous_speculative import ContinuousSpeculativeSampler

GOLDEN = Path(__file__).parent / "golden" / "mar"
LEAST_P = 1e-4
EXACT = ("exact", "stepwise")


def run(target: Any, drafter: Any, num: int, first_seed: int = 0, **settings: Any) -> Any:
    sampler = ContinuousSpeculativeSampler(**settings)
    labels = torch.zeros(num, dtype=torch.int64)
    return sampler.sample(target, labels, seeds=range(first_seed, first_seed + num), drafter=drafter)


def rate(output: Any) -> float:
    return float(output.stats.extra["num_accepted"] / output.stats.extra["num_tested"])


# Couplings


@pytest.mark.parametrize("gap", [0.5, 1.0, 2.0])
def test_one_step_is_coupled_as_often_as_any_coupling_can(gap: float) -> None:
    num, dim = 40_000, 16
    generator = torch.Generator().manual_seed(7)
    zero, one = torch.zeros(num, dim, dtype=DTYPE), torch.ones(num, dim, dtype=DTYPE)
    shifted = zero + gap / math.sqrt(dim)
    y = shifted + torch.randn(num, dim, dtype=DTYPE, generator=generator)
    u = torch.rand(num, dtype=DTYPE, generator=generator)
    x, kept, _ = couple_step(y, (zero, one), (shifted, one), u, lambda *_: pytest.fail("equal spreads need no loop"))
    expected = 2 * stats.norm.cdf(-gap / 2)
    p = stats.binomtest(int(kept.sum()), num, expected).pvalue
    found = normality(x[:, None])
    print(f"gap {gap}: N={num} kept {float(kept.double().mean()):.4f} of {expected:.4f} (p {p:.2g}), law {found}")
    assert p > LEAST_P
    assert min(found.values()) > LEAST_P
    again = (y - shifted) - 2 * ((y - shifted) * (shifted - zero)).sum(-1, keepdim=True) * (shifted - zero) / gap**2
    torch.testing.assert_close(x[~kept], again[~kept])
    noise = torch.randn(5, dim, dtype=DTYPE, generator=generator)
    torch.testing.assert_close(reflect(reflect(noise, shifted[:5]), shifted[:5]), noise)


def test_one_step_with_unequal_spreads() -> None:
    num, dim = 20_000, 3
    generator = torch.Generator().manual_seed(8)
    zero, one = torch.zeros(num, dim, dtype=DTYPE), torch.ones(num, dim, dtype=DTYPE)
    y = 0.3 + 1.3 * torch.randn(num, dim, dtype=DTYPE, generator=generator)

    def draw(rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn(len(rows), dim, dtype=DTYPE, generator=generator)
        return noise, torch.rand(len(rows), dtype=DTYPE, generator=generator)

    u = torch.rand(num, dtype=DTYPE, generator=generator)
    x, kept, capped = couple_step(y, (zero, one), (zero + 0.3, one * 1.3), u, draw)
    found = normality(x[:, None])
    ratio = log_ratio(y[:, None], (zero[:, None], one[:, None]), ((zero + 0.3)[:, None], (one * 1.3)[:, None]))
    mean = ratio.exp().clamp(max=1.0)
    z = float((kept.double().mean() - mean.mean()).abs() / (kept.double() - mean).std() * math.sqrt(num))
    print(
        f"N={num} kept {float(kept.double().mean()):.4f}, expected {float(mean.mean()):.4f} (z {z:.2f}), law {found}"
    )
    assert capped == 0
    assert z < 4
    assert min(found.values()) > LEAST_P
    assert abs(float(ratio.exp().mean()) - 1) < 0.1  # E_q [p / q] = 1
    wrong = torch.where(accept(ratio + 1.0, u)[:, None], y, x)  # any factor on the ratio breaks the law
    assert min(normality(wrong[:, None]).values()) < LEAST_P


def test_ratios_are_stable() -> None:
    states = torch.full((2, 3, 4), 100.0)
    far = log_ratio(states, (torch.zeros(2, 3, 4), torch.ones(2, 3, 4)), (states, torch.ones(2, 3, 4)))
    torch.testing.assert_close(far, torch.full((2,), -6e4, dtype=DTYPE))
    u = torch.tensor([0.0, 0.5])
    assert accept(torch.zeros(2, dtype=DTYPE), u).all()  # equal laws always pass
    assert not accept(torch.tensor([math.nan, -1e4], dtype=DTYPE), torch.tensor([0.0, 0.5])).any()
    assert survive(torch.tensor([1e4, 0.0, -1e4], dtype=DTYPE), torch.tensor([0.999, 0.0, 0.0])).tolist() == [
        True,
        False,
        False,
    ]
    half = states.to(torch.bfloat16)
    assert log_ratio(half, (half, half), (half, half)).abs().max() == 0


def test_a_capped_residual_is_drawn_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous_rules, "MAX_PROPOSALS", 8)
    free = torch.tensor([False, True, False])

    def propose(rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return (10.0 * rows + numbers)[:, None].double() + 1, (rows == 2) & (numbers == 3)

    tokens, chains, capped = draw_residual(3, propose, free, torch.device("cpu"))
    assert tokens[:, 0].tolist()[1:] == [11.0, 24.0]
    assert tokens[0, 0] > 0
    assert capped == 1
    assert chains == 3 + 2 * 4 + 8
    monkeypatch.setattr(continuous_rules, "survive", lambda ratio, u: torch.zeros_like(u, dtype=torch.bool))
    monkeypatch.setattr("vargen.samplers.acceptance.gaussian_chains.survive", continuous_rules.survive)
    monkeypatch.setattr(
        "vargen.samplers.acceptance.gaussian_chains.accept", lambda ratio, u: torch.zeros_like(ratio, dtype=torch.bool)
    )
    output = run(linear_gaussian(), linear_gaussian(), 2, mode="exact", num_draft_tokens=2)
    assert output.stats.guarantee == "relaxed"
    assert "met their cap" in output.stats.notes[0]
    assert output.latents.isfinite().all()
    assert (output.latents != 0).all()


# Laws


@pytest.mark.parametrize("mode", EXACT)
def test_linear_gaussian_closed_form(mode: str) -> None:
    num = 4000
    target, draft = (
        linear_gaussian(),
        linear_gaussian(spread=0.55, shift=0.35, values=0.05 if mode == "exact" else 0.0),
    )
    output = run(target, draft, num, mode=mode, num_draft_tokens=3)
    found = normality(whiten(target, output.latents, [1.0] * 4))
    print(f"{mode}: N={num}, accepted {rate(output):.3f}, p {found}")
    assert 0.2 < rate(output) < 0.95
    assert min(found.values()) > LEAST_P
    assert output.stats.guarantee == "exact"
    own = normality(whiten(target, run(draft, None, num, num_draft_tokens=0).latents, [1.0] * 4))
    assert min(own.values()) < LEAST_P  # the draft alone has another law


@pytest.mark.parametrize("mode", EXACT)
def test_guided_and_cooled_closed_form(mode: str) -> None:
    num = 3000
    target, draft = linear_gaussian(dim=2), linear_gaussian(dim=2, shift=0.36, null_shift=-0.55)
    output = run(target, draft, num, mode=mode, num_draft_tokens=2, guidance_scale=2.0, temperature=0.9)
    scales = [1 + known / 4 for known in (1, 2, 3, 3)]
    found = normality(whiten(target, output.latents, scales, 0.9))
    print(f"{mode}, guided: N={num}, accepted {rate(output):.3f}, p {found}")
    assert 0.2 < rate(output) < 0.99
    assert min(found.values()) > LEAST_P
    unguided = normality(whiten(target, output.latents, [1.0] * 4, 0.9))
    assert min(unguided.values()) < LEAST_P


def test_what_replaces_a_draft_does_not_know_the_uniform_that_refused_it() -> None:
    """Dies here: an acceptance uniform that is kept for the residual of whole paths."""
    num = 3000
    target, draft = linear_gaussian(slope=0.0), linear_gaussian(slope=0.0, shift=0.45, spread=0.55)
    output = run(target, draft, num, mode="exact", num_draft_tokens=1)
    trace = output.stats.commit_trace
    refused = trace[:, 1] != trace[:, 2]  # the first draft brought no second token
    u = uniform(torch.arange(num), torch.ones(num, 1, dtype=torch.int64), 1, Stream.ACCEPT)[:, 0, 0]
    found = stats.spearmanr(u[refused], output.latents[refused, 1].mean(-1))
    print(f"N={int(refused.sum())}, correlation {found.statistic:.3f} (p {found.pvalue:.2g})")
    assert u[refused].mean() > u[~refused].mean() + 0.1  # it is the one that decided
    assert found.pvalue > LEAST_P


@pytest.mark.parametrize("mode", EXACT)
def test_mixtures(mode: str) -> None:
    num = 1000
    target, draft = mixture(), mixture(move=0.1)
    reference = run(target, None, num, first_seed=50_000, num_draft_tokens=0).latents
    output = run(target, draft, num, mode=mode, num_draft_tokens=3)
    found = compare(output.latents, reference)
    print(f"{mode}, mixture: N={num}, accepted {rate(output):.3f}, {found}")
    assert 0.3 < rate(output) < 0.98
    assert min(found[name] for name in ("ks", "energy", "lag")) > LEAST_P
    assert found["energy"] > 0.01
    wrong = compare(run(draft, None, num, num_draft_tokens=0).latents, reference)
    assert wrong["energy"] == 1 / 200  # no permutation is as far


def test_official_rule_fails() -> None:
    num = 1000
    target, draft = mixture(), mixture(move=0.1)
    reference = run(target, None, num, first_seed=50_000, num_draft_tokens=0).latents
    labels = torch.zeros(num, dtype=torch.int64)
    raster = torch.arange(3, -1, -1).expand(num, -1)
    sampler = OfficialSampler(gamma=4, prefill=0.0)

    def official(drafter: ToyCausal) -> Any:
        return sampler.sample(target, labels, seeds=range(num), drafter=drafter, orders=raster)

    for drafter in (draft, target):
        output = official(drafter)
        found = compare(output.latents, reference)
        print(f"official: N={num}, accepted {rate(output):.3f}, {found}")
        assert found["energy"] == 1 / 200
        assert found["lag"] < 1e-6
    assert rate(output) < 0.9  # it refuses drafts of the very same model


# Real models


def causal(seed: int, num_layers: int = 2, noise: float = 0.0) -> CausalMARTransformer:
    torch.manual_seed(seed)
    model = CausalMARTransformer(
        grid_size=(3, 4), latent_channels=4, dim=16, num_layers=num_layers, num_heads=2, num_classes=5, head_depth=2,
        head_width=16, num_sampling_steps="6,0", dropout=0.0,
    )  # fmt: skip
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    torch.manual_seed(seed + 100)
    for weight in model.parameters():
        weight.data += noise * torch.randn_like(weight)
    return model.eval().double()


LABELS, SEEDS = torch.tensor([1, 3, 0]), [3, 2**63 + 4, 5]


def sample(model: Any, drafter: Any = None, rows: slice = slice(None), **settings: Any) -> Any:
    sampler = ContinuousSpeculativeSampler(**settings)
    return sampler.sample(model, LABELS[rows], seeds=SEEDS[rows], drafter=drafter)


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_draft_equal_to_target_is_always_accepted(mode: str, guidance_scale: float) -> None:
    model = causal(0)
    plain = sample(model, num_draft_tokens=0, guidance_scale=guidance_scale)
    drafted = sample(model, model, mode=mode, num_draft_tokens=4, guidance_scale=guidance_scale)
    # with the noise of the position; one row and five of float64 are multiplied in other orders on some processors
    torch.testing.assert_close(drafted.latents, plain.latents, rtol=0, atol=1e-12)
    assert rate(drafted) == 1.0
    assert plain.stats.num_forwards == 12
    assert drafted.stats.num_forwards == 1 + math.ceil(11 / 5)
    assert drafted.stats.commit_trace.unique(return_counts=True)[1].tolist() == [3, 15, 15, 3]


@pytest.mark.parametrize("mode", EXACT)
def test_images_do_not_depend_on_their_batch(mode: str) -> None:
    model, drafter = causal(0), causal(0, noise=0.004)
    together = sample(model, drafter, mode=mode, num_draft_tokens=3, guidance_scale=1.5)
    assert 0 < rate(together) < 1
    assert len(set(together.stats.forwards_per_image.tolist())) > 1  # rows advance by different amounts
    for i in range(3):
        alone = sample(model, drafter, rows=slice(i, i + 1), mode=mode, num_draft_tokens=3, guidance_scale=1.5)
        torch.testing.assert_close(alone.latents[0], together.latents[i])
        assert alone.stats.num_forwards == together.stats.forwards_per_image[i]
    counts = together.stats
    assert counts.num_head_rows % (2 * 6) == 0
    assert together.latents.isfinite().all()


def test_window_sees_what_teacher_forcing_sees() -> None:
    model = causal(1)
    tokens = torch.randn(2, 12, 4, dtype=DTYPE)
    full = model(tokens, LABELS[:2])
    session, out = model.open(model.prepare(LABELS[:2]), max_window=3)
    torch.testing.assert_close(out.logits[0, :, 0], full[:, 0])
    torch.testing.assert_close(model.step(session, tokens[:, :3]).logits[0], full[:, 1:4])
    model.commit(session, torch.tensor([2, 1]))
    ragged = torch.stack([tokens[0, 2:4], tokens[1, 1:3]])
    found = model.step(session, ragged).logits[0]
    torch.testing.assert_close(found, torch.stack([full[0, 3:5], full[1, 2:4]]))


def test_official_run_number_for_number() -> None:
    golden, weights = load_file(GOLDEN / "cspd_official.safetensors"), load_file(GOLDEN / "mar.safetensors")
    read: dict[str, Any] = {
        "patch_size": 2,
        "encoder_num_heads": 2,
        "decoder_num_heads": 2,
        "num_sampling_steps": "4,0",
    }
    target = MARTransformer.from_original(weights, **read)
    small = {name: golden.get(f"draft_override.{name}", value) for name, value in weights.items()}
    names = {"u": "u", "residual_noise": "residual_proposal_noise", "residual_u": "residual_u"}

    def draws(number: int, name: str, turn: int) -> Tensor:
        recorded = golden[f"verify{number}.{names[name]}"]
        return recorded if name == "u" else recorded[turn]

    def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
        return float((a - b).abs().max()) <= tolerance * float(b.abs().max())

    sampler = OfficialSampler(gamma=4, guidance_scale=2.5)
    noise = {"orders": golden["orders"], "noise": golden["noise"], "step_noise": golden["inter_noise"], "draws": draws}
    drafter = MARTransformer.from_original(small, **read)
    for state in sampler.stream(target, golden["labels"], seeds=[0, 1], drafter=drafter, **noise):
        number = state.verifications - 1
        if number < 0:
            continue
        for name, value in state.verified.items():
            expected = golden[f"verify{number}.{name}"]
            if name == "accept":
                assert torch.equal(value, expected)
            else:
                assert close(value, expected, 1e-3 if name == "prob" else 1e-5), name
    assert state.verifications == 4
    assert close(target.to_latents(state.tokens), golden["out_latents"], 1e-5)
    assert sampler.finish(state).stats.num_forwards == 5


def test_refusals() -> None:
    model = causal(0)
    with pytest.raises(ValueError, match="needs drafter="):
        sample(model)
    with pytest.raises(ValueError, match="needs noise in every step"):
        ContinuousSpeculativeSampler(final_noise=False)
    with pytest.raises(ValueError, match="needs noise in every step"):
        ContinuousSpeculativeSampler(temperature=0.0)
    with pytest.raises(ValueError, match="needs a causal drafter, got SimpleNamespace"):
        sample(model, SimpleNamespace(features=("continuous",)))
    bidirectional = SimpleNamespace(features=("continuous", "masked_continuous"))
    with pytest.raises(ValueError, match=r"needs a backbone with continuous_window.*fit: ContinuousMaskedSampler$"):
        sample(bidirectional, model)
    with pytest.raises(ValueError, match="the same tokens"):
        sample(linear_gaussian(), linear_gaussian(num_tokens=5))
    with pytest.raises(ValueError, match="mode must be one of"):
        ContinuousSpeculativeSampler(mode="fast")
    assert sample(model, num_draft_tokens=0, final_noise=False, temperature=0.0).latents.isfinite().all()
