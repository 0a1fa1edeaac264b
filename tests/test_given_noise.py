"""``noise=`` of a call: recorded draws of other code replay through the samplers' own loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vargen
from tests.tiny import CODEBOOK_SIZE, GRID, tiny_backbone
from vargen.backbones.llamagen.any_order import AnyOrderTransformer
from vargen.backbones.llamagen.masked import MaskedTransformer
from vargen.random import Stream, gumbel, seed_tensor

LABELS, SEEDS = torch.tensor([1, 2, 3]), [3, 4, 5]


def of_seeds(images: Tensor, positions: Tensor) -> Tensor:
    """What the samplers make themselves."""
    return gumbel(seed_tensor(SEEDS)[images], positions, CODEBOOK_SIZE)


def recorded(images: Tensor, positions: Tensor) -> Tensor:
    """Another code's numbers, looked up by image and position."""
    table = -torch.empty(3, 16, CODEBOOK_SIZE).exponential_(generator=torch.Generator().manual_seed(0)).log()
    return table[images[:, None], positions]


def schedule_cases() -> list[tuple[Any, Any]]:
    torch.manual_seed(1)
    sizes = {
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "grid_size": GRID,
        "num_classes": 10,
        "codebook_size": CODEBOOK_SIZE,
    }
    models = AnyOrderTransformer(**sizes), MaskedTransformer(**sizes)
    for model in models:
        torch.nn.init.normal_(model.output.weight, std=0.5)
    samplers = vargen.ParallelGroupSampler(num_steps=4, guidance_scale=2.0), vargen.MaskedSampler(num_steps=4)
    return list(zip([model.eval() for model in models], samplers, strict=True))


@pytest.mark.parametrize(
    "sampler",
    [
        vargen.NextTokenSampler(guidance_scale=2.0, top_k=20),
        vargen.SpeculativeJacobiSampler(guidance_scale=2.0, top_k=20, window=5),
        vargen.SpeculativeSampler(guidance_scale=2.0, top_k=20, num_draft_tokens=3),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_window_samplers_draw_with_it(sampler: Any) -> None:
    backbone = tiny_backbone()
    drafter = {"drafter": "row-above"} if isinstance(sampler, vargen.SpeculativeSampler) else {}
    own = sampler.sample(backbone, LABELS, seeds=SEEDS, **drafter).codes
    assert torch.equal(sampler.sample(backbone, LABELS, seeds=SEEDS, noise=of_seeds, **drafter).codes, own)
    found = sampler.sample(backbone, LABELS, seeds=[0, 0, 0], noise=recorded, **drafter).codes
    plain = vargen.NextTokenSampler(guidance_scale=2.0, top_k=20)
    assert torch.equal(found, plain.sample(backbone, LABELS, seeds=SEEDS, noise=recorded).codes)
    assert not torch.equal(found, own)


def test_next_token_takes_the_largest_sum() -> None:
    """The loop of the authors: argmax(logits + noise), code after code."""
    backbone = tiny_backbone()
    codes = torch.empty(3, 0, dtype=torch.int64)
    for position in range(16):
        padded = torch.cat([codes, torch.zeros(3, 1, dtype=torch.int64)], dim=1)
        logits = backbone(padded, LABELS)[:, position]
        noise = recorded(torch.arange(3), torch.full((3, 1), position))[:, 0]
        codes = torch.cat([codes, (logits + noise).argmax(-1, keepdim=True)], dim=1)
    found = vargen.NextTokenSampler().sample(backbone, LABELS, seeds=SEEDS, noise=recorded).codes
    assert torch.equal(found, codes)


@pytest.mark.parametrize(("backbone", "sampler"), schedule_cases(), ids=["any-order", "masked"])
def test_schedule_samplers_draw_with_it(backbone: Any, sampler: Any) -> None:
    def of_pass(images: Tensor, positions: Tensor, *number: int) -> Tensor:
        if not number:
            return of_seeds(images, positions)
        seeds, now = seed_tensor(SEEDS)[images], torch.full_like(images, number[0])
        return gumbel(seeds, positions, CODEBOOK_SIZE, Stream.FRESH, now)

    own = sampler.sample(backbone, LABELS, seeds=SEEDS).codes
    assert torch.equal(sampler.sample(backbone, LABELS, seeds=SEEDS, noise=of_pass).codes, own)
    found = sampler.sample(backbone, LABELS, seeds=[0, 0, 0], noise=lambda i, p, *_: recorded(i, p)).codes
    assert not torch.equal(found, own)


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    backbone = tiny_backbone()
    with pytest.raises(ValueError, match="leave noise out"):
        vargen.SpeculativeJacobiSampler(rule="maximal").sample(backbone, LABELS, seeds=SEEDS, noise=recorded)
    with pytest.raises(ValueError, match=r"noise must return Gumbel numbers \[3, \d+, 64\]"):
        vargen.NextTokenSampler().sample(backbone, LABELS, seeds=SEEDS, noise=lambda images, positions: torch.zeros(2))
    with pytest.raises(ValueError, match="got NoneType"):
        vargen.NextTokenSampler().sample(backbone, LABELS, seeds=SEEDS, noise=lambda images, positions: None)
