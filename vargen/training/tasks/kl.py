"""Training of KL autoencoders for continuous tokens (Rombach et al., 2022, arXiv:2112.10752), without a discriminator.

The weight of the divergence is that of a decoder with a finite error, not the vanishing one of latent diffusion: each latent
then carries as much noise as the picture allows, and what a backbone has to model is smooth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from vargen.datasets.base import Dataset
from vargen.training.data import open_dataset
from vargen.training.sources import RECIPE_FILE, component_folder, read_run
from vargen.training.tasks.base import Task, model_from, paired_grid
from vargen.training.tasks.vq import reconstruction_psnr
from vargen.validation.folders import check_component, one_line, read_settings

SCALE_IMAGES = 1024  # training images over which the spread of latents is measured


@dataclass(frozen=True, kw_only=True)
class KLOptions:
    """Weights of the loss."""

    l1_weight: float = 0.2
    mse_weight: float = 1.0
    kl_weight: float = 1e-3  # of the divergence in nats an image, spread over its pixel values
    start: str = ""  # a "kl" run or saved autoencoder whose weights to start from
    freeze_encoder: bool = False  # train the decoder alone: the latents stay those that backbones were trained on
    grid_size: int = 16  # pictures on the sample grid, originals above reconstructions


class KLTask(Task):
    """Train diffusers' ``AutoencoderKL``."""

    Options = KLOptions

    def build(self, initialize: bool) -> AutoencoderKL:
        """Make the autoencoder; channels last in memory, in which convolutions on CPUs run half again as fast."""
        model: AutoencoderKL = model_from(AutoencoderKL, self.recipe.model)
        if initialize and self.options.start:
            model.load_state_dict(load_autoencoder(self.options.start).state_dict())
        if self.options.freeze_encoder:
            model.encoder.requires_grad_(False)
            model.quant_conv.requires_grad_(False)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def compile(self, model: nn.Module) -> None:
        """Compile encoder and decoder."""
        for part in (model.encoder, model.decoder):
            cast(nn.Module, part).compile()

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted L1 and squared error of a posterior draw, and the divergence of the posterior from N(0, 1)."""
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        posterior = model.encode(images).latent_dist  # type: ignore[operator]
        latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        restored = model.decode(latents).sample  # type: ignore[operator]
        l1, mse = F.l1_loss(restored, images), F.mse_loss(restored, images)
        nats = posterior.kl().mean()
        o = self.options
        loss = o.l1_weight * l1 + o.mse_weight * mse + o.kl_weight * nats / images[0].numel()
        return loss, {"l1": l1.detach(), "mse": mse.detach(), "kl_nats": nats.detach()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """PSNR in dB of decoded posterior means over all pixels and over the foreground (8-bit images)."""
        return reconstruction_psnr(self, lambda images: model(images).sample)

    @torch.no_grad()
    def sample_grid(self, model: nn.Module) -> Tensor:
        """Test images, each above its reconstruction."""
        images = self.test_batch(0, self.options.grid_size)["image"]
        return paired_grid(images, model(images).sample)


def load_autoencoder(source: str | Path) -> AutoencoderKL:
    """Load a frozen autoencoder in evaluation mode.

    Weights of a run come with no ``scaling_factor`` yet; it is measured on the run's data set, so that latents have unit variance.

    Args:
        source: folder of a training run (its newest averaged weights are taken), of a saved autoencoder, of a pipeline that
            holds one, or the name of a shipped model.

    Raises:
        ValueError: nothing of the kind is there.
    """
    folder = Path(source)
    if (folder / RECIPE_FILE).is_file():
        recipe, weights = read_run(folder)
        if recipe.task != "kl":
            raise ValueError(f"{folder} is a run of task {recipe.task!r}, an autoencoder needs a run of task 'kl'")
        model = AutoencoderKL(**recipe.model)
        model.load_state_dict(weights)
        model.eval()
        model.register_to_config(scaling_factor=measure_scale(model, open_dataset(recipe, kind="image")))
    else:
        model = _from_folder(component_folder(source, "tokenizer"))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def measure_scale(model: AutoencoderKL, data: Dataset) -> float:
    """One over the standard deviation of the latents of the first ``SCALE_IMAGES`` images, to four digits."""
    latents = []
    for part in np.array_split(np.arange(SCALE_IMAGES), 16):
        posterior = model.encode(data.examples(part)["image"]).latent_dist
        latents.append((posterior.mean.square() + posterior.var).mean())
    spread = torch.stack(latents).mean().sqrt()
    return float(f"{1 / spread.item():.4g}")


def _from_folder(folder: Path) -> AutoencoderKL:
    config = read_settings(folder / "config.json") if folder.is_dir() else {}
    if config.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"no AutoencoderKL in {folder}; train one first with `vargen train heroes32-kl`")
    with one_line(folder):
        check_component(folder, AutoencoderKL, name="AutoencoderKL")
        model: AutoencoderKL = AutoencoderKL.from_pretrained(folder)
    return model
