"""Training of drafters for continuous speculative decoding: distillation along the target's denoising paths.

A drafter trained on its own guesses other noise than the target does, and over a whole chain nothing of it is accepted.
Here the target runs its chains and the drafter learns their distributions, step by step: the loss is KL(p || q) between those of
whole paths, which bounds the share of refused drafts (Pinsker). The drafter starts with the target's head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vargen.backbones.layers.gaussian_diffusion import gaussian_kl
from vargen.backbones.mar.causal import CausalMARTransformer
from vargen.samplers.acceptance.gaussian import log_ratio
from vargen.samplers.window.continuous_speculative import ContinuousSpeculativeSampler
from vargen.training.recipe import Recipe
from vargen.training.sources import start_from_weights
from vargen.training.tasks.mar import CausalMARTask, ContinuousTransformer, MAROptions, load_continuous


@dataclass(frozen=True, kw_only=True)
class MARDraftOptions(MAROptions):
    """The target, and how much of a batch runs chains."""

    backbone: str = "runs/heroes32-mar-causal"  # folder of a "causal-mar" run, of a saved model or pipeline, or a name
    num_positions: int = 16  # tokens of an image whose chains are run in a step
    gamma: int = 4  # of the sample grid


class MARDraftTask(CausalMARTask):
    """Train a small ``CausalMARTransformer`` to draft for a large one."""

    Options = MARDraftOptions

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(recipe, rank, world_size)
        self.backbone: CausalMARTransformer = load_continuous(self.options.backbone)

    def build(self, initialize: bool) -> CausalMARTransformer:
        """Make a drafter over the target's tokens, with its head."""
        c = self.backbone.config
        shared = (
            "grid_size",
            "patch_size",
            "head_depth",
            "head_width",
            "num_sampling_steps",
            "last_timestep",
            "prediction_type",
        )
        fixed = {**self.fixed(), **{name: getattr(c, name) for name in shared}}
        model: CausalMARTransformer = _make_drafter(self.recipe.model, c, fixed)
        if initialize and self.options.start:
            start_from_weights(model, self.options.start, "drafter")
        elif initialize:
            head = {
                k: v for k, v in self.backbone.diffloss.state_dict().items() if k in _fitting(model, self.backbone)
            }
            model.diffloss.load_state_dict(head, strict=False)
            if model.config.dim == c.dim:
                model.cls_embedding.load_state_dict(self.backbone.cls_embedding.state_dict())
                model.z_proj.load_state_dict(self.backbone.z_proj.state_dict())
                model.norm.load_state_dict(self.backbone.norm.state_dict())
        return model

    def setup(self, device: torch.device) -> None:
        """Move the frozen models to the device of training."""
        super().setup(device)
        self.backbone.to(device)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """KL between the distributions of whole paths, in nats a token."""
        _, target, draft = self._distributions(cast(CausalMARTransformer, model), batch, None)
        nats = _path_kl(target, draft).mean()
        return nats, {"path_kl": nats.detach()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Chance that a draft is accepted given real tokens before it, 1 - TV(p, q) = E_p min(1, q / p), and the KL."""
        accepted, nats, count = 0.0, 0.0, 0
        for i, batch in enumerate(self.test_batches(16)):
            generator = torch.Generator(self.device).manual_seed(i)
            states, target, draft = self._distributions(cast(CausalMARTransformer, model), batch, generator)
            ratio = log_ratio(states[:, 1:], target, draft)
            accepted += float((-ratio).exp().clamp(max=1.0).sum())
            nats += float(_path_kl(target, draft).sum())
            count += len(ratio)
        return {"held_out_acceptance": accepted / count, "held_out_path_kl": nats / count}

    def draw(self, model: ContinuousTransformer, condition: Tensor) -> Tensor:
        """Tokens ``[B, N, D]`` for the grid: the target's, drafted by the model."""
        sampler = ContinuousSpeculativeSampler(
            guidance_scale=self.options.guidance_scale, num_draft_tokens=self.options.gamma
        )
        seeds = list(range(len(condition)))
        latents = sampler.sample(self.backbone, condition, seeds=seeds, drafter=model.eval()).latents
        assert latents is not None
        return latents

    def _distributions(
        self, model: CausalMARTransformer, batch: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Paths of the target at some positions of every image, and the distributions of both models along them."""
        tokens, condition = model.to_tokens(batch["latents"]), batch["condition"]
        chosen = torch.rand(tokens.shape[:2], generator=generator, device=tokens.device).argsort(1)
        chosen = chosen[:, : self.options.num_positions]  # B k
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        chain = self.backbone.head.diffusion()
        with torch.no_grad():
            z_p = self.backbone(tokens, condition)[rows, chosen].flatten(0, 1)
            noise = torch.randn(
                len(z_p), chain.num_steps + 1, tokens.shape[-1], generator=generator, device=tokens.device
            )
            path = self.backbone.head.sample(z_p[None], noise, chain, final_noise=True)
        z_q = model(tokens, condition)[rows, chosen].flatten(0, 1)
        draft = model.head.path_params(path.states, z_q[None], chain)
        return path.states, (path.means, path.stds), draft


def _path_kl(target: tuple[Tensor, Tensor], draft: tuple[Tensor, Tensor]) -> Tensor:
    """KL(p || q) of the distributions of whole chains in nats: means and spreads ``[n, S, D]`` to ``[n]``."""
    (mean_p, std_p), (mean_q, std_q) = target, draft
    return gaussian_kl(mean_p, 2 * std_p.log(), mean_q, 2 * std_q.log()).flatten(1).sum(1)


def _make_drafter(settings: Mapping[str, Any], target: Any, fixed: Mapping[str, Any]) -> CausalMARTransformer:
    """A drafter: the target's width and heads unless the recipe says otherwise."""
    from vargen.training.tasks.base import model_from

    named = {"dim": target.dim, "num_heads": target.num_heads, **settings}
    model: CausalMARTransformer = model_from(CausalMARTransformer, named, **fixed)
    return model


def _fitting(model: CausalMARTransformer, target: CausalMARTransformer) -> set[str]:
    """Weights of the head that have one shape in both; the projection of z differs where the widths do."""
    own, other = model.diffloss.state_dict(), target.diffloss.state_dict()
    return {name for name, value in own.items() if name in other and other[name].shape == value.shape}
