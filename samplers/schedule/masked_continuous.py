"""Masked decoding of continuous tokens: several at a time in a random order (MAR, Li et al., 2024, arXiv:2406.11838).

One step is one forward pass: states of all positions, chains of the head for those whose turn it is. Tokens of one step are
independent given the ones before. The loop stays apart from that of schedules, with which it would share only the counting: each
image has targets and an order of its own, there is no session, and the chain changes from pass to pass. DiSA (Zhao et al., 2025, arXiv:2505.20297) shortens the chains as tokens accumulate.

Letters: B images, N tokens, D numbers of a token, S steps of a chain, G guidance branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.outputs import Guarantee
from vargen.random import Stream, uniform
from vargen.samplers.base import Inputs, Run
from vargen.samplers.heads.diffusion import ChainHead, ChainNoise, ContinuousSampler, work_dtype
from vargen.samplers.state import DecodeState
from vargen.validation.checks import check_choice, check_integer

STEP_SCHEDULES = ("linear", "two_stage")


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedContinuousInputs(Inputs):
    """What a call may give.

    Args:
        orders: ``[B, N]`` permutations, the last positions are drawn first; None draws them from the seeds.
        noise: ``noise(images [n], positions [n], S) -> [n, S + 1, D]`` instead of the counter-based one.
    """

    orders: Tensor | None = None
    noise: Callable[[Tensor, Tensor, int], Tensor] | None = None


@dataclass(kw_only=True)
class MaskedContinuousState(DecodeState):
    """Everything that changes while masked tokens are drawn; the session is the prepared condition."""

    orders: Tensor  # [B, N] int64, position of the i-th token; the last ones are drawn first
    noise: ChainNoise | None


@dataclass(frozen=True, kw_only=True)
class ContinuousMaskedSampler(ContinuousSampler):
    """Draw the tokens of a bidirectional model in ``num_steps`` passes, one at first and ever more: a cosine.

    ``num_steps`` = N draws one token a pass. The official models use 256 passes, guidance 2.9 (base), 3.0 (large) or 3.2
    (huge), and 64 passes where speed counts; without guidance, temperature 0.95.

    Args:
        guidance_scale, temperature, guidance_schedule, num_diffusion_steps: as in ``ContinuousSampler``.
        num_steps: forward passes, at most N.
        last_diffusion_steps: DiSA: chains shorten from ``num_diffusion_steps`` to this; None keeps them. DiSA goes from 50
            to 5 in 64 passes.
        step_schedule: DiSA: ``"linear"``, or ``"two_stage"``, short from the middle on.
        last_timestep: chains start no later than at this training step; DiSA's start at 950, where the first step is well
            conditioned. None is 999, the official start.

    Example:
        >>> sampler = ContinuousMaskedSampler(num_steps=64, num_diffusion_steps=50, last_diffusion_steps=5)
        >>> [sampler.steps_at(s) for s in (0, 32, 63)]
        [50, 27, 5]
    """

    guarantee: ClassVar[Guarantee] = "exact"
    required_features: ClassVar[frozenset[str]] = frozenset({Feature.CONTINUOUS, Feature.MASKED_CONTINUOUS})
    inputs_type: ClassVar[type[Inputs]] = MaskedContinuousInputs

    num_steps: int = 64
    last_diffusion_steps: int | None = None
    step_schedule: str = "linear"
    last_timestep: int | None = None

    def check(self) -> None:
        """Raise ``ValueError`` for a setting out of range."""
        super().check()
        check_integer("num_steps", self.num_steps, low=1)
        check_choice("step_schedule", self.step_schedule, STEP_SCHEDULES)
        if self.last_timestep is not None:
            check_integer("last_timestep", self.last_timestep, low=1, high=999, hint="None is 999")
        if self.last_diffusion_steps is not None:
            check_integer("last_diffusion_steps", self.last_diffusion_steps, low=1, hint="None is off")
            if not isinstance(self.num_diffusion_steps, int):
                raise ValueError(
                    f"last_diffusion_steps needs num_diffusion_steps, the number to start from, got "
                    f"{self.num_diffusion_steps!r}; DiSA uses 50 and 5"
                )

    def steps_at(self, s: int) -> int | str | None:
        """Diffusion steps of pass ``s``."""
        upper, lower = self.num_diffusion_steps, self.last_diffusion_steps
        if lower is None or not isinstance(upper, int):
            return upper
        if self.step_schedule == "two_stage":
            return upper if s < self.num_steps // 2 else lower
        return lower + int((self.num_steps - 1 - s) / max(self.num_steps - 1, 1) * (upper - lower))

    def num_left(self, s: int, num_masked: int, num_tokens: int) -> int:
        """How many of ``num_masked`` tokens are still masked after pass ``s``."""
        if s == self.num_steps - 1:
            return 0
        return max(1, min(num_masked - 1, int(num_tokens * math.cos(math.pi / 2 * (s + 1) / self.num_steps))))

    def begin(self, run: Run, inputs: MaskedContinuousInputs) -> MaskedContinuousState:
        """Choose the orders and draw the first tokens."""
        backbone, keys, shape = run.backbone, run.keys, (len(run.seeds), run.backbone.num_codes)
        check_integer("num_steps", self.num_steps, low=1, high=shape[1], hint="the number of tokens")
        orders = inputs.orders
        if orders is None:
            orders = uniform(keys, torch.zeros_like(keys)[:, None], shape[1], Stream.ORDER)[:, 0]
            orders = orders.argsort(dim=-1, stable=True)
        state = MaskedContinuousState(
            backbone=backbone,
            session=run.condition,
            seeds=run.seeds,
            keys=keys,
            rows=torch.arange(shape[0], device=keys.device),
            tokens=torch.full((*shape, backbone.token_dim), math.nan, dtype=work_dtype(backbone), device=keys.device),
            trace=torch.full(shape, -1, device=keys.device),
            orders=orders.to(keys.device),
            noise=None if inputs.noise is None else partial(_given_noise, inputs.noise),
        )
        return self.step(state)

    @torch.no_grad()
    def step(self, state: MaskedContinuousState) -> MaskedContinuousState:
        """Spend one forward pass: draw the tokens of the next pass. Advances the state in place."""
        s, head, num_tokens = state.num_forwards, state.backbone.head, state.trace.shape[1]
        masked = state.trace < 0
        z = state.backbone.predict(state.session, state.tokens.nan_to_num(), masked)
        num_masked = int(masked[0].sum())
        left = self.num_left(s, num_masked, num_tokens)
        positions = state.orders[:, left:num_masked].sort(-1).values  # B g
        images = state.rows[:, None]
        chains = ChainHead(
            net=head,
            chain=head.diffusion(self.steps_at(s), self.last_timestep),
            dtype=state.tokens.dtype,
            temperature=self.temperature,
            noise=state.noise,
        )
        scale = self.guidance_at(num_tokens - left, num_tokens)
        state.tokens[images, positions] = chains.draw(z[:, images, positions], state.keys, positions, scale)
        state.trace[images, positions] = s
        state.num_forwards += 1
        state.num_head_rows += chains.num_rows
        state.done = left == 0
        return state

    def departures(self, state: MaskedContinuousState) -> list[str]:
        """Shortened chains sample another distribution."""
        if self.last_diffusion_steps is None and self.last_timestep is None:
            return []
        return ["chains were shortened (DiSA): the distribution of a token is not the model's own"]


def _given_noise(
    noise: Callable[[Tensor, Tensor, int], Tensor], keys: Tensor, positions: Tensor, steps: int
) -> Tensor:
    """What a call gives instead of noise by seed, ``[B, g, S + 1, D]``."""
    images = torch.arange(len(keys), device=keys.device)[:, None].expand_as(positions)
    return noise(images.flatten(), positions.flatten(), steps).unflatten(0, positions.shape)
