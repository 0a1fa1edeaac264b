"""Toys with known laws: causal backbones over continuous tokens whose head is exact, and tests of what was sampled.

The chain law of a linear Gaussian conditional is Gaussian and computed here from the steps' means; mixtures are compared with
chains of the target.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from vargen.backbones.layers.diffusion_head import DiffusionHead
from vargen.backbones.layers.gaussian_diffusion import training_diffusion

DTYPE = torch.float64


class ExactNet(nn.Module):
    """The noise that a mixture around c implies, and a constant place of the variance.

    Components sit at c + offsets; ``offsets [K, D]``, one spread, equal weights unless given.
    """

    def __init__(self, offsets: Tensor, spread: float, values: float, weights: Tensor | None = None) -> None:
        super().__init__()
        self.offsets, self.spread, self.values = offsets.to(DTYPE), spread, values
        self.log_weights = torch.zeros(len(offsets), dtype=DTYPE) if weights is None else weights.to(DTYPE).log()

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        alpha = training_diffusion().alphas_cumprod.to(DTYPE)[t][..., None]
        variance = alpha * self.spread**2 + 1 - alpha
        centers = c[..., None, :] + self.offsets  # ... K D
        gaps = x[..., None, :] - alpha[..., None].sqrt() * centers
        logits = self.log_weights - 0.5 * gaps.square().sum(-1) / variance
        mean = (logits.softmax(-1)[..., None] * gaps).sum(-2)
        eps = (1 - alpha).sqrt() * mean / variance
        return torch.cat([eps, torch.full_like(eps, self.values)], dim=-1)


class ToyHead(DiffusionHead):
    """A head with an exact network."""

    def __init__(self, net: nn.Module, dim: int, num_steps: int) -> None:
        nn.Module.__init__(self)
        self.token_dim, self.num_sampling_steps, self.last_timestep, self.net = dim, str(num_steps), None, net
        self.prediction_type = "epsilon"


class ToyCausal:
    """Token i is drawn around ``slope * token[i - 1] + shift``; the unconditional branch has its own shift.

    Also decodes like a bidirectional model: an unknown neighbour counts as zero.
    """

    features = frozenset({"continuous", "continuous_window", "masked_continuous", "ragged"})
    device, dtype, training = torch.device("cpu"), DTYPE, False

    def __init__(
        self, net: nn.Module, *, dim: int, num_tokens: int = 4, num_steps: int = 10, slope: float = 0.8,
        shift: float = 0.3, null_shift: float = -0.5,
    ) -> None:  # fmt: skip
        self.head = ToyHead(net, dim, num_steps)
        self.token_dim, self.num_codes, self.grid_size = dim, num_tokens, (1, num_tokens)
        self.slope, self.shifts = slope, (shift, null_shift)

    def contexts(self, before: Tensor, branches: int) -> Tensor:
        return torch.stack([self.slope * before + shift for shift in self.shifts[:branches]])

    def prepare(self, condition: Tensor, *, guidance_scale: float = 1.0) -> Any:
        return SimpleNamespace(batch=len(condition), branches=1 if guidance_scale == 1 else 2)

    def open(self, condition: Any, *, max_window: int = 1) -> tuple[Any, Any]:
        start = torch.zeros(condition.batch, 1, self.token_dim, dtype=DTYPE)
        return SimpleNamespace(branches=condition.branches), SimpleNamespace(
            logits=self.contexts(start, condition.branches)
        )

    def step(self, session: Any, tokens: Tensor) -> Any:
        return SimpleNamespace(logits=self.contexts(tokens, session.branches))

    def commit(self, session: Any, n: Any) -> None:
        """Nothing: a state depends on one token."""

    def select(self, session: Any, rows: Tensor) -> None:
        """Nothing."""

    def predict(self, condition: Any, tokens: Tensor, mask: Tensor) -> Tensor:
        known = tokens.masked_fill(mask[..., None], 0.0)
        before = torch.cat([torch.zeros_like(known[:, :1]), known[:, :-1]], dim=1)
        return self.contexts(before, condition.branches)


def linear_gaussian(*, spread: float = 0.5, values: float = 0.0, dim: int = 3, **settings: Any) -> ToyCausal:
    return ToyCausal(ExactNet(torch.zeros(1, dim), spread, values), dim=dim, **settings)


def mixture(*, move: float = 0.0, values: float = 0.2, **settings: Any) -> ToyCausal:
    """Three components in the plane; ``move`` displaces them, which makes a draft of the target."""
    offsets = torch.tensor([[1.5, 0.0], [-0.8, 1.2], [-0.6, -1.3]]) + move
    weights = torch.tensor([0.5 - move, 0.3, 0.2 + move])
    return ToyCausal(ExactNet(offsets, 0.35 * (1 + move), values, weights), dim=2, **settings)


def chain_law(
    toy: ToyCausal, scale: float = 1.0, temperature: float = 1.0, final_noise: bool = True
) -> tuple[float, float, float]:
    """Weights of the conditional and unconditional mean in a token's mean, and its variance."""
    chain = toy.head.diffusion()
    branches = 1 if scale == 1 else 2
    gains = [0.0, 0.0]
    variance = 1.0

    def mean_of(x: float, c: float, u: float, k: int) -> float:
        z = torch.tensor([c, u], dtype=DTYPE)[:branches, None, None].expand(-1, 1, toy.token_dim)
        point = torch.full((1, toy.token_dim), x, dtype=DTYPE)
        return float(toy.head.step_params(point, torch.tensor([k]), z, chain, scale)[0][0, 0])

    for k in reversed(range(chain.num_steps)):
        slope = mean_of(1.0, 0.0, 0.0, k)
        gains = [slope * gains[0] + mean_of(0.0, 1.0, 0.0, k), slope * gains[1] + mean_of(0.0, 0.0, 1.0, k)]
        z = torch.zeros(branches, 1, toy.token_dim, dtype=DTYPE)
        std = toy.head.step_params(torch.zeros(1, toy.token_dim, dtype=DTYPE), torch.tensor([k]), z, chain, scale)[1]
        noise = temperature * float(std[0, 0]) if k > 0 or final_noise else 0.0
        variance = slope**2 * variance + noise**2
    return gains[0], gains[1], variance


def whiten(toy: ToyCausal, tokens: Tensor, scales: list[float], temperature: float = 1.0) -> Tensor:
    """Residuals ``[B, N, D]``: independent standard normal numbers iff the tokens have the law of the guided chains."""
    before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)
    out = []
    for i, scale in enumerate(scales):
        c, u, variance = chain_law(toy, scale, temperature)
        cond, null = (toy.slope * before[:, i] + shift for shift in toy.shifts)
        out.append((tokens[:, i] - c * cond - u * null) / math.sqrt(variance))
    return torch.stack(out, dim=1)


def normality(white: Tensor) -> dict[str, float]:
    """p-values of five tests that ``white [B, N, D]`` is independent N(0, 1), each corrected for its own comparisons."""
    flat = white.flatten(1)
    count, size = flat.shape
    norm = stats.norm
    ks = min(stats.kstest(column.numpy(), "norm").pvalue for column in flat.T)
    covariance = flat.T @ flat / count
    spread = torch.where(torch.eye(size, dtype=torch.bool), math.sqrt(2.0), 1.0)
    z_cov = float(((covariance - torch.eye(size, dtype=DTYPE)) / spread).abs().max() * math.sqrt(count))
    z_mean = float(flat.mean(0).abs().max() * math.sqrt(count))
    return {
        "ks": min(1.0, ks * size),
        "chi2": float(stats.kstest(flat.square().sum(1).numpy(), "chi2", args=(size,)).pvalue),
        "mean": min(1.0, 2 * norm.sf(z_mean) * size),
        "covariance": min(1.0, 2 * norm.sf(z_cov) * size * (size + 1) / 2),
        "pooled": float(stats.kstest(flat.flatten().numpy(), "norm").pvalue),
    }


def compare(a: Tensor, b: Tensor, seed: int = 0) -> dict[str, float]:
    """Two samples ``[n, N, D]``: smallest two-sample KS p (corrected), energy test p by permutation, lag-1 covariance z."""
    x, y = a.flatten(1), b.flatten(1)
    n, size = x.shape
    ks = min(stats.ks_2samp(p.numpy(), q.numpy()).pvalue for p, q in zip(x.T, y.T, strict=True))
    both = torch.cat([x, y]).float()
    distances = torch.cdist(both, both)
    label = torch.cat([torch.full((n,), 1.0 / n), torch.full((n,), -1.0 / n)])
    generator = torch.Generator().manual_seed(seed)
    labels = torch.stack([label, *(label[torch.randperm(2 * n, generator=generator)] for _ in range(199))], dim=1)
    energy = -(labels * (distances @ labels)).sum(0)
    products = [(t[:, 1:] * t[:, :-1]).mean(2) for t in (a, b)]  # n N-1
    gap = products[0].mean(0) - products[1].mean(0)
    error = ((products[0].var(0) + products[1].var(0)) / n).sqrt()
    z = float((gap / error).abs().max())
    return {
        "ks": min(1.0, ks * size),
        "energy": float((energy >= energy[0]).double().mean()),
        "lag": min(1.0, float(2 * stats.norm.sf(z)) * len(gap)),
        "energy_distance": float(energy[0]),
        "lag_error": float(gap.abs().max()),
    }
