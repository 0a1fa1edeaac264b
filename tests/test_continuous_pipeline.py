"""Pipelines of continuous tokens: images, storage, interruption, refusals, for masked and causal models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from vargen.backbones.mar.causal import CausalMARTransformer
from vargen.backbones.mar.model import MARTransformer
from vargen.pipelines.image import ImagePipeline
from vargen.registry import fitting_samplers
from vargen.samplers.schedule.masked_continuous import ContinuousMaskedSampler
from vargen.samplers.window.continuous_speculative import ContinuousSpeculativeSampler

HEAD: dict[str, Any] = {"head_depth": 1, "head_width": 16, "num_sampling_steps": "4", "last_timestep": 900}
SHARED: dict[str, Any] = {"grid_size": (4, 4), "latent_channels": 2, "patch_size": 2, "num_classes": 10, **HEAD}


def autoencoder(channels: int = 2) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1, latent_channels=channels, norm_num_groups=4, mid_block_add_attention=False,
        scaling_factor=0.5,
    ).eval()  # fmt: skip


def masked() -> MARTransformer:
    torch.manual_seed(1)
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
             (("dim", 16), ("depth", 1), ("num_heads", 2))}  # fmt: skip
    return MARTransformer(**SHARED, **sizes, buffer_size=2).eval()


def causal(num_layers: int = 2) -> CausalMARTransformer:
    torch.manual_seed(2)
    return CausalMARTransformer(**SHARED, dim=16, num_layers=num_layers, num_heads=2).eval()


def pipeline(backbone: Any, sampler: Any, **components: Any) -> ImagePipeline:
    pipe = ImagePipeline(tokenizer=autoencoder(), backbone=backbone, sampler=sampler, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipes() -> dict[str, ImagePipeline]:
    return {
        "masked": pipeline(masked(), ContinuousMaskedSampler(num_steps=5)),
        "causal": pipeline(causal(), ContinuousSpeculativeSampler(num_draft_tokens=3), drafter=causal(1)),
    }


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_images_and_storage(pipes: dict[str, ImagePipeline], kind: str, tmp_path: Path) -> None:
    pipe = pipes[kind]
    settings: dict[str, Any] = {"class_labels": [3, 4], "seed": 5, "output_type": "pt", "guidance_scale": 1.5}
    drawn = pipe(**settings)
    assert drawn.images.shape == (2, 3, 8, 8)
    assert drawn.codes.shape == (2, 16, 8)  # tokens stand where codes stand
    assert drawn.codes.isfinite().all()
    torch.testing.assert_close(pipe(**settings, batch_size=1).codes, drawn.codes, rtol=1e-3, atol=1e-3)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = ImagePipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.sampler == pipe.sampler
    torch.testing.assert_close(loaded(**settings).images, drawn.images)
    assert len(pipe(class_labels=1, seed=0).images) == 1


def test_interruption_leaves_grey(pipes: dict[str, ImagePipeline]) -> None:
    pipe = pipes["masked"]

    def stop(owner: Any, step: int, num_forwards: int, tensors: dict[str, Any]) -> None:
        assert tensors["codes"].isnan().any()
        owner._interrupt = num_forwards == 2

    drawn = pipe(class_labels=[1, 2], seed=0, output_type="pt", callback_on_step_end=stop, batch_size=1)
    assert "interrupted after 2" in drawn.stats.notes[0]
    assert drawn.codes[1].isnan().all()
    missing = drawn.codes[0].isnan().any(-1).view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert (drawn.images[0][:, missing] == 0.5).all()
    assert 0 < int(missing.sum()) < 64


def test_refusals(pipes: dict[str, ImagePipeline]) -> None:
    with pytest.raises(ValueError, match="same latent channels, got 3"):
        ImagePipeline(tokenizer=autoencoder(3), backbone=masked(), sampler=ContinuousMaskedSampler())
    with pytest.raises(ValueError, match="needs a backbone with masked_continuous"):
        pipeline(causal(), ContinuousMaskedSampler(num_steps=4))(class_labels=1, seed=0)
    with pytest.raises(ValueError, match="top_k must be 0"):
        pipes["masked"](class_labels=1, top_k=3)
    assert "continuous-masked" in fitting_samplers(masked())
    assert "continuous-masked" not in fitting_samplers(causal())
    assert "continuous-speculative" in fitting_samplers(causal())
    assert "next-token" not in fitting_samplers(causal())
