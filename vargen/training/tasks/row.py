"""Training of row drafters on the hidden states of a frozen backbone: two heads learn its distributions from the neighbours.

Letters: B images, T condition positions, N codes, D width, V codes of the codebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vargen.draft_models.row import RowDrafter
from vargen.training.tasks.base import model_from, paired_grid
from vargen.training.tasks.eagle import DrafterTask


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """What is drafted for."""

    backbone: str = "heroes32-llamagen"  # folder of a transformer run, of a saved model or pipeline, or a model's name
    tokenizer: str = "heroes32-llamagen"
    guidance_scale: float = 2.0  # of the sample grid
    grid_size: int = 16


class RowTask(DrafterTask):
    """Train a ``RowDrafter``: cross-entropy from the target's distribution of every code to the drafter's."""

    Options = RowOptions  # type: ignore[assignment]

    def build(self, initialize: bool) -> RowDrafter:  # type: ignore[override]
        """Make a drafter whose widths are the backbone's."""
        backbone = self.backbone
        fixed = {
            "dim": backbone.config.dim,
            "codebook_size": backbone.codebook_size,
            "grid_size": backbone.grid_size,
            "num_condition_tokens": backbone.num_condition_tokens,
        }
        return model_from(RowDrafter, self.recipe.model, **fixed)

    def compile(self, model: nn.Module) -> None:
        """Compile the heads."""
        for head in model.children():
            head.compile()

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over all codes."""
        target, predicted = self._states(model, batch)
        with torch.no_grad():
            p = self.backbone.output(target).float().softmax(-1)
        loss = -(p * self.backbone.output(predicted).float().log_softmax(-1)).sum(-1).mean()
        return loss, {}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Chance that a sampled proposal is accepted, 1 - TV(p, q), and how often the likeliest codes agree."""
        accepted, agree, count = 0.0, 0.0, 0
        for batch in self.test_batches(16):
            p, q = (self.backbone.output(h).float().softmax(-1) for h in self._states(model, batch))
            accepted += torch.minimum(p, q).sum().item()
            agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
            count += p[..., 0].numel()
        return {"held_out_acceptance": accepted / count, "held_out_agreement": agree / count}

    @torch.no_grad()
    def sample_grid(self, model: nn.Module) -> Tensor:
        """Images drawn with the drafter, exactly, below the test images that their conditions come from."""
        from vargen.samplers.window.speculative import SpeculativeSampler

        batch = self.test_batch(0, self.options.grid_size)
        sampler = SpeculativeSampler(num_draft_tokens=15, guidance_scale=self.options.guidance_scale)
        seeds = list(range(self.options.grid_size))
        codes = sampler.sample(self.backbone, batch["condition"], seeds=seeds, drafter=model.eval()).codes
        assert isinstance(codes, Tensor)
        return paired_grid(batch["image"], self.tokenizer.decode(codes))

    def _states(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states ``[B, N - 1, D]`` that draw the codes behind the first: the target's, and the drafter's guess."""
        codes, stride = batch["codes"], self.backbone.grid_size[1]
        hidden = batch["hidden"][:, self.backbone.num_condition_tokens - 1 :]  # [:, s] draws slot s
        with torch.no_grad():
            embedded = self.backbone.embed(codes)  # B N D
        corner = torch.arange(1, codes.shape[1], device=codes.device) - stride + 1  # of slots 1, 2, ...
        above = hidden[:, corner.clamp(min=0)]  # behind the code above, or the condition
        corners = embedded[:, corner.clamp(min=0)] * (corner >= 0)[:, None]
        return hidden[:, 1:], model(above, corners, embedded[:, :-1])
