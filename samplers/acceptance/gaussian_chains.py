"""How the target judges drafted chains: whole paths at once, or step by step along them.

Functions of ``ContinuousSpeculativeSampler``, whose settings and noise they use; the couplings are in ``gaussian``.

p is the target, q the draft. Letters: A images still decoded, g drafts, N tokens, D numbers of a token, S steps of a chain,
G guidance branches, n = A g chains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vargen.random import Stream, uniform
from vargen.samplers.acceptance.gaussian import accept, couple_step, draw_residual, log_ratio, survive
from vargen.samplers.heads.diffusion import ChainHead, path_noise
from vargen.samplers.state import DecodeState


@dataclass(kw_only=True)
class ContinuousState(DecodeState):
    """Everything that changes while windows of continuous tokens are decoded."""

    drafter: Any
    draft_session: Any
    head: ChainHead  # of the target
    draft_head: ChainHead | None
    length: Tensor  # [A] int64 tokens drawn

    def count(self, **numbers: int) -> None:
        """Add to the counters of the statistics."""
        for name, value in numbers.items():
            self.counts[name] = self.counts.get(name, 0) + value


@dataclass
class Drafts:
    """Chains of the drafter for one window of g tokens, and what they were drawn from."""

    z: Tensor  # [G, A, g, Z] of the drafter
    tokens: Tensor  # [A, g, D]
    states: Tensor  # [A, g, S + 1, D]
    means: Tensor  # [A, g, S, D]
    stds: Tensor


def judge_paths(
    sampler: Any, state: ContinuousState, z: Tensor, drafts: Drafts, places: Tensor, room: Tensor
) -> tuple[Tensor, Tensor]:
    """Accept whole chains: the extra token ``[A, D]`` and how many drafts pass ``[A]``."""
    assert state.draft_head is not None
    head, draft_head, num, device = state.head, state.draft_head, drafts.tokens.shape[1], places.device
    positions = places[:, None] + torch.arange(num, device=device)  # A g
    target = head.score(drafts.states, z[:, :, :num], sampler.scale_at(state, positions))
    ratios = log_ratio(drafts.states[:, :, 1:], target, (drafts.means, drafts.stds))
    u = uniform(state.keys, sampler.inside(state, positions), 1, Stream.ACCEPT)[..., 0]
    count = torch.minimum(accept(ratios, u).long().cumprod(1).sum(1), room)
    # what was refused is drawn from the residual of its own context; where nothing was, the target draws freely
    which = torch.arange(len(places), device=device)
    context = z[:, which, count, None]
    draft_z = drafts.z[:, which, count.clamp(max=num - 1), None]

    def propose(rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        where = (places + count)[rows, None]
        noise = sampler.noise_at(state, state.keys[rows], where, Stream.RESIDUAL, numbers)
        bonus = (count == num)[rows]
        if bool(bonus.any()):
            noise[bonus] = sampler.noise_at(state, state.keys[rows[bonus]], where[bonus])
        scale = sampler.scale_at(state, where)
        path = head.paths(context[:, rows], noise, scale)
        draft = draft_head.score(path.states, draft_z[:, rows], scale)
        ratio = log_ratio(path.states[:, :, 1:], (path.means, path.stds), draft)[:, 0]
        v = uniform(state.keys[rows], sampler.inside(state, where), 1, Stream.FRESH, numbers)
        return path.states[:, 0, -1], survive(ratio, v[:, 0, 0])

    free = (count == num) | (count == room)
    extra, chains, capped = draw_residual(len(places), propose, free, device)
    state.count(num_target_chains=chains, num_capped=capped)
    return extra.to(state.tokens.dtype), count


def judge_steps(
    sampler: Any, state: ContinuousState, z: Tensor, drafts: Drafts, places: Tensor, room: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the target's chains along the drafts': the extra token ``[A, D]`` and how many drafts pass ``[A]``."""
    head, num, device = state.head, drafts.tokens.shape[1], places.device
    where = (places[:, None] + torch.arange(num, device=device)).flatten()[:, None]  # n 1
    flat, scale = z[:, :, :num].flatten(1, 2), sampler.scale_at(state, where)
    states, means, stds = (t.flatten(0, 1) for t in (drafts.states, drafts.means, drafts.stds))
    keys, inside = state.keys.repeat_interleave(num), sampler.inside(state, where)
    num_steps = head.chain.num_steps
    u = uniform(keys, inside, num_steps, Stream.ACCEPT)[:, 0]
    x, capped, size = states[:, 0], 0, (states.shape[-1], states.dtype)
    for k in range(num_steps):
        index = torch.tensor(num_steps - 1 - k, device=device)
        mean, std = head.net.step_params(x, index, flat, head.chain, scale)

        def draw(rows: Tensor, numbers: Tensor, k: int = k) -> tuple[Tensor, Tensor]:
            number = numbers * num_steps + k
            noise = path_noise(keys[rows], inside[rows], 0, *size, Stream.RESIDUAL, number)
            return noise[:, 0, 0], uniform(keys[rows], inside[rows], 1, Stream.FRESH, number)[:, 0, 0]

        pair = (mean, std * head.temperature), (means[:, k], stds[:, k])
        x, _, met = couple_step(states[:, k + 1], *pair, u[:, k], draw)
        capped += met
    head.num_rows += flat.shape[:2].numel() * num_steps
    same = (x == states[:, -1]).all(-1).view(-1, num)
    count = torch.minimum(same.long().cumprod(1).sum(1), room)
    which = torch.arange(len(places), device=device)
    extra = x.view(len(places), num, -1)[which, count.clamp(max=num - 1)]
    bonus = (count == num).nonzero().flatten()
    if len(bonus):
        where = sampler.inside(state, places[bonus, None] + num)
        scale = sampler.scale_at(state, places[bonus, None] + num)
        extra[bonus] = head.draw(z[:, bonus, num, None], state.keys[bonus], where, scale)[:, 0]
    state.count(num_capped=capped)
    return extra.to(state.tokens.dtype), count
