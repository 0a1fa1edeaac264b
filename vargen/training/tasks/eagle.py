"""Training of EAGLE drafters on the hidden states of a frozen backbone (arXiv:2401.15077; loss of LANTERN, arXiv:2410.03355).

Teacher-forced passes of the backbone over encoded images give features and distributions; the drafter learns to continue both.
Unlike the released recipe, the pair that starts every image is trained too.

Letters: B images, T condition positions, N codes, L = T + N - 2 pairs, D width, V codes of the codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.draft_models.eagle import EagleDrafter
from vargen.tokenizers.vq.model import VQTokenizer
from vargen.training.recipe import Recipe
from vargen.training.sources import RECIPE_FILE, component_folder, load_tokenizer, load_transformer, start_from_weights
from vargen.training.tasks.base import Task, model_from, paired_grid


@dataclass(frozen=True, kw_only=True)
class DrafterOptions:
    """What is drafted for, and the loss."""

    backbone: str = "heroes32-llamagen"  # folder of a transformer run, of a saved model or pipeline, or a model's name
    tokenizer: str = "heroes32-llamagen"
    start: str = ""  # run or drafter of the same shape whose weights to start from; empty = random weights
    feature_weight: float = 1.0
    distribution_weight: float = 0.1  # of the cross-entropy to the target's distribution; both weights as released
    noise: float = 0.2  # on the features, times 512 / L, uniform around 0
    guidance_scale: float = 2.0  # of the sample grid
    grid_size: int = 16


class DrafterTask(Task):
    """Train an ``EagleDrafter``."""

    Options = DrafterOptions

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(recipe, rank, world_size)
        self.backbone = load_backbone(self.options.backbone)
        self.tokenizer: VQTokenizer = load_tokenizer(self.options.tokenizer)
        sizes: tuple[int, int] = self.backbone.codebook_size, self.tokenizer.codebook_size
        if sizes[0] != sizes[1]:
            raise ValueError(f"backbone and tokenizer must have the same codebook size, got {sizes[0]} and {sizes[1]}")

    def build(self, initialize: bool) -> EagleDrafter:
        """Make a drafter that reads the backbone's embeddings; widths and positions are the backbone's."""
        c = self.backbone.config
        fixed: dict[str, Any] = {
            "dim": c.dim,
            "codebook_size": c.codebook_size,
            "grid_size": self.backbone.grid_size,
            "num_condition_tokens": self.backbone.num_condition_tokens,
            "own_embeddings": False,
            "rope_base": c.rope_base,
            "condition_rope": c.condition_rope,
        }
        model: EagleDrafter = model_from(EagleDrafter, {"num_heads": c.num_heads, **self.recipe.model}, **fixed)
        if initialize and self.options.start:
            start_from_weights(model, self.options.start, "drafters/eagle")
        return model

    def setup(self, device: torch.device) -> None:
        """Move the frozen models to the device of training."""
        super().setup(device)
        self.backbone.to(device)
        self.tokenizer.to(device)

    def compile(self, model: nn.Module) -> None:
        """Compile the blocks."""
        for layer in model.layers:  # type: ignore[union-attr]
            layer.compile()

    @torch.no_grad()
    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the codes and the target's hidden states."""
        codes = self.tokenizer.encode(batch["image"]).codes.flatten(1)
        return {**batch, "codes": codes, "hidden": hidden_states(self.backbone, codes, batch["condition"])}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of features and of distributions, of the pairs that end in a code."""
        hidden, o = batch["hidden"], self.options
        pairs = hidden[:, :-1]
        noisy = pairs + (torch.rand_like(pairs) - 0.5) * (o.noise * 512 / pairs.shape[1])
        predicted = model(noisy, self._embeddings(batch["codes"]))
        mask = self._mask(pairs)
        feature, cross_entropy = drafter_losses(predicted, hidden[:, 1:], self.backbone.output, mask)
        loss = o.feature_weight * feature + o.distribution_weight * cross_entropy
        return loss, {"feature": feature.detach(), "cross_entropy": cross_entropy.detach()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Chance that the first sampled proposal is accepted, 1 - TV(p, q), and how often the likeliest codes agree."""
        accepted, agree, count = 0.0, 0.0, 0
        for batch in self.test_batches(16):
            hidden = batch["hidden"]
            first = self.backbone.num_condition_tokens - 1
            predicted = model(hidden[:, :-1], self._embeddings(batch["codes"]))[:, first:]
            p, q = (self.backbone.output(h).float().softmax(-1) for h in (hidden[:, 1 + first :], predicted))
            accepted += torch.minimum(p, q).sum().item()
            agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
            count += p[..., 0].numel()
        return {"held_out_acceptance": accepted / count, "held_out_agreement": agree / count}

    @torch.no_grad()
    def sample_grid(self, model: nn.Module) -> Tensor:
        """Images drawn with the drafter, exactly, below the test images that their conditions come from."""
        from vargen.samplers.window.speculative import SpeculativeSampler

        batch = self.test_batch(0, self.options.grid_size)
        sampler = SpeculativeSampler(rule="recursive", num_draft_tokens=8, guidance_scale=self.options.guidance_scale)
        seeds = list(range(self.options.grid_size))
        codes = sampler.sample(self.backbone, batch["condition"], seeds=seeds, drafter=model.eval()).codes
        assert isinstance(codes, Tensor)
        return paired_grid(batch["image"], self.tokenizer.decode(codes))

    def _embeddings(self, codes: Tensor) -> Tensor:
        """Embeddings of the codes behind each hidden state but the last, ``[B, L, D]``; placeholders are code 0."""
        before = self.backbone.num_condition_tokens - 1
        with torch.no_grad():
            return self.backbone.embed(F.pad(codes[:, :-1], (before, 0)))

    def _mask(self, pairs: Tensor) -> Tensor:
        """``[B, L]``: 1 for pairs whose code is no placeholder."""
        place = torch.arange(pairs.shape[1], device=pairs.device)
        return (place >= self.backbone.num_condition_tokens - 1).float().expand(len(pairs), -1)


def drafter_losses(
    predicted: Tensor, target: Tensor, head: Callable[[Tensor], Tensor], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Smooth L1 between features, and cross-entropy from the target's distribution to the drafter's; means over the mask.

    Args:
        predicted: ``[B, L, D]`` features of the drafter.
        target: ``[B, L, D]`` hidden states of the target.
        head: the target's output layer, frozen.
        mask: ``[B, L]`` float, 1 where a pair counts.

    Returns:
        Two scalars; the released loss is the first plus a tenth of the second.
    """
    total = mask.sum() + 1e-5
    feature = (F.smooth_l1_loss(predicted.float(), target.float(), reduction="none").mean(-1) * mask).sum() / total
    with torch.no_grad():
        p = head(target).float().softmax(-1)
    cross_entropy = -(p * head(predicted.to(target.dtype)).float().log_softmax(-1)).sum(-1)
    return feature, (cross_entropy * mask).sum() / total


def hidden_states(backbone: LlamaGenTransformer, codes: Tensor, condition: Tensor) -> Tensor:
    """Hidden states of a whole sequence as they enter the head, condition positions included: ``[B, T + N - 1, D]``."""
    condition = backbone.cls_embedding.check(condition, values=False)
    x = torch.cat([backbone.cls_embedding(condition), backbone.embed(codes[:, :-1])], dim=1)
    positions = torch.arange(x.shape[1], device=x.device)
    present = backbone.cls_embedding.mask(condition)
    if present is not None:
        raise ValueError("drafters are trained on backbones without padded conditions (classes, attributes)")
    return backbone.norm(backbone.forward_full(x, positions=positions, is_causal=True))


def load_backbone(source: str | Path) -> LlamaGenTransformer:
    """Load a frozen transformer in evaluation mode, in float32.

    Args:
        source: folder of a training run (its newest averaged weights are taken), of a saved model or pipeline, or the name
            of a shipped model.

    Raises:
        ValueError: nothing of the kind is there.
    """
    if (Path(source) / RECIPE_FILE).is_file():
        model = cast(LlamaGenTransformer, load_transformer(source))
    else:
        model = LlamaGenTransformer.from_pretrained(component_folder(source, "backbone"))
    return model.float().eval().requires_grad_(False)
