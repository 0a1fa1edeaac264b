"""How the target judges drafted chains: whole paths at once, or step by step along them.

Functions of ``ContinuousSpeculativeSampler``, whose settings and noise they use; the rules themselves are in
``continuous_rules``.

p is the target, q the draft. Letters: A images still decoded, B images, N tokens, D numbers of a token, S steps of a chain,
G guidance branches, n chains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vargen.random import Stream, uniform
from vargen.samplers.acceptance.gaussian import accept, couple_step, draw_residual, log_ratio, survive
from vargen.samplers.heads.diffusion import path_noise


@dataclass
class ContinuousState:
    """Everything that changes while a batch is decoded, and what ``stream`` yields."""

    backbone: Any
    session: Any
    drafter: Any
    draft_session: Any
    chain: Any  # of the target
    draft_chain: Any
    seeds: list[int]
    keys: Tensor  # [B] int64
    latents: Tensor  # [B, N, D], zero where not drawn
    length: Tensor  # [B] int64 tokens drawn
    rows: Tensor  # [A] int64 images still decoded
    trace: Tensor  # [B, N] int64
    forwards_per_image: Tensor  # [B] int64
    num_forwards: int = 0
    num_drafter_forwards: int = 0
    num_head_rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    log_ratios: Tensor | None = None  # [A, gamma] of the last round
    done: bool = False

    @property
    def codes(self) -> Tensor:
        """[B, N, D] tokens, NaN where not drawn."""
        drawn = torch.arange(self.latents.shape[1], device=self.length.device) < self.length[:, None]
        return self.latents.masked_fill(~drawn[..., None], math.nan)

    @property
    def num_committed(self) -> Tensor:
        """[B] int64 tokens drawn."""
        return self.length

    def count(self, **numbers: int) -> None:
        """Add to the counters of the statistics."""
        for name, value in numbers.items():
            self.counts[name] = self.counts.get(name, 0) + value


@dataclass
class Drafts:
    """Chains of the drafter for one window, and what they were drawn from."""

    z: Tensor  # [G, A, gamma, Z] of the drafter
    tokens: Tensor  # [A, gamma, D]
    states: Tensor  # [A, gamma, S + 1, D]
    means: Tensor  # [A, gamma, S, D]
    stds: Tensor


def judge_paths(
    sampler: Any, state: ContinuousState, z: Tensor, drafts: Drafts, places: Tensor, room: Tensor
) -> tuple[Tensor, Tensor]:
    """Accept whole chains: the extra token ``[A, D]`` and how many drafts pass ``[A]``."""
    gamma, device = sampler.gamma, places.device
    offset = places[:, None] + torch.arange(gamma, device=device)  # A gamma
    settings = sampler.chain_settings(state, offset.flatten())
    settings.pop("final_noise")
    flat = z[:, :, :gamma].flatten(1, 2)
    mean, std = state.backbone.head.path_params(drafts.states.flatten(0, 1), flat, state.chain, **settings)
    state.num_head_rows += flat.shape[0] * flat.shape[1] * state.chain.num_steps
    draft_laws = drafts.means.flatten(0, 1), drafts.stds.flatten(0, 1)
    ratios = log_ratio(drafts.states.flatten(0, 1)[:, 1:], (mean, std), draft_laws).view(-1, gamma)
    state.log_ratios = ratios
    u = uniform(state.keys[state.rows], sampler.inside(state, offset), 1, Stream.ACCEPT)[..., 0]
    count = torch.minimum(accept(ratios, u).long().cumprod(1).sum(1), room)
    # what was refused is drawn from the residual of its own context; where nothing was, the target draws freely
    which = torch.arange(len(places), device=device)
    context = z[:, which, count]
    draft_z = drafts.z[:, which, count.clamp(max=gamma - 1)]

    def propose(rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        where = (places + count)[rows]
        noise = sampler.path_noise_at(state, where, rows, Stream.RESIDUAL, numbers)
        bonus = (count == gamma)[rows]
        if bool(bonus.any()):
            noise[bonus] = sampler.path_noise_at(state, where[bonus], rows[bonus])
        options = sampler.chain_settings(state, where)
        path = state.backbone.head.sample(context[:, rows], noise, state.chain, **options)
        options.pop("final_noise")
        laws = state.drafter.head.path_params(path.states, draft_z[:, rows], state.draft_chain, **options)
        state.num_head_rows += context.shape[0] * len(rows) * state.chain.num_steps
        state.count(num_draft_head_rows=context.shape[0] * len(rows) * state.chain.num_steps)
        ratio = log_ratio(path.states[:, 1:], (path.means, path.stds), laws)
        v = uniform(state.keys[state.rows[rows]], sampler.inside(state, where[:, None]), 1, Stream.FRESH, numbers)
        return path.states[:, -1], survive(ratio, v[:, 0, 0])

    free = (count == gamma) | (count == room)
    extra, chains, capped = draw_residual(len(places), propose, free, device)
    state.count(num_target_chains=chains, num_capped=capped)
    return extra.to(state.latents.dtype), count


def judge_steps(
    sampler: Any, state: ContinuousState, z: Tensor, drafts: Drafts, places: Tensor, room: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the target's chains along the drafts': the extra token ``[A, D]`` and how many drafts pass ``[A]``."""
    gamma, device = sampler.gamma, places.device
    where = (places[:, None] + torch.arange(gamma, device=device)).flatten()
    images = state.rows.repeat_interleave(gamma)
    flat = z[:, :, :gamma].flatten(1, 2)
    settings = sampler.chain_settings(state, where)
    states, means, stds = (t.flatten(0, 1) for t in (drafts.states, drafts.means, drafts.stds))
    keys, inside = state.keys[images], sampler.inside(state, where[:, None])
    num_steps = state.chain.num_steps
    u = uniform(keys, inside, num_steps, Stream.ACCEPT)[:, 0]
    x, capped, size = states[:, 0], 0, (states.shape[-1], states.dtype)
    for k in range(num_steps):
        index = torch.tensor(num_steps - 1 - k, device=device)
        mean, std = state.backbone.head.step_params(x, index, flat, state.chain, settings["guidance_scale"])

        def draw(rows: Tensor, numbers: Tensor, k: int = k) -> tuple[Tensor, Tensor]:
            number = numbers * num_steps + k
            noise = path_noise(keys[rows], inside[rows, 0], 0, *size, Stream.RESIDUAL, number)
            return noise[:, 0], uniform(keys[rows], inside[rows], 1, Stream.FRESH, number)[:, 0, 0]

        laws = (mean, std * sampler.temperature), (means[:, k], stds[:, k])
        x, _, met = couple_step(states[:, k + 1], *laws, u[:, k], draw)
        capped += met
    state.num_head_rows += flat.shape[0] * flat.shape[1] * num_steps
    same = (x == states[:, -1]).all(-1).view(-1, gamma)
    count = torch.minimum(same.long().cumprod(1).sum(1), room)
    which = torch.arange(len(places), device=device)
    extra = x.view(len(places), gamma, -1)[which, count.clamp(max=gamma - 1)]
    bonus = (count == gamma).nonzero().flatten()
    if len(bonus):
        extra[bonus] = sampler.draw_chain(state, z[:, bonus, gamma], places[bonus] + gamma, bonus)
    state.count(num_capped=capped)
    return extra.to(state.latents.dtype), count
