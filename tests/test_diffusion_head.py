"""MAR's head against the official numbers: tables, network, steps, losses, chains, distributions along paths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.golden_files import load_file
from vargen.backbones.layers.diffusion_head import DiffusionHead, path_log_prob
from vargen.backbones.layers.gaussian_diffusion import TABLES, gaussian_kl, make_diffusion, spaced_timesteps

# angles of up to 999 radians: half a unit in the last place of a frequency moves the sinusoids by 3e-5, and exp() is not
# rounded alike on every CPU (the time embedding is off by 2.02e-6 where the file's README suggests TOLERANCE)
TOLERANCE = 5e-6
GOLDEN = Path(__file__).parent / "golden" / "mar"


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="module")
def head() -> DiffusionHead:
    weights = load_file(GOLDEN / "mar.safetensors")
    head = DiffusionHead(16, 32, depth=2, width=32, num_sampling_steps="4,0")
    prefix = "diffloss."
    head.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return head.eval()


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize(("name", "sections"), [("gen", "4,0"), ("100", "100"), ("4", 4)])
def test_tables(io: dict[str, Tensor], name: str, sections: str | int) -> None:
    chain = make_diffusion(sections)
    assert torch.equal(chain.timestep_map, io[f"table.{name}.timestep_map"])
    for table in TABLES:
        if f"table.{name}.{table}" in io:
            torch.testing.assert_close(getattr(chain, table), io[f"table.{name}.{table}"], rtol=1e-12, atol=1e-15)


def test_spacing() -> None:
    assert spaced_timesteps(100)[:3] == (0, 10, 20)
    assert spaced_timesteps(100)[-3:] == (979, 989, 999)
    assert spaced_timesteps(50, last_timestep=950)[-2:] == (938, 950)  # 958, 979 and 999 merge
    for wrong in ("a", "-1", "0", 1001, "600,1"):
        with pytest.raises(ValueError, match="diffusion steps"):
            spaced_timesteps(wrong)


@torch.no_grad()
def test_network_and_steps(io: dict[str, Tensor], head: DiffusionHead) -> None:
    x, t, c = io["net.x"], io["net.t"], io["net.c"]
    assert close(head.net.time_embed(t), io["net.t_emb"], TOLERANCE)
    assert close(head.net(x, t, c), io["net.out"], TOLERANCE)
    for prefix, sections, steps in (("pmv", None, range(4)), ("pmv100", 100, (0, 1, 50, 98, 99))):
        chain = head.diffusion(sections)
        for i in steps:
            index = torch.full((len(x),), i)
            mean, std = head.step_params(x, index, c[None], chain)
            assert close(mean, io[f"{prefix}.{i}.mean"], TOLERANCE)
            assert close(std, torch.exp(0.5 * io[f"{prefix}.{i}.log_variance"]), TOLERANCE)
            eps = head.net(x, chain.timesteps(index), c).chunk(2, -1)[0]
            assert close(chain.predict_x0(x, index, eps), io[f"{prefix}.{i}.pred_xstart"], TOLERANCE)


@torch.no_grad()
def test_guidance_moves_the_mean_and_not_the_variance(io: dict[str, Tensor], head: DiffusionHead) -> None:
    half = len(io["net.x"]) // 2
    x = io["net.x"][:half]
    out = head.net(x, io["net.t"].unflatten(0, (2, half)), io["net.c"].unflatten(0, (2, half)))
    eps, values = out.chunk(2, -1)
    guided = eps[1] + io["net.cfg_scale"] * (eps[0] - eps[1])
    assert close(torch.cat([guided, values[0]], -1), io["net.out_cfg"][:half], TOLERANCE)


def test_losses(io: dict[str, Tensor], head: DiffusionHead) -> None:
    z = io["mar.z"].flatten(0, 1).repeat(4, 1).requires_grad_()
    target = io["mar.tokens"].flatten(0, 1).repeat(4, 1)
    error, bits = head.losses(target, z, io["loss.t"], io["loss.noise"])
    assert close(error, io["loss.mse"], TOLERANCE)
    assert close(bits, io["loss.vb"], TOLERANCE)
    mask = io["mar.mask"].flatten().repeat(4)
    assert close(((error + bits) * mask).sum()[None] / mask.sum(), io["loss.masked_mean"], TOLERANCE)
    (gradient,) = torch.autograd.grad(bits[io["loss.t"] > 0].sum(), head.net.final_layer.linear.weight)
    assert not gradient[:16].any()  # the variational term does not reach the guess of the noise
    assert gradient[16:].any()


@pytest.mark.parametrize(("tag", "scale", "temperature"), [("nocfg", 1.0, 1.0), ("nocfg_temp095", 1.0, 0.95), ("cfg", 2.5, 1.0)])  # fmt: skip
def test_chains(io: dict[str, Tensor], head: DiffusionHead, tag: str, scale: float, temperature: float) -> None:
    first, steps = io[f"dsample.{tag}.init_noise"], io[f"dsample.{tag}.step_noise"]
    n = len(first)
    noise = torch.cat([first[:, None], steps[:, :n].transpose(0, 1)], dim=1)
    z = io[f"dsample.{tag}.z"].unflatten(0, (-1, n))
    path = head.sample(z, noise, head.diffusion(), guidance_scale=scale, temperature=temperature)
    assert close(path.states[:, -1], io[f"dsample.{tag}.out"][:n], 1e-5)
    noisy = head.sample(z, noise, head.diffusion(), guidance_scale=scale, temperature=temperature, final_noise=True)
    gap = noisy.states[:, -1] - path.states[:, -1]
    torch.testing.assert_close(gap, path.stds[:, -1] * noise[:, -1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_all_steps_of_a_path_in_one_pass(io: dict[str, Tensor], head: DiffusionHead) -> None:
    head = head.double()
    z = io["dsample.cfg.z"].double().unflatten(0, (2, 4))
    noise = torch.randn(4, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([1.0, 1.5, 2.0, 3.0], dtype=torch.float64)[:, None]
    settings = {"guidance_scale": scale, "temperature": 0.9}
    path = head.sample(z, noise, head.diffusion(), final_noise=True, **settings)
    mean, std = head.path_params(path.states, z, head.diffusion(), **settings)
    torch.testing.assert_close(mean, path.means)
    torch.testing.assert_close(std, path.stds)
    normal = torch.distributions.Normal(mean, std)
    expected = normal.log_prob(path.states[:, 1:]).sum((1, 2))
    torch.testing.assert_close(path_log_prob(path.states, mean, std), expected)
    head.float()


def test_divergence_of_normal_laws() -> None:
    a, b = torch.distributions.Normal(0.3, 0.5), torch.distributions.Normal(-0.2, 0.8)
    logs = [torch.tensor(float(d.variance)).log() for d in (a, b)]
    found = gaussian_kl(torch.tensor(0.3), logs[0], torch.tensor(-0.2), logs[1])
    torch.testing.assert_close(found, torch.distributions.kl_divergence(a, b))
