"""The released code of CSpD, number for number (Wang et al., 2024, arXiv:2411.11925; MarkXCloud/CSpD at d91f721).

For comparison only. It departs from its paper and from the target's distribution: drafts are hidden from the target (its
states are those of parallel decoding of the window), nothing is rolled back after a rejection, the product of the spreads is
inverted, the densities are flattened by a temperature of 42 that the paper does not have, and a token whose residual fails a
hundred times stays zero.

Letters: B images, N tokens, D numbers of a token, S steps of a chain, n tokens judged at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vargen.random import Stream, normal, uniform
from vargen.samplers.base import Inputs, Run
from vargen.samplers.heads.diffusion import ContinuousSampler, path_noise, work_dtype
from vargen.samplers.state import DecodeState

MAX_PASSES = 100  # of the residual loop

Draws = Callable[[int, str, int], Tensor]  # verification, "u" | "residual_noise" | "residual_u", pass


@dataclass(frozen=True, kw_only=True, eq=False)
class OfficialInputs(Inputs):
    """Recorded numbers of an official run.

    Args:
        orders: [B, N] permutations.
        noise: [B, N, D] starts of the chains, shared by both models.
        step_noise: [B, N, S, D] noise of the steps by their index, shared likewise.
        draws: uniform numbers and residual noise of each verification; None derives all four from the seeds.
    """

    orders: Tensor | None = None
    noise: Tensor | None = None
    step_noise: Tensor | None = None
    draws: Draws | None = None


@dataclass(kw_only=True)
class OfficialState(DecodeState):
    """Everything that changes while a batch is decoded; ``tokens`` are zero where not drawn."""

    drafter: Any
    draft_condition: Any
    chain: Any
    orders: Tensor  # [B, N] int64
    noise: Tensor  # [B, N, D] starts of the chains
    step_noise: Tensor  # [B, N, S, D] by index of the step
    draws: Draws | None
    mask: Tensor  # [B, N] bool, True = not verified
    draft_mask: Tensor  # [B, N] bool, True = not drafted
    kept: dict[str, Tensor]  # what drafting leaves for the test: "mean", "std", "log_std", each [B, N, D]
    iteration: int = 0
    verifications: int = 0
    verified: dict[str, Tensor] = field(default_factory=dict)  # numbers of the last verification


@dataclass(frozen=True, kw_only=True)
class OfficialSampler(ContinuousSampler):
    """The released loop.

    Args:
        gamma: drafts a verification.
        num_iter: passes (None = N).
        prefill: share of passes that the target makes at first.
        inner_temperature: factor on the last spread in the acceptance test.
    """

    inputs_type: ClassVar[type[Inputs]] = OfficialInputs

    gamma: int = 4
    num_iter: int | None = None
    prefill: float = 0.05
    inner_temperature: float = 42.0

    def begin(self, run: Run, inputs: OfficialInputs) -> OfficialState:
        """Make the first pass of the target."""
        backbone, keys, num_images = run.backbone, run.keys, len(run.seeds)
        num_tokens, size, dtype = backbone.num_codes, backbone.token_dim, work_dtype(backbone)
        steps = self.num_diffusion_steps
        chain = backbone.head.diffusion(backbone.head.num_sampling_steps if steps is None else steps)
        orders, noise, step_noise = inputs.orders, inputs.noise, inputs.step_noise
        if orders is None:
            orders = uniform(keys, torch.zeros_like(keys)[:, None], num_tokens, Stream.ORDER)[:, 0].argsort(dim=-1)
        if noise is None or step_noise is None:
            rows = path_noise(keys, torch.arange(num_tokens).expand(num_images, -1), chain.num_steps, size, dtype)
            noise, step_noise = rows[:, :, 0], rows[:, :, 1:].flip(2)
        zeros = torch.zeros(num_images, num_tokens, size, dtype=dtype)
        state = OfficialState(
            backbone=backbone,
            session=run.condition,
            drafter=run.drafter,
            draft_condition=run.drafter.prepare(run.given, guidance_scale=self.guidance_scale),
            chain=chain,
            seeds=run.seeds,
            keys=keys,
            rows=torch.arange(num_images),
            tokens=zeros.clone(),
            trace=torch.full((num_images, num_tokens), -1),
            orders=orders,
            noise=noise,
            step_noise=step_noise,
            draws=inputs.draws,
            mask=torch.ones(num_images, num_tokens, dtype=torch.bool),
            draft_mask=torch.ones(num_images, num_tokens, dtype=torch.bool),
            kept={name: zeros.clone() for name in ("mean", "std", "log_std")},
        )
        return self.step(state)

    def step(self, state: OfficialState) -> OfficialState:
        """Go on until the target has made one pass."""
        return official_step(self, state)


@torch.no_grad()
def official_step(sampler: OfficialSampler, state: OfficialState) -> OfficialState:
    """Go on until the target has made one pass: a pass of its own at first, a verification later."""
    num_tokens = state.mask.shape[1]
    num_iter = num_tokens if sampler.num_iter is None else sampler.num_iter
    before = state.num_forwards
    while state.num_forwards == before:
        s = state.iteration
        last = s == num_iter - 1
        floor = int(num_tokens * math.cos(math.pi / 2 * (s + 1) / num_iter))
        left = max(1, min(int(state.draft_mask[0].sum()) - 1, floor))
        scale = sampler.guidance_at(num_tokens - left, num_tokens)
        later = torch.zeros_like(state.mask)
        if not last:
            later = later.scatter(1, state.orders[:, :left], True)
        chosen = state.draft_mask & ~later
        if s <= num_iter * sampler.prefill:
            path = _run(sampler, state, state.backbone, state.session, state.mask, chosen, scale)
            state.tokens[chosen] = path.states[:, -1].to(state.tokens.dtype)
            state.trace[chosen] = state.num_forwards
            state.mask = state.draft_mask = later
            state.num_forwards += 1
        else:
            path = _run(sampler, state, state.drafter, state.draft_condition, state.draft_mask, chosen, scale)
            state.num_drafter_forwards += 1
            state.tokens[chosen] = path.states[:, -1].to(state.tokens.dtype)
            for name, value in zip(("mean", "std", "log_std"), _last_step(sampler, path), strict=True):
                state.kept[name][chosen] = value.to(state.tokens.dtype)
            state.draft_mask = later
            if last or (s % max(sampler.gamma, 1) == 0 and s != 0):
                _verify(sampler, state, scale)
        state.iteration += 1
        state.done = state.iteration == num_iter
    return state


def _run(
    sampler: OfficialSampler,
    state: OfficialState,
    model: Any,
    condition: Any,
    mask: Tensor,
    chosen: Tensor,
    scale: Any,
) -> Any:
    images, places = chosen.nonzero().unbind(1)
    z = model.predict(condition, state.tokens, mask)[:, images, places]
    steps = state.step_noise[images, places].flip(1)  # a chain starts at its largest index
    rows = torch.cat([state.noise[images, places][:, None], steps], dim=1)
    if model is state.backbone:
        state.num_head_rows += z.shape[0] * z.shape[1] * state.chain.num_steps
    return model.head.sample(z, rows, state.chain, guidance_scale=scale, temperature=sampler.temperature)


def _last_step(sampler: Any, path: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and spread of the last step, and the summed logarithms of the other spreads without temperature: [n, D] each."""
    return path.means[:, -1], path.stds[:, -1], (path.stds[:, :-1] / sampler.temperature).log().sum(1)


def _verify(sampler: OfficialSampler, state: OfficialState, scale: Any) -> None:
    window = state.mask & ~state.draft_mask  # the target's mask is the one from before the window
    images, places = window.nonzero().unbind(1)
    path = _run(sampler, state, state.backbone, state.session, state.mask, window, scale)
    mean_p, std_p, log_p = _last_step(sampler, path)
    x = state.tokens[window]
    mean_q, std_q, log_q = (state.kept[name][window] for name in ("mean", "std", "log_std"))
    log_factor = (log_p - log_q).sum(-1)  # the paper has its inverse

    def exponent(mean: Tensor, std: Tensor) -> Tensor:
        return -0.5 * ((x - mean) / std / sampler.inner_temperature).square().sum(-1)

    gap = exponent(mean_p, std_p) - exponent(mean_q, std_q) + (std_q.log() - std_p.log()).sum(-1)
    prob = torch.exp(gap + log_factor)
    keep = prob > _draw(state, "u", images, places)
    residual, done = torch.zeros_like(x), torch.zeros_like(keep)
    for number in range(MAX_PASSES):
        y = mean_p + std_p * _draw(state, "residual_noise", images, places, number).to(x)
        score_p, score_q = (
            ((y - m) / s).square().sum(-1) / -2 - s.log().sum(-1) for m, s in ((mean_p, std_p), (mean_q, std_q))
        )
        alpha = (1 - torch.exp(score_q - score_p - log_factor)).clamp(min=0)
        good = _draw(state, "residual_u", images, places, number) < alpha
        residual = torch.where(good[:, None], y, residual)  # a row that has succeeded before is overwritten
        done = done | good
        if bool(done.all()):
            break
    out = torch.where(keep[:, None], x, residual)
    state.verified = {
        "x": x,
        "x2_mean": mean_p,
        "x2_std": std_p,
        "x2_ls": log_p,
        "prob": prob,
        "accept": keep,
        "out": out,
    }
    state.tokens[window] = out
    state.trace[window] = state.num_forwards
    numbers = {"num_tested": len(x), "num_accepted": int(keep.sum()), "num_undrawn": int((~keep & ~done).sum())}
    state.counts = {name: state.counts.get(name, 0) + value for name, value in numbers.items()}
    state.mask = state.draft_mask
    state.verifications += 1
    state.num_forwards += 1


def _draw(state: OfficialState, name: str, images: Tensor, places: Tensor, number: int = 0) -> Tensor:
    if state.draws is not None:
        return state.draws(state.verifications, name, number)
    keys, where = state.keys[images], places[:, None]
    numbers = torch.full_like(keys, number)
    if name == "residual_noise":
        return normal(keys, where, state.tokens.shape[2], Stream.RESIDUAL, numbers)[:, 0]
    stream = Stream.ACCEPT if name == "u" else Stream.FRESH
    return uniform(keys, where, 1, stream, numbers)[:, 0, 0]
