"""What samplers that draw several tokens a pass sample, against the models' own distributions, each with a control that fails.

Codes: every sequence of a tiny model is enumerated with the training forward; its probability is the product over the codes.
Continuous tokens: a toy whose conditionals are Gaussian, so that what was drawn can be whitened.
"""

from __future__ import annotations

import math

import pytest
import torch

import vargen
from tests.continuous_toys import chain_law, linear_gaussian, normality
from tests.enumeration import chi_square_p
from vargen.kernels.warp import warp_logits

FALSE_ALARM = 1e-4  # a right sampler fails once in 10,000 runs
NUM_SAMPLES = 3000
GUIDANCE = 1.5


def tiny(name, **config):
    torch.manual_seed(1)
    shape = {"dim": 16, "num_layers": 2, "num_heads": 2, "num_classes": 3, "codebook_size": 2}
    model = getattr(vargen, name)(**shape | config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return model.eval()


@torch.no_grad()
def enumerated(model, score, **warp):
    """Every sequence and its probability under guided logits; ``score(codes, labels) [B, N, V]``, class 3 is "none"."""
    every = torch.cartesian_prod(*[torch.arange(model.codebook_size)] * model.num_codes)
    labels = torch.zeros(len(every), dtype=torch.int64)
    both = torch.stack([score(every, labels), score(every, labels + 3)])
    chosen = warp_logits(both, **warp).log_softmax(-1).gather(-1, every[..., None])[..., 0]
    found = dict(zip(map(tuple, every.tolist()), chosen.double().sum(1).exp().tolist(), strict=True))
    assert sum(found.values()) == pytest.approx(1, abs=1e-4)
    assert max(found.values()) < 0.6, "the model is too sure for a test"
    return found


def p_value(sampler, model, expected):
    labels = torch.zeros(NUM_SAMPLES, dtype=torch.int64)
    return chi_square_p(sampler.sample(model, labels, seeds=range(NUM_SAMPLES)).codes, expected)


CODES = {
    "next block": (
        vargen.NextBlockSampler,
        {},
        ("NBPTransformer", {"condition_type": "class", "grid_size": (2, 4), "block": (1, 2), "max_positions": None}),
    ),
    "PAR": (vargen.ParallelGroupSampler, {}, ("PARTransformer", {"grid_size": (2, 4), "group_size": 4})),
}


@pytest.mark.parametrize("case", CODES)
@pytest.mark.parametrize("warp", [{"temperature": 1.0}, {"temperature": 1.5, "top_p": 0.95}], ids=str)
def test_codes_have_the_distribution_of_the_training_forward(case, warp):
    kind, settings, (name, config) = CODES[case]
    model = tiny(name, **config)
    sampler = kind(guidance_scale=GUIDANCE, **warp, **settings)
    expected = enumerated(model, model, guidance_scale=GUIDANCE, **warp)
    steps = sampler.sample(model, torch.zeros(1, dtype=torch.int64), seeds=[0]).stats
    assert steps.guarantee == "exact"
    assert steps.num_forwards < model.num_codes  # several codes a pass
    assert p_value(sampler, model, expected) > FALSE_ALARM
    assert p_value(sampler.replace(temperature=1.4 * warp["temperature"]), model, expected) < FALSE_ALARM


def any_order_forward(model, order):
    """Logits of every code given the codes before it in ``order``, one pass of the decoder a code."""

    def score(codes, labels):
        schedule = vargen.DecodeSchedule.groups(model.grid_size, order, (1,) * len(order), model.num_condition_tokens)
        session = model.begin(model.prepare(labels), schedule)
        found = torch.empty(*codes.shape, model.codebook_size)
        for step in schedule.steps:
            found[:, step.targets] = model.run_items(session, step, codes)[0]
        return found

    return score


def test_any_order_models_draw_one_code_a_pass_exactly():
    model = tiny("AnyOrderTransformer", grid_size=(2, 3))
    sampler = vargen.ParallelGroupSampler(guidance_scale=GUIDANCE, num_steps=6, order_seed=4)
    order = sampler.make_schedule(model).order
    assert order.tolist() != list(range(6))
    expected = enumerated(model, any_order_forward(model, order), guidance_scale=GUIDANCE)
    assert sampler.sample(model, torch.zeros(1, dtype=torch.int64), seeds=[0]).stats.guarantee == "exact"
    assert p_value(sampler, model, expected) > FALSE_ALARM
    assert p_value(sampler.replace(order_seed=5), model, expected) < FALSE_ALARM


def whitened(toy, output, sampler):
    """Residuals of the tokens given what was drawn in passes before: standard normal iff the distribution is right."""
    tokens, trace = output.latents, output.stats.commit_trace
    seen = torch.cat([torch.zeros_like(trace[:, :1], dtype=torch.bool), trace[:, :-1] < trace[:, 1:]], dim=1)
    before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1) * seen[..., None]
    cond, null = (toy.slope * before + shift for shift in toy.shifts)
    c, u, variance = chain_law(toy, sampler.guidance_scale, sampler.temperature, final_noise=False)
    return (tokens - c * cond - u * null) / math.sqrt(variance)


@pytest.mark.parametrize("num_steps", [2, 5])
def test_continuous_tokens_have_the_distribution_of_their_chains(num_steps):
    toy = linear_gaussian(num_tokens=5, dim=2)
    settings = {"num_steps": num_steps, "guidance_schedule": "constant", "guidance_scale": GUIDANCE}
    sampler = vargen.ContinuousMaskedSampler(temperature=0.9, **settings)
    labels = torch.zeros(NUM_SAMPLES, dtype=torch.int64)
    output = sampler.sample(toy, labels, seeds=range(NUM_SAMPLES))
    assert output.stats.guarantee == "exact"
    assert len({tuple(row) for row in output.stats.commit_trace.tolist()}) > 5  # every image has its own order
    right = normality(whitened(toy, output, sampler))
    assert min(right.values()) > FALSE_ALARM, right
    warmer = sampler.replace(temperature=1.0).sample(toy, labels, seeds=range(NUM_SAMPLES))
    assert min(normality(whitened(toy, warmer, sampler)).values()) < FALSE_ALARM, "the test has no power"
