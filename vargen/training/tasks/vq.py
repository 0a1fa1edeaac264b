"""Training of VQ tokenizers: reconstruction with the quantizer's own losses (LlamaGen, arXiv:2406.06525, section 3.1).

No discriminator. Codes that fall out of use are moved onto encoder outputs (Dhariwal et al., 2020, arXiv:2005.00341).
Patch tokenizers have their codebook from k-means before the first step and train the decoder alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vargen.tokenizers.vq.kmeans import kmeans
from vargen.tokenizers.vq.model import VQTokenizer
from vargen.training.sources import start_from_weights
from vargen.training.tasks.base import Task, model_from, paired_grid


@dataclass(frozen=True, kw_only=True)
class VQOptions:
    """Settings of the loss and of the codebook's initialisation."""

    l1_weight: float = 1.0
    mse_weight: float = 1.0
    num_kmeans_images: int = 8000
    num_kmeans_iterations: int = 12
    restart_every: int = 0  # steps between restarts of codes that no recent image uses; 0 = never
    num_restart_images: int = 512
    start: str = ""  # run, tokenizer or model to go on from: k-means then continues from its codebook
    grid_size: int = 16  # pictures on the sample grid, originals above reconstructions

    def __post_init__(self) -> None:
        for name in ("num_kmeans_images", "num_kmeans_iterations", "num_restart_images", "grid_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"options.{name} must be >= 1, got {getattr(self, name)}")
        if self.restart_every < 0:
            raise ValueError(f"options.restart_every must be >= 0, got {self.restart_every}")


class VQTask(Task):
    """Train a ``VQTokenizer``."""

    Options = VQOptions

    def build(self, initialize: bool) -> VQTokenizer:
        """Make the tokenizer; its codebook starts from k-means over training images."""
        model: VQTokenizer = model_from(VQTokenizer, self.recipe.model)
        if initialize and self.options.start:
            start_from_weights(model, self.options.start, "tokenizer")
            self._refine_codebook(model)
        elif initialize:
            generator = torch.Generator().manual_seed(self.recipe.seed)
            model.init_codebook_(self._kmeans_images(), generator, self.options.num_kmeans_iterations)
        return model

    def _kmeans_images(self) -> Tensor:
        return self.train_data.examples(np.arange(self.options.num_kmeans_images))["image"]

    @torch.no_grad()
    def _refine_codebook(self, model: VQTokenizer) -> None:
        """Go on with k-means from the codebook as it is, so that codes keep their meaning."""
        vectors = torch.cat(
            [model.features(part).permute(0, 2, 3, 1).flatten(0, 2) for part in self._kmeans_images().split(256)]
        )
        codebook = model.quantize.embedding.weight
        iterations = self.options.num_kmeans_iterations
        found, _ = kmeans(
            vectors, len(codebook), l2_norm=model.quantize.l2_norm, num_iterations=iterations, start=codebook
        )
        codebook.copy_(found)

    def compile(self, model: nn.Module) -> None:
        """Compile the decoder, and the encoder where there is one."""
        for name in ("encoder", "decoder"):
            if hasattr(model, name):
                getattr(model, name).compile()

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted L1 and squared error plus the quantizer's losses where they have a gradient."""
        images = batch["image"]
        output = model(images)
        l1, mse = F.l1_loss(output.images, images), F.mse_loss(output.images, images)
        loss = self.options.l1_weight * l1 + self.options.mse_weight * mse
        if output.loss is not None and output.loss.requires_grad:
            loss = loss + output.loss
        return loss, {"l1": l1.detach(), "mse": mse.detach()}

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        """Every ``restart_every`` steps, move unused codes of a learned codebook onto encoder outputs.

        Use is counted afresh on training images that follow this step's, not remembered, so that a resumed run agrees.
        """
        every = self.options.restart_every
        if not every or (step + 1) % every or not isinstance(model, VQTokenizer):
            return
        first = self.first_example(step + 1)
        images = self.on_device(self.train_data.examples(np.arange(first, first + self.options.num_restart_images)))
        latents = [model.features(part) for part in images["image"].split(64)]
        vectors = rearrange(torch.cat(latents), "b c h w -> (b h w) c")
        counts = torch.bincount(model.quantize.nearest(vectors), minlength=model.codebook_size)
        model.quantize.code_counts.copy_(counts)
        generator = torch.Generator().manual_seed(self.recipe.seed + step)
        model.quantize.restart_dead_codes_(vectors, generator)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """PSNR in dB over all pixels and over the foreground (8-bit images, one mean over the set)."""
        return reconstruction_psnr(self, lambda images: model(images).images)

    @torch.no_grad()
    def sample_grid(self, model: nn.Module) -> Tensor:
        """Test images, each above its reconstruction."""
        images = self.test_batch(0, self.options.grid_size)["image"]
        return paired_grid(images, model(images).images)


def reconstruction_psnr(task: Task, restore: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """PSNR in dB of test images over all pixels, and over the foreground where the data set knows one."""
    sums: dict[str, list[Tensor]] = defaultdict(list)
    for batch in task.test_batches():
        images = batch["image"]
        error = ((to_uint8(restore(images)) - to_uint8(images)) / 255).square()
        foreground = task.test_data.foreground(images)
        parts = {"psnr": error}
        if foreground is not None:
            parts["psnr_foreground"] = error[foreground.expand_as(error)]
        for name, part in parts.items():
            sums[name].append(torch.stack([part.sum(), part.new_tensor(part.numel())]).double().cpu())
    totals = {name: torch.stack(rows).sum(0) for name, rows in sums.items()}
    return {name: to_psnr(total / count) for name, (total, count) in totals.items()}


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as whole grey levels 0..255, still floating point."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round()


def to_psnr(mse: Tensor) -> float:
    """Decibels of a mean squared error of values in [0, 1]."""
    return float(-10 * torch.log10(mse.clamp(min=1e-10)))
