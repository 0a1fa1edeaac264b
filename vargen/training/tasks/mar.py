"""Training of MAR and of its causal variant on the latents of a frozen autoencoder (arXiv:2406.11838, section 4).

Examples are made and encoded afresh at every step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from vargen.backbones.mar.causal import CausalMARTransformer
from vargen.backbones.mar.model import MARTransformer
from vargen.samplers.schedule.masked_continuous import ContinuousMaskedSampler
from vargen.samplers.window.continuous_speculative import ContinuousSpeculativeSampler
from vargen.tokenizers.kl.autoencoder import kl_latents
from vargen.training.recipe import Recipe
from vargen.training.sources import RECIPE_FILE, component_folder
from vargen.training.tasks.base import Task, make_task, model_from, paired_grid
from vargen.training.tasks.kl import load_autoencoder

ContinuousTransformer = MARTransformer | CausalMARTransformer
T = TypeVar("T", MARTransformer, CausalMARTransformer)
_EVAL_SEED = 12345  # masks, times and noise of the evaluation


@dataclass(frozen=True, kw_only=True)
class MAROptions:
    """The autoencoder, and how the sample grids are drawn."""

    tokenizer: str = "runs/heroes32-kl"  # folder of a "kl" run, of a saved autoencoder or pipeline, or a model's name
    start: str = ""  # a run or model of the same shape whose weights to start from; empty = random weights
    guidance_scale: float = 2.0
    grid_size: int = 16  # pictures on the sample grid, from conditions of test images


class MARTask(Task):
    """Train a ``MARTransformer`` on conditions and latents."""

    Options = MAROptions
    kind: ClassVar[type[ContinuousTransformer]] = MARTransformer

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(recipe, rank, world_size)
        self.tokenizer: AutoencoderKL = load_autoencoder(self.options.tokenizer)

    def build(self, initialize: bool) -> ContinuousTransformer:
        """Make the transformer for the autoencoder's latents and the data set's conditions."""
        model = model_from(self.kind, self.recipe.model, **self.fixed())
        if initialize and self.options.start:
            model.load_state_dict(load_continuous(self.options.start, self.kind).state_dict())
        return model

    def fixed(self) -> dict[str, Any]:
        """Settings that data and autoencoder decide."""
        return {"latent_channels": self.tokenizer.config.latent_channels, **self.condition_settings()}

    def setup(self, device: torch.device) -> None:
        """Move the autoencoder to the device of training."""
        super().setup(device)
        self.tokenizer.to(device, memory_format=torch.channels_last)  # in which convolutions on CPUs are faster

    def compile(self, model: nn.Module) -> None:
        """Compile blocks, head and the autoencoder's encoder, which is otherwise a third of a step on a CPU."""
        for name in ("encoder_blocks", "decoder_blocks", "layers"):
            for block in getattr(model, name, ()):
                block.compile()
        model.diffloss.net.compile()  # type: ignore[operator,union-attr]
        self.tokenizer.encoder.compile()

    @torch.no_grad()
    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the latents."""
        latents = kl_latents(self.tokenizer, batch["image"].contiguous(memory_format=torch.channels_last))
        return {**batch, "latents": latents}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the noise plus the variational term in bits."""
        loss = model.loss(model.to_tokens(batch["latents"]), batch["condition"])  # type: ignore[operator]
        return loss, {}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The loss on test images under their full conditions, and under none, with the same masks, times and noise."""
        sums: dict[str, float] = defaultdict(float)
        count = 0
        for i, batch in enumerate(self.test_batches(32)):
            tokens = model.to_tokens(batch["latents"])  # type: ignore[operator]
            for name, condition in self.conditions(batch).items():
                generator = torch.Generator(self.device).manual_seed(_EVAL_SEED + i)
                sums[name] += len(tokens) * float(model.loss(tokens, condition, generator=generator))  # type: ignore[operator]
            count += len(tokens)
        return {f"held_out_loss{name}": total / count for name, total in sums.items()}

    @torch.no_grad()
    def sample_grid(self, model: nn.Module) -> Tensor:
        """Guided samples for the conditions of test images, below the images themselves."""
        batch = self.test_batch(0, self.options.grid_size)
        drawn = self.draw(cast(ContinuousTransformer, model), batch["condition"])
        images = self.tokenizer.decode(model.to_latents(drawn) / self.tokenizer.config.scaling_factor).sample  # type: ignore[operator]
        return paired_grid(batch["image"], images)

    def draw(self, model: ContinuousTransformer, condition: Tensor) -> Tensor:
        """Tokens ``[B, N, D]`` for the grid."""
        sampler = ContinuousMaskedSampler(
            guidance_scale=self.options.guidance_scale, num_steps=min(16, model.num_codes)
        )
        latents = sampler.sample(model, condition, seeds=list(range(len(condition)))).latents
        assert latents is not None
        return latents


class CausalMARTask(MARTask):
    """Train a ``CausalMARTransformer``."""

    kind = CausalMARTransformer

    def draw(self, model: ContinuousTransformer, condition: Tensor) -> Tensor:
        """Tokens ``[B, N, D]`` for the grid, next-token."""
        sampler = ContinuousSpeculativeSampler(guidance_scale=self.options.guidance_scale, num_draft_tokens=0)
        latents = sampler.sample(model, condition, seeds=list(range(len(condition)))).latents
        assert latents is not None
        return latents


def load_continuous(
    source: str | Path,
    kind: type[T] = CausalMARTransformer,  # type: ignore[assignment]
    component: str = "backbone",
) -> T:
    """Load a frozen continuous backbone in evaluation mode.

    Args:
        source: folder of a training run (its newest averaged weights are taken), of a saved model or pipeline, or the name
            of a shipped model.
        kind: its class.
        component: its folder in a pipeline.

    Raises:
        ValueError: nothing of the kind is there.
    """
    from vargen.training.sources import read_run

    if (Path(source) / RECIPE_FILE).is_file():
        recipe, weights = read_run(source)
        model = make_task(recipe).build(initialize=False)
        if not isinstance(model, kind):
            raise ValueError(f"{source} is a run of task {recipe.task!r}, which trains no {kind.__name__}")
        model.load_state_dict(weights)
    else:
        model = kind.from_pretrained(component_folder(source, component))
    return model.float().eval().requires_grad_(False)
