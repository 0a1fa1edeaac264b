"""What samplers of continuous tokens share: settings of guidance and chains, counter-based normal noise, statistics.

A token is drawn by a chain of the backbone's diffusion head. Its S + 1 rows of noise (the start, then one row a step) are keyed
by the image's seed and the token's position, so an image depends on its seed and its settings only.

Letters: B images, N tokens, D numbers of a token, S steps of a chain, G guidance branches, n tokens drawn at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.random import Stream, normal
from vargen.samplers.base import Sampler
from vargen.validation.checks import check_choice, check_integer

GUIDANCE_SCHEDULES = ("linear", "constant")

ChainNoise = Callable[[Tensor, Tensor, int], Tensor]  # images [n], positions [n], S to [n, S + 1, D]


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

    def check_backbone(self, backbone: Any) -> None:
        """Raise ``ValueError`` unless the backbone has continuous tokens and what else this sampler needs."""
        offered = Feature.of(backbone)
        missing = self.required_features - offered
        if missing:
            raise ValueError(
                f"{type(self).__name__} needs a backbone with {', '.join(sorted(missing))}; {type(backbone).__name__} "
                f"offers {', '.join(sorted(offered)) or 'none of it'}"
            )

    def guidance_at(self, num_known: Tensor | int, num_tokens: int) -> Any:
        """The guidance scale of tokens with which ``num_known`` of N will be known."""
        if self.guidance_schedule == "constant":
            return self.guidance_scale
        # the last tokens are guided like those before them, as in the official code
        known = (
            num_known.clamp(max=num_tokens - 1) if isinstance(num_known, Tensor) else min(num_known, num_tokens - 1)
        )
        return 1.0 + (self.guidance_scale - 1.0) * known / num_tokens


def philox_noise(keys: Tensor, token_dim: int, dtype: torch.dtype) -> ChainNoise:
    """Noise of chains by seed and position; ``keys [B]`` int64."""

    def draw(images: Tensor, positions: Tensor, num_steps: int) -> Tensor:
        return path_noise(keys[images], positions, num_steps, token_dim, dtype)

    return draw


def path_noise(
    keys: Tensor,
    positions: Tensor,
    num_steps: int,
    token_dim: int,
    dtype: torch.dtype,
    stream: Stream = Stream.NORMAL,
    iteration: Tensor | None = None,
) -> Tensor:
    """Standard normal numbers ``[n, S + 1, D]`` for keys and positions ``[n]``."""
    flat = normal(keys, positions[:, None], (num_steps + 1) * token_dim, stream, iteration)
    return flat.to(dtype).view(len(keys), num_steps + 1, token_dim)


def work_dtype(backbone: Any) -> torch.dtype:
    """Dtype in which tokens are kept: float32, or better where the weights are."""
    return torch.promote_types(backbone.dtype, torch.float32)
