"""MAR's head: a small network from the state of one position to a distribution over continuous tokens, by diffusion.

The "DiffLoss" of Li et al., 2024 (arXiv:2406.11838) under the parameter names of its checkpoints. Backbones return z, the
sampler owns the chain: every function here takes its noise and its steps from outside.

Letters: n tokens, D numbers of a token, Z width of z, W width of the network, S steps, G guidance branches.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.backbones.layers.gaussian_diffusion import (
    NUM_TIMESTEPS,
    GaussianDiffusion,
    make_diffusion,
    spaced_timesteps,
    training_diffusion,
)
from vargen.hooks import compute_dtype, runs_as_forward

NUM_FREQUENCIES = 128
LONGEST_PERIOD = 10000.0
PREDICTION_TYPES = ("epsilon", "v_prediction")
_LOG_2PI = math.log(2 * math.pi)


class Path(NamedTuple):
    """A chain and the distributions it was drawn from, in the order in which its steps were taken."""

    states: Tensor  # [n, S + 1, D]: x_S, ..., x_0
    means: Tensor  # [n, S, D]
    stds: Tensor  # [n, S, D], temperature included


class TimeEmbedding(nn.Module):
    """Sinusoids of the time, cosines first, through two linear layers; diffusers' function gives the same in twice the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """``[...]`` times to ``[..., W]``."""
        dtype = compute_dtype(self.mlp[0])
        steps = torch.arange(NUM_FREQUENCIES, device=t.device, dtype=torch.float32)
        frequencies = torch.exp(-math.log(LONGEST_PERIOD) * steps / NUM_FREQUENCIES)
        angles = t[..., None].float() * frequencies
        return cast(Tensor, self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)))


class HeadBlock(nn.Module):
    """Modulated norm, two linear layers, gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``x [..., W]`` under the condition ``y [..., W]``."""
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        h = torch.addcmul(shift, self.in_ln(x), 1 + scale)
        return torch.addcmul(x, gate, self.mlp(h))


class HeadOutput(nn.Module):
    """Modulated norm without own weights, and the last linear layer."""

    def __init__(self, width: int, out_dim: int) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(width, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``x [..., W]`` to ``[..., 2 D]``."""
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return cast(Tensor, self.linear(torch.addcmul(shift, F.layer_norm(x, (self.width,), eps=1e-6), 1 + scale)))


class DenoisingMLP(nn.Module):
    """The network: noisy token, time and z to a guess of the noise and the place of the variance between its bounds."""

    def __init__(self, token_dim: int, condition_dim: int, depth: int, width: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(condition_dim, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.final_layer = HeadOutput(width, 2 * token_dim)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier, small time embedding; modulations and the last layer start at zero, as in the official training."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for i in (0, 2):
            nn.init.normal_(cast(Tensor, self.time_embed.mlp[i].weight), std=0.02)
        gated = [*self.res_blocks, self.final_layer]
        for layer in [*(part.adaLN_modulation[1] for part in gated), self.final_layer.linear]:  # type: ignore[index,union-attr]
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type,union-attr]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type,union-attr]

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """Leading axes broadcast: x ``[..., D]``, t ``[...]`` training steps, c ``[..., Z]``, to ``[..., 2 D]``."""
        y = self.time_embed(t) + self.cond_embed(c)
        h = self.input_proj(x)
        for block in self.res_blocks:
            h = block(h, y)
        return cast(Tensor, self.final_layer(h, y))


class DiffusionHead(nn.Module):
    """Loss, steps, chains and path distributions of the denoising network.

    Args:
        token_dim: D.
        condition_dim: Z.
        depth: blocks.
        width: W.
        num_sampling_steps: steps of a chain unless the sampler says otherwise, see ``spaced_timesteps``.
        last_timestep: where chains start unless the sampler says otherwise; None = 999, the official start. The first step
            from there multiplies the error of a guessed noise by hundreds, which only long training forgives.
        prediction_type: what the network guesses: ``"epsilon"``, the noise (official), or ``"v_prediction"``, the noise and
            the token mixed so that no step magnifies the error (Salimans and Ho, 2022, arXiv:2202.00512).
    """

    def __init__(
        self,
        token_dim: int,
        condition_dim: int,
        depth: int,
        width: int,
        num_sampling_steps: str | int = "100",
        last_timestep: int | None = None,
        prediction_type: str = "epsilon",
    ) -> None:
        super().__init__()
        spaced_timesteps(num_sampling_steps)  # refuse now what no chain can run
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
        self.prediction_type = prediction_type
        self.token_dim, self.num_sampling_steps = token_dim, str(num_sampling_steps)
        self.last_timestep = last_timestep
        self.net = DenoisingMLP(token_dim, condition_dim, depth, width)

    def diffusion(self, num_steps: str | int | None = None, last_timestep: int | None = None) -> GaussianDiffusion:
        """The chain of so many steps, from so late on; None = the model's own."""
        last = self.last_timestep if last_timestep is None else last_timestep
        return make_diffusion(self.num_sampling_steps if num_steps is None else num_steps, last)

    @runs_as_forward
    def losses(self, target: Tensor, z: Tensor, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of the guess and the variational term in bits, which trains the variance alone.

        Args:
            target: ``[n, D]`` clean tokens.
            z: ``[n, Z]``.
            timesteps: ``[n]`` int64 training steps.
            noise: ``[n, D]``.

        Returns:
            Two tensors ``[n]``; the official loss is their sum.
        """
        chain, target = training_diffusion(), target.float()
        x = chain.add_noise(target, timesteps, noise)
        guess, values = self.net(x.to(z.dtype), timesteps, z).float().chunk(2, dim=-1)
        mean = chain.mean(x, timesteps, self._noise(chain, x, timesteps, guess.detach()))
        bits = chain.variational_bits(target, x, timesteps, mean, chain.log_variance(timesteps, values))
        wanted = noise if self.prediction_type == "epsilon" else chain.velocity(target, timesteps, noise)
        return (wanted - guess).square().mean(-1), bits

    def loss(
        self,
        target: Tensor,
        z: Tensor,
        mask: Tensor | None = None,
        *,
        repeats: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The training loss at random times.

        Args:
            target: ``[n, D]`` clean tokens.
            z: ``[n, Z]``.
            mask: ``[n]``, weight of each token; None counts all alike.
            repeats: times and noises drawn a token.
            generator: for times and noise.
        """
        target, z = target.repeat(repeats, 1), z.repeat(repeats, 1)
        timesteps = torch.randint(NUM_TIMESTEPS, (len(target),), generator=generator, device=target.device)
        noise = torch.randn(target.shape, generator=generator, device=target.device)
        error, bits = self.losses(target, z, timesteps, noise)
        if mask is None:
            return (error + bits).mean()
        weight = mask.float().repeat(repeats)
        return ((error + bits) * weight).sum() / weight.sum()

    def step_params(
        self, x: Tensor, index: Tensor, z: Tensor, chain: GaussianDiffusion, guidance_scale: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a step.

        The guess of the noise is guided, ``u + guidance_scale (c - u)``; the variance is that of the conditional branch.

        Args:
            x: ``[..., D]`` states.
            index: ``[...]`` int64 steps of the chain, S - 1 first; broadcasts.
            z: ``[G, ..., Z]``, conditional branch first.
            chain: see ``diffusion``.
            guidance_scale: a number, or a tensor that broadcasts against ``[..., D]``; ignored when G = 1.

        Returns:
            Mean and standard deviation ``[..., D]``, float32 or better, temperature left out.
        """
        out = self.net(x.to(z.dtype), chain.timesteps(index), z)
        work = torch.promote_types(x.dtype, torch.float32)
        eps, values = out.to(work).chunk(2, dim=-1)
        guess = eps[0] if len(z) == 1 else eps[1] + guidance_scale * (eps[0] - eps[1])
        mean = chain.mean(x.to(work), index, self._noise(chain, x.to(work), index, guess))
        return mean, torch.exp(0.5 * chain.log_variance(index, values[0]))

    def _noise(self, chain: GaussianDiffusion, x: Tensor, index: Tensor, guess: Tensor) -> Tensor:
        """The noise that the network's guess means."""
        return guess if self.prediction_type == "epsilon" else chain.noise_from_velocity(x, index, guess)

    @runs_as_forward
    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        chain: GaussianDiffusion,
        *,
        guidance_scale: float | Tensor = 1.0,
        temperature: float = 1.0,
        final_noise: bool = False,
    ) -> Path:
        """Run a chain.

        Args:
            z: ``[G, n, Z]``, conditional branch first.
            noise: ``[n, S + 1, D]`` standard normal: x_S, then the noise of every step in the order they are taken.
            chain: of S steps.
            guidance_scale: a number or ``[n, 1]``.
            temperature: multiplies the noise of the steps, not x_S.
            final_noise: the last step adds its noise too. Official chains do not; a distribution over chains needs it.

        Returns:
            All states and distributions; the tokens are ``states[:, -1]``.
        """
        x = noise[:, 0]
        states, means, stds = [x], [], []
        for k in range(chain.num_steps):
            index = torch.tensor(chain.num_steps - 1 - k, device=x.device)
            mean, std = self.step_params(x, index, z, chain, guidance_scale)
            std = std * temperature
            last = k == chain.num_steps - 1
            x = mean if last and not final_noise else mean + std * noise[:, k + 1]
            states.append(x)
            means.append(mean)
            stds.append(std)
        return Path(torch.stack(states, 1), torch.stack(means, 1), torch.stack(stds, 1))

    @runs_as_forward
    def path_params(
        self,
        states: Tensor,
        z: Tensor,
        chain: GaussianDiffusion,
        *,
        guidance_scale: float | Tensor = 1.0,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Distributions of all steps of given chains, in one pass of the network.

        Args:
            states: ``[n, S + 1, D]`` as in ``Path``.
            z: ``[G, n, Z]``.
            chain: of S steps.
            guidance_scale: a number or ``[n, 1]``.
            temperature: factor on the standard deviations.

        Returns:
            Means and standard deviations ``[n, S, D]``.
        """
        index = torch.arange(chain.num_steps - 1, -1, -1, device=states.device)
        scale = guidance_scale[:, None] if isinstance(guidance_scale, Tensor) else guidance_scale
        mean, std = self.step_params(states[:, :-1], index, z[:, :, None], chain, scale)
        return mean, std * temperature


def path_log_prob(states: Tensor, means: Tensor, stds: Tensor) -> Tensor:
    """Log density of chains given their start: ``[n, S + 1, D]``, ``[n, S, D]`` twice, to ``[n]``."""
    score = (states[:, 1:] - means) / stds
    return (-0.5 * score.square() - stds.log() - 0.5 * _LOG_2PI).flatten(1).sum(-1)
