"""Heads that guess the velocity: the same chains as heads that guess the noise, and no step magnifies an error."""

from __future__ import annotations

import pytest
import torch

from vargen.backbones.layers.diffusion_head import DiffusionHead
from vargen.backbones.layers.gaussian_diffusion import make_diffusion, training_diffusion
from vargen.backbones.mar.causal import CausalMARTransformer


def a_head(kind: str) -> DiffusionHead:
    torch.manual_seed(0)
    head = DiffusionHead(3, 5, depth=1, width=16, prediction_type=kind)
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return head.eval()


def test_velocity_is_the_noise_in_other_words() -> None:
    torch.manual_seed(0)
    chain = training_diffusion()
    index = torch.tensor([0, 400, 999])
    token, noise = torch.randn(2, 3, 4, dtype=torch.float64)
    x = chain.add_noise(token, index, noise)
    velocity = chain.velocity(token, index, noise)
    torch.testing.assert_close(chain.noise_from_velocity(x, index, velocity), noise)
    torch.testing.assert_close(chain.mean(x, index, noise), chain.posterior_mean(token, x, index))


@torch.no_grad()
def test_step_of_a_velocity_head() -> None:
    plain, velocity = a_head("epsilon"), a_head("v_prediction")
    chain = make_diffusion(8)
    x, z = torch.randn(2, 3), torch.randn(2, 2, 5)
    index = torch.tensor([3, 6])
    guess, values = plain.net(x, chain.timesteps(index), z).chunk(2, dim=-1)
    noise = chain.noise_from_velocity(x, index, guess)  # each branch's own, guided afterwards
    wanted = chain.mean(x, index, noise[1] + 3.0 * (noise[0] - noise[1]))
    mean, std = velocity.step_params(x, index, z, chain, 3.0)
    torch.testing.assert_close(mean, wanted)
    torch.testing.assert_close(std, plain.step_params(x, index, z, chain, 3.0)[1])
    torch.testing.assert_close(std, torch.exp(0.5 * chain.log_variance(index, values[0])))


def test_loss_of_a_perfect_guess_is_zero() -> None:
    head = a_head("v_prediction")
    target, z, noise = torch.randn(6, 3), torch.randn(6, 5), torch.randn(6, 3)
    timesteps = torch.tensor([1, 200, 400, 600, 800, 999])
    velocity = training_diffusion().velocity(target, timesteps, noise)
    head.net = torch.nn.Module()  # type: ignore[assignment]
    head.net.forward = lambda *_: torch.cat([velocity, -torch.ones_like(velocity)], -1)  # type: ignore[method-assign]
    error, bits = head.losses(target, z, timesteps, noise)
    assert float(error.abs().max()) < 1e-12
    assert float(bits.abs().max()) < 1e-3  # the smaller variance is the true one


def test_unknown_guess_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type must be one of epsilon, v_prediction, got 'x0'"):
        CausalMARTransformer((2, 2), 2, dim=8, num_layers=1, num_heads=1, prediction_type="x0")
