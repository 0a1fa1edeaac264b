"""Training of multi-scale tokenizers (VAR, arXiv:2404.02905, section 3.2), for which no code was ever released.

Reconstruction with the quantizer's own loss, no discriminator. Patch tokenizers have their codebook from k-means before
the first step and train the decoder alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vargen.tokenizers.multiscale_vq import MultiScaleVQTokenizer
from vargen.training.tasks import model_from
from vargen.training.vq import VQOptions, VQTask


@dataclass(frozen=True, kw_only=True)
class MultiScaleVQOptions(VQOptions):
    """Settings of the loss and of the codebook's initialisation."""

    num_kmeans_images: int = 3000
    num_kmeans_iterations: int = 2
    num_kmeans_rounds: int = 3  # refits of the codebook to the residuals that it leaves itself


class MultiScaleVQTask(VQTask):
    """Train a ``MultiScaleVQTokenizer``; loss, metrics and pictures are those of ``VQTask``."""

    Options = MultiScaleVQOptions

    def build(self, initialize: bool) -> MultiScaleVQTokenizer:  # type: ignore[override]
        """Make the tokenizer; its codebook starts from k-means over the residuals of training heroes."""
        model: MultiScaleVQTokenizer = model_from(MultiScaleVQTokenizer, self.recipe.model)
        if initialize:
            size = self.options.num_kmeans_images
            images = self._train.examples(torch.arange(size).numpy())["image"]
            generator = torch.Generator().manual_seed(self.recipe.seed)
            rounds = self.options.num_kmeans_rounds
            model.init_codebook_(images, generator, self.options.num_kmeans_iterations, rounds)
        return model
