"""KL autoencoders: official numbers, both layouts, the manifest of KL-16, refusals."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from tests.golden_files import load_file
from vargen.checkpoints.reader import CheckpointError
from vargen.checkpoints.verify import convert_checkpoint, verify_checkpoint
from vargen.tokenizers.kl.autoencoder import KL16_SCALE, infer_kl_config, kl_latents, load_kl16, to_latent_diffusion

GOLDEN = Path(__file__).parent / "golden" / "mar"


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_file(GOLDEN / "vae.safetensors")


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@torch.no_grad()
def test_official_numbers(weights: dict[str, Tensor], io: dict[str, Tensor]) -> None:
    model = load_kl16(weights)
    posterior = model.encode(io["vae.image"]).latent_dist
    assert close(torch.cat([posterior.mean, posterior.logvar], 1), io["vae.moments"].clamp(-30, 20), 4e-6)
    drawn = kl_latents(model, io["vae.image"], io["vae.posterior_noise"])
    assert close(drawn / KL16_SCALE, io["vae.posterior_sample"], 4e-6)
    assert close(model.decode(io["vae.posterior_sample"]).sample, io["vae.decode_sample"], 1e-5)
    assert close(kl_latents(model, io["vae.image"]), io["vae.mean"] * KL16_SCALE, 4e-6)


def test_layouts_are_inverse(weights: dict[str, Tensor]) -> None:
    back = to_latent_diffusion(load_kl16(weights).state_dict())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())


def kl16_on_meta() -> AutoencoderKL:
    down = 4 * ("DownEncoderBlock2D",) + ("AttnDownEncoderBlock2D",)
    widths = (128, 128, 256, 256, 512)
    with torch.device("meta"):
        return AutoencoderKL(
            block_out_channels=widths,
            down_block_types=down,
            up_block_types=5 * ("UpDecoderBlock2D",),
            layers_per_block=2,
            latent_channels=16,
        )


def test_published_size_verifies() -> None:
    weights = to_latent_diffusion(kl16_on_meta().state_dict())
    report = verify_checkpoint({"model": weights})
    assert report.ok
    assert (report.size, report.num_entries, report.num_parameters) == ("kl16", 312, 66_456_019)
    assert weights["encoder.down.4.attn.1.q.weight"].shape == (512, 512, 1, 1)
    assert "decoder.up.4.attn.0.q.weight" not in weights  # attention in the encoder only
    assert infer_kl_config(weights)["scaling_factor"] == 0.2325
    del weights["encoder.mid.attn_1.q.bias"]
    assert verify_checkpoint(weights).missing == ["encoder.mid.attn_1.q.bias"]


def test_container_with_inert_classes(tmp_path: Path, weights: dict[str, Tensor], io: dict[str, Tensor]) -> None:
    torch.save({"model": weights, "args": argparse.Namespace(lr=1)}, tmp_path / "kl16.ckpt")
    model = load_kl16(tmp_path / "kl16.ckpt", scaling_factor=0.5)
    assert model.config.scaling_factor == 0.5
    assert not model.training
    with torch.no_grad():
        assert close(model.encode(io["vae.image"]).latent_dist.mean, io["vae.mean"], 4e-6)
    torch.save({"model": weights, "hook": Path("x")}, tmp_path / "code.ckpt")
    with pytest.raises(CheckpointError, match="pickled code"):
        load_kl16(tmp_path / "code.ckpt")


def test_refusals(weights: dict[str, Tensor]) -> None:
    short = {k: v for k, v in weights.items() if k != "decoder.mid.block_1.conv1.bias"}
    with pytest.raises(CheckpointError, match=r"missing key.*decoder.mid_block.resnets.0.conv1.bias"):
        load_kl16(short)
    with pytest.raises(CheckpointError, match="looks like a LlamaGen"):
        load_kl16({"tok_embeddings.weight": torch.zeros(1), "layers.0.attention.wqkv.weight": torch.zeros(1),
                   "cls_embedding.embedding_table.weight": torch.zeros(1)})  # fmt: skip
    with pytest.raises(CheckpointError, match="from_pretrained"):
        load_kl16(load_kl16(weights).state_dict())


def test_conversion(tmp_path: Path, weights: dict[str, Tensor], io: dict[str, Tensor]) -> None:
    save_file(weights, tmp_path / "kl.safetensors")
    folder = convert_checkpoint(tmp_path / "kl.safetensors", tmp_path / "kl")
    model = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        assert close(model.decode(io["vae.posterior_sample"]).sample, io["vae.decode_sample"], 1e-5)
