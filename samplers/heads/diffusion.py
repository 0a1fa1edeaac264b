"""Continuous tokens: the head that draws them by diffusion chains, and the settings that their samplers share.

A token's S + 1 rows of noise (the start, then one row a step) are keyed by the image's seed and the token's position.

Letters: A images, N tokens, D numbers of a token, S steps of a chain, G guidance branches, g tokens an image drawn at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.random import Stream, normal
from vargen.samplers.base import GUIDANCE_SCHEDULES, Sampler
from vargen.validation.checks import check_choice, check_integer

ChainNoise = Callable[[Tensor, Tensor, int], Tensor]  # keys [A], positions [A, g], S to [A, g, S + 1, D]


@dataclass(frozen=True, kw_only=True)
class ContinuousSampler(Sampler):
    """Base of the samplers of continuous tokens.

    Args:
        guidance_scale: ``u + guidance_scale * (c - u)`` on the guess of the noise; 1 is off.
        temperature: multiplies the noise of a chain's steps, not its start.
        top_k: must stay 0; continuous tokens have no codes to keep.
        top_p: must stay 1.
        guidance_schedule: ``"linear"``: from none at the first token to all at the last (official), or ``"constant"``.
        num_diffusion_steps: S; ``"a,b,..."`` sets the steps of equal parts of the training steps; None is the model's own.
    """

    guidance_schedule: str = "linear"
    num_diffusion_steps: int | str | None = None

    required_features: ClassVar[frozenset[str]] = frozenset({Feature.CONTINUOUS})

    def check(self) -> None:
        """Raise ``ValueError`` for a setting out of range."""
        super().check()
        for name, off in (("top_k", 0), ("top_p", 1.0)):
            if getattr(self, name) != off:
                raise ValueError(
                    f"{name} must be {off:g} for {type(self).__name__}, got {getattr(self, name)}; continuous tokens "
                    "have no codes to keep, lower temperature instead"
                )
        check_choice("guidance_schedule", self.guidance_schedule, GUIDANCE_SCHEDULES)
        if not isinstance(self.num_diffusion_steps, str | None):
            check_integer("num_diffusion_steps", self.num_diffusion_steps, low=1, hint="None is the model's own")

    def guidance_at(self, num_known: Tensor | int, num_tokens: int) -> Any:
        """The guidance scale of tokens with which ``num_known`` of N will be known."""
        if self.guidance_schedule == "constant":
            return self.guidance_scale
        # the last tokens are guided like those before them, as in the official code
        known = (
            num_known.clamp(max=num_tokens - 1) if isinstance(num_known, Tensor) else min(num_known, num_tokens - 1)
        )
        return 1.0 + (self.guidance_scale - 1.0) * known / num_tokens


@dataclass(kw_only=True)
class ChainHead:
    """The ``TokenHead`` of continuous tokens: each is the end of a chain of the backbone's diffusion head."""

    net: Any  # the diffusion head of a backbone, which runs chains and scores them
    chain: Any  # its S steps
    dtype: torch.dtype  # of the tokens
    temperature: float = 1.0
    final_noise: bool = False  # the last step adds its noise too
    noise: ChainNoise | None = None  # instead of the counter-based one
    num_rows: int = 0  # of the network, spent so far

    def draw(self, rows: Tensor, keys: Tensor, positions: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """Draw tokens ``[A, g, D]``."""
        if self.noise is None:
            noise = path_noise(keys, positions, self.chain.num_steps, self.net.token_dim, self.dtype)
        else:
            noise = self.noise(keys, positions, self.chain.num_steps)
        return self.paths(rows, noise, guidance_scale).states[:, :, -1].to(self.dtype)

    def paths(self, rows: Tensor, noise: Tensor, guidance_scale: float | Tensor) -> Any:
        """Whole chains for noise ``[A, g, S + 1, D]``: states of that shape, means and deviations ``[A, g, S, D]``."""
        self.num_rows += rows.shape[:3].numel() * self.chain.num_steps
        path = self.net.sample(
            rows.flatten(1, 2),
            noise.flatten(0, 1),
            self.chain,
            guidance_scale=_column(guidance_scale, noise),
            temperature=self.temperature,
            final_noise=self.final_noise,
        )
        return type(path)(*(part.unflatten(0, noise.shape[:2]) for part in path))

    def score(self, states: Tensor, rows: Tensor, guidance_scale: float | Tensor) -> tuple[Tensor, Tensor]:
        """Means and deviations ``[A, g, S, D]`` of the steps of given chains ``[A, g, S + 1, D]``."""
        self.num_rows += rows.shape[:3].numel() * self.chain.num_steps
        mean, std = self.net.path_params(
            states.flatten(0, 1),
            rows.flatten(1, 2),
            self.chain,
            guidance_scale=_column(guidance_scale, states),
            temperature=self.temperature,
        )
        return mean.unflatten(0, states.shape[:2]), std.unflatten(0, states.shape[:2])


def _column(guidance_scale: float | Tensor, like: Tensor) -> float | Tensor:
    """One scale a token ``[A, g]`` as ``[A g, 1]``; a number as it is."""
    return guidance_scale.to(like).flatten()[:, None] if isinstance(guidance_scale, Tensor) else guidance_scale


def path_noise(
    keys: Tensor,
    positions: Tensor,
    num_steps: int,
    token_dim: int,
    dtype: torch.dtype,
    stream: Stream = Stream.NORMAL,
    iteration: Tensor | None = None,
) -> Tensor:
    """Standard normal numbers ``[A, g, S + 1, D]`` for keys ``[A]`` and positions ``[A, g]``."""
    flat = normal(keys, positions, (num_steps + 1) * token_dim, stream, iteration)
    return flat.to(dtype).unflatten(-1, (num_steps + 1, token_dim))


def work_dtype(backbone: Any) -> torch.dtype:
    """Dtype in which tokens are kept: float32, or better where the weights are."""
    return torch.promote_types(backbone.dtype, torch.float32)
