"""Training of VAR's transformer on the scales of a frozen tokenizer (arXiv:2404.02905, section 3.1).

Heroes are composed and encoded afresh at every step; no example is seen twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.backbones.var.model import VARTransformer
from vargen.datasets.heroes.compose import HeroAtlas
from vargen.tokenizers.multiscale_vq.model import MultiScaleVQTokenizer
from vargen.training.recipe import Recipe
from vargen.training.sources import load_tokenizer, start_from_weights
from vargen.training.tasks.base import Task, model_from, to_grid


@dataclass(frozen=True, kw_only=True)
class VAROptions:
    """The tokenizer, and how the sample grids are drawn."""

    tokenizer: str = "runs/heroes32-multiscale-vq"  # folder of a run or of a saved tokenizer, or a model's name
    start: str = ""  # run, model or pipeline of the same shape whose weights to start from; empty = random weights
    guidance_scale: float = 2.0
    grid_size: int = 16  # pictures on the sample grid, from attributes of test heroes


class VARTask(Task):
    """Train a ``VARTransformer`` on attributes and codes of heroes."""

    Options = VAROptions

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(recipe, rank, world_size)
        self.tokenizer: MultiScaleVQTokenizer = load_tokenizer(self.options.tokenizer, MultiScaleVQTokenizer)

    def build(self, initialize: bool) -> VARTransformer:
        """Make the transformer for the tokenizer's scales and codebook and the atlas's attributes."""
        atlas = HeroAtlas.load()
        fixed: dict[str, Any] = {
            "codebook_size": self.tokenizer.codebook_size,
            "codebook_dim": self.tokenizer.config.codebook_dim,
            "scales": [list(size) for size in self.tokenizer.scales],
            "residual": self.tokenizer.config.residual,
            "condition_type": "attributes",
            "num_attributes": atlas.num_attributes,
            "num_condition_tokens": len(atlas.slots),
            "class_dropout_prob": 0.0,  # the stream of heroes drops conditions: a resumed run sees the same
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

    def batch(self, step: int) -> dict[str, Tensor]:
        """Attributes, codes and inputs of one step."""
        return self._encode(super().batch(step))

    def test_batch(self, start: int, size: int) -> dict[str, Tensor]:
        """Attributes, codes, inputs and pictures of test heroes."""
        return self._encode(super().test_batch(start, size))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats per token, every token of every scale with the same weight."""
        nats = F.cross_entropy(
            model(batch["features"], batch["attributes"]).flatten(0, 1), batch["codes"].flatten(), reduction="none"
        )
        last = self.tokenizer.scales[-1]
        tail = nats.detach().view_as(batch["codes"])[:, -last[0] * last[1] :].mean()
        return nats.mean(), {"nats_per_token": nats.detach().mean(), "nats_last_scale": tail}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Nats per token of fresh heroes under their full attributes, in all and by scale, and under none."""
        sums = torch.zeros(2, sum(h * w for h, w in self.tokenizer.scales), dtype=torch.float64)
        count = 0
        for batch in self.test_batches(32):
            codes, attributes = batch["codes"], batch["attributes"]
            for row, condition in enumerate((attributes, torch.zeros_like(attributes))):
                logits = model(batch["features"], condition).transpose(1, 2)
                sums[row] += F.cross_entropy(logits, codes, reduction="none").sum(0).cpu()
            count += len(codes)
        sums /= count
        found = {
            "held_out_nats_per_token": sums[0].mean().item(),
            "held_out_nats_per_token_null": sums[1].mean().item(),
        }
        for k, part in enumerate(sums[0].split([h * w for h, w in self.tokenizer.scales])):
            found[f"held_out_nats_scale_{k}"] = part.mean().item()
        return found

    @torch.no_grad()
    def sample_grid(self, model: nn.Module) -> Tensor:
        """Guided samples for the attributes of test heroes, below the heroes themselves."""
        from vargen.samplers.scale.next_scale import NextScaleSampler

        batch = self.test_batch(0, self.options.grid_size)
        sampler = NextScaleSampler(guidance_scale=self.options.guidance_scale)
        seeds = list(range(self.options.grid_size))
        output = sampler.sample(model, batch["attributes"], seeds=seeds, tokenizer=self.tokenizer)
        assert output.latents is not None
        columns = min(16, self.options.grid_size)
        drawn = self.tokenizer.decode_latents(output.latents)
        rows = zip(batch["image"].split(columns), drawn.split(columns), strict=True)
        return to_grid(torch.cat([part for pair in rows for part in pair]), columns)

    @torch.no_grad()
    def _encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        codes = self.tokenizer.quantize(self.tokenizer.features(batch["image"])).codes
        batch["features"] = self.tokenizer.scale_inputs(codes)
        batch["codes"] = torch.cat(codes, dim=1)
        return batch
