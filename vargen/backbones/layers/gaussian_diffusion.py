"""The discrete Gaussian diffusion of MAR's head: cosine noise, learned variances, respaced steps.

Arithmetic of guided diffusion (Nichol and Dhariwal, 2021, arXiv:2102.09672), which MAR (arXiv:2406.11838) uses unchanged.
A chain runs x_S ~ N(0, I), x_{S-1}, ..., x_0; step k maps x_{k+1} to x_k.

Letters: S steps of a chain, T = 1000 steps of training, D numbers of a token, n rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_TIMESTEPS = 1000
_OFFSET = 0.008  # of the cosine schedule
_MAX_BETA = 0.999
_BIN = 1.0 / 255.0  # half a bin of the discretised likelihood, as for 8-bit pixels
_EDGE = 0.999
_TINY = 1e-12

TABLES = (
    "betas",
    "alphas_cumprod",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "log_betas",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def cosine_betas(num_timesteps: int = NUM_TIMESTEPS) -> Tensor:
    """Noise added at each training step, ``[T]`` float64."""

    def level(s: float) -> float:
        return math.cos((s + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2

    steps = [1 - level((i + 1) / num_timesteps) / level(i / num_timesteps) for i in range(num_timesteps)]
    return torch.tensor([min(beta, _MAX_BETA) for beta in steps], dtype=torch.float64)


def spaced_timesteps(
    sections: str | int, *, num_timesteps: int = NUM_TIMESTEPS, last_timestep: int | None = None
) -> tuple[int, ...]:
    """Choose which training steps a chain visits.

    Args:
        sections: number of steps; ``"a,b,..."`` cuts training into equal parts and takes so many steps of each.
        num_timesteps: T.
        last_timestep: later ones are moved there and duplicates merge (DiSA's chains stop at 950, arXiv:2505.20297).

    Returns:
        Ascending training steps.

    Raises:
        ValueError: not a list of counts, or a part is shorter than its count.

    Example:
        >>> spaced_timesteps(4), spaced_timesteps("4,0")
        ((0, 333, 666, 999), (0, 166, 333, 499))
    """
    try:
        counts = [int(part) for part in str(sections).split(",")]
    except ValueError:
        raise ValueError(f"diffusion steps must be a number or numbers with commas, got {sections!r}") from None
    size, extra = divmod(num_timesteps, len(counts))
    chosen: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        length = size + (i < extra)
        if not 0 <= count <= length:
            raise ValueError(f"diffusion steps must be in 0..{length} a section, got {count} of {sections!r}")
        stride = 1.0 if count <= 1 else (length - 1) / (count - 1)
        place = 0.0
        for _ in range(count):  # adding up, as the official code does: a product would round differently
            chosen.add(start + round(place))
            place += stride
        start += length
    if not chosen:
        raise ValueError(f"diffusion steps must be at least 1, got {sections!r}")
    if last_timestep is not None:
        chosen = {min(step, last_timestep) for step in chosen}
    return tuple(sorted(chosen))


class GaussianDiffusion:
    """Coefficients of a chain over some of the training steps, float64 on the host, float32 at use.

    Args:
        timesteps: training steps that are visited, ascending.
    """

    def __init__(self, timesteps: Sequence[int]) -> None:
        self.timestep_map = torch.tensor(timesteps)
        cumulative = (1 - cosine_betas()).cumprod(0)[self.timestep_map]
        previous = F.pad(cumulative[:-1], (1, 0), value=1.0)
        betas = 1 - cumulative / previous
        # the product of the new factors and not the old one: they differ in the last bits, and here these matter
        alphas = (1 - betas).cumprod(0)
        before = F.pad(alphas[:-1], (1, 0), value=1.0)
        variance = betas * (1 - before) / (1 - alphas)
        self.betas, self.alphas_cumprod = betas, alphas
        self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod = alphas.sqrt(), (1 - alphas).sqrt()
        self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod = (1 / alphas).sqrt(), (1 / alphas - 1).sqrt()
        self.log_betas = betas.log()
        self.posterior_log_variance_clipped = (
            torch.cat([variance[1:2], variance[1:]]) if len(betas) > 1 else betas
        ).log()
        self.posterior_mean_coef1 = betas * before.sqrt() / (1 - alphas)
        self.posterior_mean_coef2 = (1 - before) * (1 - betas).sqrt() / (1 - alphas)
        self._rounded: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    @property
    def num_steps(self) -> int:
        """Steps of the chain, S."""
        return len(self.timestep_map)

    def table(self, name: str, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Look one of ``TABLES`` up: steps ``[...]`` int64 to ``[..., 1]``."""
        key = (index.device, dtype)
        if key not in self._rounded:
            self._rounded[key] = {n: getattr(self, n).to(index.device, dtype) for n in TABLES}
        return self._rounded[key][name][index][..., None]

    def timesteps(self, index: Tensor) -> Tensor:
        """Training steps that the network is told, for steps ``[...]`` of the chain."""
        return self.timestep_map.to(index.device)[index]

    def add_noise(self, x_0: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        """Draw x_index from x_0 ``[n, D]`` with the noise given."""
        scale, spread = self._scales(index, x_0.dtype)
        return scale * x_0 + spread * noise

    def velocity(self, x_0: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        """Noise and clean token mixed, ``sqrt(abar) noise - sqrt(1 - abar) x_0`` (Salimans and Ho, 2022)."""
        scale, spread = self._scales(index, x_0.dtype)
        return scale * noise - spread * x_0

    def noise_from_velocity(self, x: Tensor, index: Tensor, velocity: Tensor) -> Tensor:
        """The noise in x ``[..., D]`` that a velocity means."""
        scale, spread = self._scales(index, x.dtype)
        return scale * velocity + spread * x

    def predict_x0(self, x: Tensor, index: Tensor, eps: Tensor) -> Tensor:
        """The clean token that x ``[..., D]`` and a guess of its noise imply; not clipped."""
        scale = self.table("sqrt_recip_alphas_cumprod", index, x.dtype)
        return scale * x - self.table("sqrt_recipm1_alphas_cumprod", index, x.dtype) * eps

    def mean(self, x: Tensor, index: Tensor, eps: Tensor) -> Tensor:
        """Mean of the next state ``[..., D]``."""
        return self.posterior_mean(self.predict_x0(x, index, eps), x, index)

    def posterior_mean(self, x_0: Tensor, x: Tensor, index: Tensor) -> Tensor:
        """Mean of the next state given both ends."""
        first = self.table("posterior_mean_coef1", index, x.dtype)
        return first * x_0 + self.table("posterior_mean_coef2", index, x.dtype) * x

    def _scales(self, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Shares of token and noise in x_index."""
        return self.table("sqrt_alphas_cumprod", index, dtype), self.table(
            "sqrt_one_minus_alphas_cumprod", index, dtype
        )

    def log_variance(self, index: Tensor, values: Tensor) -> Tensor:
        """Learned variance ``[..., D]``: values of about -1..1 move it between its two bounds, not clamped."""
        low = self.table("posterior_log_variance_clipped", index, values.dtype)
        high = self.table("log_betas", index, values.dtype)
        share = (values + 1) / 2
        return share * high + (1 - share) * low

    def variational_bits(self, x_0: Tensor, x: Tensor, index: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """One term of the variational bound in bits, averaged over D: ``[n]``."""
        true_mean = self.posterior_mean(x_0, x, index)
        true_log = self.table("posterior_log_variance_clipped", index, x.dtype)
        kl = gaussian_kl(true_mean, true_log, mean, log_variance).mean(-1) / math.log(2)
        nll = -discretized_log_likelihood(x_0, mean, 0.5 * log_variance).mean(-1) / math.log(2)
        return torch.where(index == 0, nll, kl)


def gaussian_kl(mean_a: Tensor, log_var_a: Tensor, mean_b: Tensor, log_var_b: Tensor) -> Tensor:
    """KL(a || b) of normal distributions in nats, elementwise."""
    gap = (mean_a - mean_b).square() * torch.exp(-log_var_b)
    return 0.5 * (-1.0 + log_var_b - log_var_a + torch.exp(log_var_a - log_var_b) + gap)


def discretized_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Logarithm of the mass of a normal distribution in the bin around x, elementwise; tails beyond 0.999 belong to the end bins."""

    def cdf(y: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * y.pow(3))))

    centered, sharpness = x - means, torch.exp(-log_scales)
    above, below = cdf(sharpness * (centered + _BIN)), cdf(sharpness * (centered - _BIN))
    inside = (above - below).clamp(min=_TINY).log()
    outside = torch.where(x > _EDGE, (1.0 - below).clamp(min=_TINY).log(), inside)
    return torch.where(x < -_EDGE, above.clamp(min=_TINY).log(), outside)


@lru_cache(maxsize=256)
def make_diffusion(sections: str | int, last_timestep: int | None = None) -> GaussianDiffusion:
    """The chain over ``spaced_timesteps``; one object for every user of the same steps."""
    return GaussianDiffusion(spaced_timesteps(sections, last_timestep=last_timestep))


@lru_cache(maxsize=1)
def training_diffusion() -> GaussianDiffusion:
    """All steps of training."""
    return GaussianDiffusion(range(NUM_TIMESTEPS))
