"""Training of multi-scale tokenizers (VAR, arXiv:2404.02905, section 3.2), for which no code was ever released.

Reconstruction with the quantizer's own loss, no discriminator. Patch tokenizers have their codebook from k-means before
the first step and train the decoder alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vargen.checkpoints.reader import load_strict
from vargen.tokenizers.multiscale_vq.model import MultiScaleVQTokenizer
from vargen.tokenizers.vq.model import VQTokenizer
from vargen.training.sources import load_tokenizer, start_from_weights
from vargen.training.tasks.base import model_from
from vargen.training.tasks.vq import VQOptions, VQTask


@dataclass(frozen=True, kw_only=True)
class MultiScaleVQOptions(VQOptions):
    """Settings of the loss and of the codebook's initialisation."""

    num_kmeans_images: int = 3000
    num_kmeans_iterations: int = 2
    num_kmeans_rounds: int = 3  # refits of the codebook to the residuals that it leaves itself
    init_from: str = ""  # "vq" run, tokenizer or model whose codebook and decoder are the start, instead of k-means


class MultiScaleVQTask(VQTask):
    """Train a ``MultiScaleVQTokenizer``; loss, metrics and pictures are those of ``VQTask``."""

    Options = MultiScaleVQOptions

    def build(self, initialize: bool) -> MultiScaleVQTokenizer:  # type: ignore[override]
        """Make the tokenizer; its codebook comes from another tokenizer or from k-means over training images."""
        model: MultiScaleVQTokenizer = model_from(MultiScaleVQTokenizer, self.recipe.model)
        if initialize and self.options.start:
            start_from_weights(model, self.options.start, "tokenizer")  # k-means has had its rounds there
        elif initialize and self.options.init_from:
            start: VQTokenizer = load_tokenizer(self.options.init_from)
            model.quantize.embedding.weight.data.copy_(start.codebook)
            load_strict(model.post_quant_conv, start.post_quant_conv.state_dict())
            load_strict(model.decoder, start.decoder.state_dict())
        elif initialize:
            size = self.options.num_kmeans_images
            images = self.train_data.examples(torch.arange(size).numpy())["image"]
            generator = torch.Generator().manual_seed(self.recipe.seed)
            rounds = self.options.num_kmeans_rounds
            model.init_codebook_(images, generator, self.options.num_kmeans_iterations, rounds)
        return model
