"""Training of LlamaGen's transformer on the codes of a frozen tokenizer (arXiv:2406.06525, section 3.2).

Heroes are composed and encoded afresh at every step; no example is seen twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.datasets.heroes.compose import HeroAtlas
from vargen.tokenizers.vq.model import VQTokenizer
from vargen.training.recipe import Recipe
from vargen.training.sources import load_tokenizer, start_from_weights
from vargen.training.tasks.base import Task, model_from, to_grid


@dataclass(frozen=True, kw_only=True)
class LlamaGenOptions:
    """The tokenizer, and how the sample grids are drawn."""

    tokenizer: str = "runs/heroes32-vq"  # folder of a tokenizer run or of a saved tokenizer, or a model's name
    start: str = ""  # run, model or pipeline of the same shape whose weights to start from; empty = random weights
    guidance_scale: float = 2.0
    grid_size: int = 16  # pictures on the sample grid, from attributes of test heroes


class LlamaGenTask(Task):
    """Train a ``LlamaGenTransformer`` on attributes and codes of heroes."""

    Options: ClassVar[type[Any]] = LlamaGenOptions
    tokenizer_kind: ClassVar[type[Any]] = VQTokenizer

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(recipe, rank, world_size)
        self.tokenizer: Any = load_tokenizer(self.options.tokenizer, self.tokenizer_kind)

    def build(self, initialize: bool) -> LlamaGenTransformer:
        """Make the transformer for the tokenizer's codebook and the atlas's attributes."""
        atlas = HeroAtlas.load()
        fixed: dict[str, Any] = {
            "codebook_size": self.tokenizer.codebook_size,
            "condition_type": "attributes",
            "num_attributes": atlas.num_attributes,
            "num_condition_tokens": len(atlas.slots),
            "class_dropout_prob": 0.0,  # the stream of heroes drops conditions: a resumed run sees the same
        }
        model: LlamaGenTransformer = model_from(LlamaGenTransformer, self.recipe.model, **fixed)
        if initialize and self.options.start:
            start_from_weights(model, self.options.start, "backbone")
        return model

    def setup(self, device: torch.device) -> None:
        """Move the tokenizer to the device of training."""
        super().setup(device)
        self.tokenizer.to(device)

    def compile(self, model: nn.Module) -> None:
        """Compile the blocks: one graph serves all of them."""
        for layer in model.layers:  # type: ignore[union-attr]
            layer.compile()

    def batch(self, step: int) -> dict[str, Tensor]:
        """Attributes and codes of one step."""
        return self._encode(super().batch(step))

    def test_batch(self, start: int, size: int) -> dict[str, Tensor]:
        """Attributes, codes and pictures of test heroes."""
        return self._encode(super().test_batch(start, size))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats per token."""
        logits = model(batch["codes"], batch["attributes"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["codes"].flatten())
        return loss, {"nats_per_token": loss.detach()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Nats per token of fresh heroes under their full attributes, and under none."""
        total, null, count = 0.0, 0.0, 0
        for batch in self.test_batches(32):
            codes, attributes = batch["codes"], batch["attributes"]
            for which, condition in enumerate((attributes, torch.zeros_like(attributes))):
                nats = F.cross_entropy(model(codes, condition).flatten(0, 1), codes.flatten(), reduction="sum").item()
                total, null = (total + nats, null) if which == 0 else (total, null + nats)
            count += codes.numel()
        return {"held_out_nats_per_token": total / count, "held_out_nats_per_token_null": null / count}

    @torch.no_grad()
    def sample_grid(self, model: nn.Module) -> Tensor:
        """Guided samples for the attributes of test heroes, below the heroes themselves."""
        from vargen.samplers.window.next_token import NextTokenSampler

        batch = self.test_batch(0, self.options.grid_size)
        sampler = NextTokenSampler(guidance_scale=self.options.guidance_scale)
        output = sampler.sample(model, batch["attributes"], seeds=list(range(self.options.grid_size)))
        assert isinstance(output.codes, Tensor)
        columns = min(16, self.options.grid_size)
        rows = zip(batch["image"].split(columns), self.tokenizer.decode(output.codes).split(columns), strict=True)
        return to_grid(torch.cat([part for pair in rows for part in pair]), columns)

    @torch.no_grad()
    def _encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch["codes"] = self.tokenizer.encode(batch["image"]).codes.flatten(1)
        return batch
