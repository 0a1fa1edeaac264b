"""Training of LlamaGen's transformer on the codes of a frozen tokenizer (arXiv:2406.06525, section 3.2).

Examples are made and encoded afresh at every step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn

from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.protocols import Model
from vargen.tokenizers.vq.model import VQTokenizer
from vargen.training.recipe import Recipe
from vargen.training.sources import load_tokenizer, start_from_weights
from vargen.training.tasks.base import Task, model_from, paired_grid

if TYPE_CHECKING:
    from vargen.samplers.base import Sampler


@dataclass(frozen=True, kw_only=True)
class LlamaGenOptions:
    """The tokenizer, and how the sample grids are drawn."""

    tokenizer: str = "runs/heroes32-vq"  # folder of a tokenizer run or of a saved tokenizer, or a model's name
    start: str = ""  # run, model or pipeline of the same shape whose weights to start from; empty = random weights
    guidance_scale: float = 2.0
    grid_size: int = 16  # pictures on the sample grid, from conditions of test images


class LlamaGenTask(Task):
    """Train a ``LlamaGenTransformer`` on conditions and codes."""

    Options: ClassVar[type[Any]] = LlamaGenOptions
    tokenizer_kind: ClassVar[type[ModelMixin]] = VQTokenizer

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(recipe, rank, world_size)
        self.tokenizer: VQTokenizer = load_tokenizer(self.options.tokenizer, self.tokenizer_kind)

    def build(self, initialize: bool) -> LlamaGenTransformer:
        """Make the transformer for the tokenizer's codebook and the data set's conditions."""
        model: LlamaGenTransformer = model_from(LlamaGenTransformer, self.model_settings(), **self.fixed())
        if initialize and self.options.start:
            start_from_weights(model, self.options.start, "backbone")
        return model

    def fixed(self) -> dict[str, Any]:
        """Settings that tokenizer and data decide."""
        return {"codebook_size": self.tokenizer.codebook_size, **self.condition_settings()}

    def model_settings(self) -> dict[str, Any]:
        """The recipe's settings of the model; the grid is that of the data set's images unless they say otherwise."""
        height, width = (side // self.tokenizer.downsample for side in self.train_data.image_size)
        return {"grid_size": (height, width), **self.recipe.model}

    def setup(self, device: torch.device) -> None:
        """Move the tokenizer to the device of training."""
        super().setup(device)
        self.tokenizer.to(device)

    def compile(self, model: nn.Module) -> None:
        """Compile the blocks: one graph serves all of them."""
        for layer in model.layers:  # type: ignore[union-attr]
            layer.compile()

    @torch.no_grad()
    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the codes, ``[B, N]``."""
        return {**batch, "codes": self.tokenizer.encode(batch["image"]).codes.flatten(1)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats per token."""
        logits = model(batch["codes"], batch["condition"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["codes"].flatten())
        return loss, {"nats_per_token": loss.detach()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Nats per token of test images under their full conditions, under none, and under the data set's variants."""
        totals: dict[str, float] = defaultdict(float)
        count = 0
        for batch in self.test_batches(32):
            codes = batch["codes"]
            for name, condition in self.conditions(batch).items():
                logits = model(codes, condition).flatten(0, 1)
                totals[name] += F.cross_entropy(logits, codes.flatten(), reduction="sum").item()
            count += codes.numel()
        return {f"held_out_nats_per_token{name}": total / count for name, total in totals.items()}

    @torch.no_grad()
    def sample_grid(self, model: nn.Module) -> Tensor:
        """Guided samples for the conditions of test images, below the images themselves."""
        batch = self.test_batch(0, self.options.grid_size)
        output = self.sampler().sample(
            cast(Model, model), batch["condition"], seeds=list(range(len(batch["condition"])))
        )
        assert isinstance(output.codes, Tensor)
        return paired_grid(batch["image"], self.tokenizer.decode(output.codes))

    def sampler(self) -> Sampler:
        """What draws the sample grids."""
        from vargen.samplers.window.next_token import NextTokenSampler

        return NextTokenSampler(guidance_scale=self.options.guidance_scale)
