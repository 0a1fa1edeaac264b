"""MAR: official numbers from patches to whole generations, keys and sizes, masks of unequal size, batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.golden_files import load_file, unpacked
from vargen.backbones.mar.layers import draw_mask_ratio
from vargen.backbones.mar.model import MARTransformer
from vargen.checkpoints.reader import CheckpointError
from vargen.checkpoints.verify import verify_checkpoint
from vargen.samplers.schedule.masked_continuous import ContinuousMaskedSampler, MaskedContinuousState
from vargen.tokenizers.kl.autoencoder import KL16_SCALE, load_kl16

GOLDEN = Path(__file__).parent / "golden" / "mar"
READ = {"patch_size": 2, "encoder_num_heads": 2, "decoder_num_heads": 2, "num_sampling_steps": "4,0"}
GENERATIONS = {
    "linear_cfg": {"guidance_scale": 2.5},
    "constant_cfg": {"guidance_scale": 3.0, "guidance_schedule": "constant"},
    "nocfg_temp": {"temperature": 0.95},
    "uncond": {},
}


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="module")
def mar() -> MARTransformer:
    return MARTransformer.from_original(unpacked(GOLDEN / "mar.safetensors"), **READ)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@torch.no_grad()
def test_official_states(io: dict[str, Tensor], mar: MARTransformer) -> None:
    tokens, mask = mar.to_tokens(io["mar.latents"]), io["mar.mask"].bool()
    assert torch.equal(tokens, io["mar.tokens"])
    assert torch.equal(mar.to_latents(tokens), io["mar.latents"])
    condition = mar.prepare(io["mar.labels"], guidance_scale=2.0)
    assert close(condition.embeddings[:2, 0], io["mar.class_embedding"], 0)
    assert close(mar._encode(tokens, condition.embeddings[:2], mask, None)[0], io["mar.encoder_out"], 2e-6)
    z = mar.predict(condition, tokens, mask)
    assert close(z[0], io["mar.z"], 2e-6)
    assert close(z[1], io["mar.z_uncond"], 2e-6)
    assert close(mar(tokens, io["mar.labels"], mask), io["mar.z"], 2e-6)
    nothing = mar.predict(mar.prepare(io["mar.labels"]), torch.zeros_like(tokens), torch.ones_like(mask))
    assert close(nothing[0], io["mar.z_all_masked"], 2e-6)


@pytest.mark.parametrize("tag", GENERATIONS)
def test_official_generations(io: dict[str, Tensor], mar: MARTransformer, tag: str) -> None:
    sampler = ContinuousMaskedSampler(num_steps=4, **GENERATIONS[tag])
    labels = io["mar.labels"] if tag != "uncond" else torch.full((2,), mar.config.num_classes)
    states: list[MaskedContinuousState] = []

    def noise(images: Tensor, positions: Tensor, num_steps: int) -> Tensor:
        now = states[-1].num_forwards if states else 0
        first, steps = (io[f"gen.{tag}.iter{now}.{name}"] for name in ("init_noise", "step_noise"))
        assert (len(first), num_steps) == (len(images), len(steps))
        return torch.cat([first[:, None], steps[:, : len(first)].transpose(0, 1)], dim=1)

    orders = io[f"gen.{tag}.orders"]
    for state in sampler.stream(mar, labels, seeds=[0, 1], orders=orders, noise=noise):
        states.append(state)
        drawn = (state.trace == state.num_forwards - 1).nonzero().unbind(1)
        rows = len(drawn[0])
        assert close(state.tokens[drawn], io[f"gen.{tag}.iter{state.num_forwards - 1}.sampled"][:rows], 1e-5)
    output = sampler.finish(states[-1])
    assert output.latents is not None
    assert close(output.latents, io[f"gen.{tag}.tokens"], 1e-5)
    assert close(mar.to_latents(output.latents), io[f"gen.{tag}.latents"], 1e-5)
    assert output.stats.num_forwards == 4
    if tag == "uncond":
        decoded = (
            load_kl16(unpacked(GOLDEN / "vae.safetensors")).decode(mar.to_latents(output.latents) / KL16_SCALE).sample
        )
        assert close(decoded.detach(), io["gen.uncond.decoded_image"], 2e-5)


@torch.no_grad()
def test_images_may_know_different_numbers_of_tokens(io: dict[str, Tensor], mar: MARTransformer) -> None:
    mask = io["mar.mask"].bool().clone()
    mask[1, mask[1].nonzero()[0]] = False
    together = mar.predict(mar.prepare(io["mar.labels"]), io["mar.tokens"], mask)[0]
    for i in range(2):
        alone = mar.predict(mar.prepare(io["mar.labels"][i : i + 1]), io["mar.tokens"][i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(together[i], alone[0, 0])
    hidden = io["mar.tokens"].masked_fill(mask[..., None], 1e3)  # masked tokens are never read
    torch.testing.assert_close(mar.predict(mar.prepare(io["mar.labels"]), hidden, mask)[0], together)


def test_batches_do_not_matter(mar: MARTransformer) -> None:
    sampler = ContinuousMaskedSampler(num_steps=8, guidance_scale=2.0)
    both = sampler.sample(mar, torch.tensor([2, 3]), seeds=[5, 6])
    alone = sampler.sample(mar, torch.tensor([3]), seeds=[6])
    assert both.latents is not None
    assert alone.latents is not None
    torch.testing.assert_close(both.latents[1:], alone.latents)
    assert both.stats.num_head_rows == 2 * 16 * 4 * 2
    one_each = ContinuousMaskedSampler(num_steps=16).sample(mar, torch.tensor([2, 3]), seeds=[5, 6]).stats
    assert one_each.commit_trace is not None
    assert all(torch.equal(row.sort().values, torch.arange(16)) for row in one_each.commit_trace)


def test_disa_shortens_chains_and_says_so(mar: MARTransformer) -> None:
    sampler = ContinuousMaskedSampler(num_steps=4, num_diffusion_steps=10, last_diffusion_steps=2, last_timestep=950)
    assert [sampler.steps_at(s) for s in range(4)] == [10, 7, 4, 2]
    assert [sampler.replace(step_schedule="two_stage").steps_at(s) for s in range(4)] == [10, 10, 2, 2]
    stats = sampler.sample(mar, torch.tensor([1]), seeds=[0]).stats
    assert stats.guarantee == "heuristic"
    assert "DiSA" in stats.notes[0]


def test_published_sizes() -> None:
    counts = {"base": 207_924_768, "large": 478_326_304, "huge": 942_403_104}
    for size, count in counts.items():
        with torch.device("meta"):
            weights = MARTransformer.from_size(size).state_dict()
        report = verify_checkpoint(weights)
        assert (report.ok, report.size, report.num_parameters) == (True, f"mar_{size}", count)
    assert tuple(weights["encoder_pos_embed_learned"].shape) == (1, 320, 1280)


def test_training_loss_has_gradients_everywhere(io: dict[str, Tensor]) -> None:
    model = MARTransformer.from_original(unpacked(GOLDEN / "mar.safetensors"), **READ).train()
    loss = model.loss(io["mar.tokens"], io["mar.labels"], generator=torch.Generator().manual_seed(1))
    loss.backward()
    assert torch.isfinite(loss)
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without in ([], ["fake_latent"])  # dropped in a tenth of the samples only
    again = model.loss(io["mar.tokens"], io["mar.labels"], generator=torch.Generator().manual_seed(1))
    assert again.shape == loss.shape


@pytest.mark.parametrize(("low", "std"), [(0.7, 0.25), (0.02, 0.7)])
def test_shares_of_masks_follow_a_cut_normal(low: float, std: float) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw_mask_ratio(low, std, generator) for _ in range(4000)])
    normal = torch.distributions.Normal(1.0, std)
    rank = (normal.cdf(drawn) - normal.cdf(torch.tensor(low))) / (0.5 - normal.cdf(torch.tensor(low)))
    gaps = (rank.sort().values - (torch.arange(4000) + 0.5) / 4000).abs()
    assert low <= drawn.min() < drawn.max() <= 1
    assert gaps.max() < 1.95 / 4000**0.5  # Kolmogorov and Smirnov at a level of 0.1 %


@torch.no_grad()
def test_noise_on_the_input_is_for_training_only(io: dict[str, Tensor]) -> None:
    weights = unpacked(GOLDEN / "mar.safetensors")
    clean, noisy = (MARTransformer.from_original(weights, **READ, dropout=0.0, input_noise=x) for x in (0.0, 0.5))
    inputs = {"tokens": io["mar.tokens"], "condition": io["mar.labels"]}
    mask = torch.arange(clean.num_codes).expand(inputs["tokens"].shape[:2]) % 2 == 0
    kept = torch.zeros(len(mask), dtype=torch.bool)
    torch.testing.assert_close(noisy(**inputs, mask=mask), clean(**inputs, mask=mask))
    seen = clean.train()(**inputs, mask=mask, drop=kept)
    a, b = (noisy.train()(**inputs, mask=mask, drop=kept, generator=torch.Generator().manual_seed(s)) for s in (1, 1))
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a, seen, atol=1e-3)


def test_attribute_conditions() -> None:
    torch.manual_seed(0)
    model = MARTransformer(
        grid_size=(2, 2), latent_channels=4, encoder_dim=16, encoder_depth=1, encoder_num_heads=2, decoder_dim=16,
        decoder_depth=1, decoder_num_heads=2, condition_type="attributes", num_condition_tokens=3, num_attributes=7,
        head_depth=1, head_width=16, num_sampling_steps="5",
    ).eval()  # fmt: skip
    output = ContinuousMaskedSampler(num_steps=4, guidance_scale=2.0).sample(
        model, torch.tensor([[1, 0, 6]]), seeds=[0]
    )
    assert output.latents is not None
    assert output.latents.shape == (1, 4, 4)
    assert output.latents.isfinite().all()


def test_refusals(mar: MARTransformer, tmp_path: Path) -> None:
    weights = load_file(GOLDEN / "mar.safetensors")
    with pytest.raises(ValueError, match="encoder_num_heads cannot be read"):
        MARTransformer.from_original(weights)
    with pytest.raises(CheckpointError, match="missing"):
        MARTransformer.from_original({k: v for k, v in weights.items() if k != "mask_token"}, **READ)
    averaged = {"model": {"z_proj.weight": torch.zeros(1)}, "model_ema": weights, "epoch": 3}
    torch.save(averaged, tmp_path / "checkpoint-last.pth")
    loaded = MARTransformer.from_original(tmp_path / "checkpoint-last.pth", **READ)
    assert torch.equal(loaded.mask_token, weights["mask_token"])
    with pytest.raises(ValueError, match="class label must be in"):
        mar.prepare(torch.tensor([11]))
    with pytest.raises(ValueError, match="num_steps must be an integer in"):
        ContinuousMaskedSampler(num_steps=17).sample(mar, torch.tensor([1]), seeds=[0])
    with pytest.raises(ValueError, match="top_k must be 0"):
        ContinuousMaskedSampler(top_k=5)
    with pytest.raises(ValueError, match="last_diffusion_steps needs num_diffusion_steps"):
        ContinuousMaskedSampler(last_diffusion_steps=5)
