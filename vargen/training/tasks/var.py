"""Training of VAR's transformer on the scales of a frozen tokenizer (arXiv:2404.02905, section 3.1).

Examples are made and encoded afresh at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.backbones.var.model import VARTransformer
from vargen.protocols import Model
from vargen.tokenizers.multiscale_vq.model import MultiScaleVQTokenizer
from vargen.training.recipe import Recipe
from vargen.training.sources import load_tokenizer, start_from_weights
from vargen.training.tasks.base import Task, model_from, paired_grid


@dataclass(frozen=True, kw_only=True)
class VAROptions:
    """The tokenizer, and how the sample grids are drawn."""

    tokenizer: str = "runs/heroes32-multiscale-vq"  # folder of a run or of a saved tokenizer, or a model's name
    start: str = ""  # run, model or pipeline of the same shape whose weights to start from; empty = random weights
    guidance_scale: float = 2.0
    grid_size: int = 16  # pictures on the sample grid, from conditions of test images


class VARTask(Task):
    """Train a ``VARTransformer`` on conditions and codes."""

    Options = VAROptions

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(recipe, rank, world_size)
        self.tokenizer: MultiScaleVQTokenizer = load_tokenizer(self.options.tokenizer, MultiScaleVQTokenizer)

    def build(self, initialize: bool) -> VARTransformer:
        """Make the transformer for the tokenizer's scales and codebook and the data set's conditions."""
        fixed: dict[str, Any] = {
            "codebook_size": self.tokenizer.codebook_size,
            "codebook_dim": self.tokenizer.config.codebook_dim,
            "scales": [list(size) for size in self.tokenizer.scales],
            "residual": self.tokenizer.config.residual,
            **self.condition_settings(),
        }
        model: VARTransformer = model_from(VARTransformer, self.recipe.model, **fixed)
        if initialize and self.options.start:
            start_from_weights(model, self.options.start, "backbone")
        if initialize and model.config.codebook_head:
            model.set_codebook_(self.tokenizer.codebook)
        return model

    def setup(self, device: torch.device) -> None:
        """Move the tokenizer to the device of training."""
        super().setup(device)
        self.tokenizer.to(device)

    def compile(self, model: nn.Module) -> None:
        """Compile the blocks: one graph serves all of them."""
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile()

    @torch.no_grad()
    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the codes of all scales in a row, ``[B, L]``, and the inputs."""
        codes = self.tokenizer.quantize(self.tokenizer.features(batch["image"])).codes
        return {**batch, "features": self.tokenizer.scale_inputs(codes), "codes": torch.cat(codes, dim=1)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats per token, every token of every scale with the same weight."""
        nats = F.cross_entropy(
            model(batch["features"], batch["condition"]).flatten(0, 1), batch["codes"].flatten(), reduction="none"
        )
        last = self.tokenizer.scales[-1]
        tail = nats.detach().view_as(batch["codes"])[:, -last[0] * last[1] :].mean()
        return nats.mean(), {"nats_per_token": nats.detach().mean(), "nats_last_scale": tail}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Nats per token of test images under their full conditions, in all and by scale, and under none."""
        sums: dict[str, Tensor] = {}
        count = 0
        for batch in self.test_batches(32):
            codes = batch["codes"]
            for name, condition in self.conditions(batch).items():
                logits = model(batch["features"], condition).transpose(1, 2)
                nats = F.cross_entropy(logits, codes, reduction="none").sum(0).double().cpu()
                sums[name] = sums.get(name, 0.0) + nats
            count += len(codes)
        found = {f"held_out_nats_per_token{name}": (total / count).mean().item() for name, total in sums.items()}
        scales = (sums[""] / count).split([h * w for h, w in self.tokenizer.scales])
        return {**found, **{f"held_out_nats_scale_{k}": part.mean().item() for k, part in enumerate(scales)}}

    @torch.no_grad()
    def sample_grid(self, model: nn.Module) -> Tensor:
        """Guided samples for the conditions of test images, below the images themselves."""
        from vargen.samplers.scale.next_scale import NextScaleSampler

        batch = self.test_batch(0, self.options.grid_size)
        sampler = NextScaleSampler(guidance_scale=self.options.guidance_scale)
        seeds = list(range(self.options.grid_size))
        output = sampler.sample(cast(Model, model), batch["condition"], seeds=seeds, tokenizer=self.tokenizer)
        assert output.latents is not None
        return paired_grid(batch["image"], self.tokenizer.decode_latents(output.latents))
