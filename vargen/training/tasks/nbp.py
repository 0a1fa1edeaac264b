"""Training of NBP's transformer on the codes of a frozen video tokenizer (arXiv:2502.07737, section 3.2).

Clips are made and encoded afresh at every step.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vargen.backbones.nbp.model import NBPTransformer
from vargen.datasets.motion.compose import FRAMES
from vargen.protocols import Model
from vargen.tokenizers.video_fsq.model import VideoFSQTokenizer
from vargen.training.recipe import Recipe
from vargen.training.sources import start_from_weights
from vargen.training.tasks.base import model_from
from vargen.training.tasks.llamagen import LlamaGenTask
from vargen.training.tasks.video import ClipTask, to_strips


@dataclass(frozen=True, kw_only=True)
class NBPOptions:
    """The tokenizer, the length of clips, and how the sample strips are drawn."""

    tokenizer: str = "runs/heroes-video-fsq"  # folder of a tokenizer run or of a saved tokenizer, or a model's name
    start: str = ""  # run, model or pipeline of the same shape whose weights to start from; empty = random weights
    frames: int = 17
    guidance_scale: float = 1.5
    temperature: float = 0.8
    grid_size: int = 14  # clips on the sample strip, from conditions of test clips

    def __post_init__(self) -> None:
        if self.frames not in FRAMES:
            raise ValueError(f"options.frames must be one of {', '.join(map(str, FRAMES))}, got {self.frames}")
        if self.grid_size < 1:
            raise ValueError(f"options.grid_size must be >= 1, got {self.grid_size}")


class NBPTask(ClipTask, LlamaGenTask):
    """Train an ``NBPTransformer`` on conditions and codes of clips."""

    Options = NBPOptions
    tokenizer_kind = VideoFSQTokenizer

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(recipe, rank, world_size)
        self._known = _PatchCodes(self.tokenizer) if self.tokenizer.config.dictionary else None

    def build(self, initialize: bool) -> NBPTransformer:  # type: ignore[override]
        """Make the transformer for the tokenizer's codes and the data set's conditions."""
        fixed: dict[str, Any] = {**self.fixed(), "max_positions": None, "attribute_dropout_prob": 0.0}
        model: NBPTransformer = model_from(NBPTransformer, self.recipe.model, **fixed)
        if initialize and self.options.start:
            start_from_weights(model, self.options.start, "backbone")
        return model

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Nats per token of test clips: under full conditions, under none, under the variants; and of first frames."""
        totals: dict[str, float] = defaultdict(float)
        count = 0
        for batch in self.test_batches(16):
            codes = batch["codes"]
            frame = codes.shape[1] // (1 + (self.options.frames - 1) // self.tokenizer.temporal_factor)
            for name, condition in self.conditions(batch).items():
                logits = model(codes, condition)
                nats = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view_as(codes)
                totals[name] += nats.sum().item()
                if not name:
                    totals["_first_frame"] += nats[:, :frame].sum().item() * codes.shape[1] / frame
            count += codes.numel()
        return {f"held_out_nats_per_token{name}": total / count for name, total in totals.items()}

    @torch.no_grad()
    def sample_grid(self, model: nn.Module) -> Tensor:
        """Guided samples for the conditions of test clips, each below the clip itself."""
        from vargen.samplers.schedule.next_block import NextBlockSampler

        batch = self.test_batch(0, self.options.grid_size)
        sampler = NextBlockSampler(guidance_scale=self.options.guidance_scale, temperature=self.options.temperature)
        output = sampler.sample(cast(Model, model), batch["condition"], seeds=list(range(len(batch["condition"]))))
        assert isinstance(output.codes, Tensor)
        drawn = self.tokenizer.decode(output.codes.view(-1, *model.grid_size))  # type: ignore[misc]
        return to_strips(rearrange([batch["clip"], drawn], "pair n c t h w -> (n pair) c t h w"))

    @torch.no_grad()
    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the codes, ``[B, N]``."""
        encode = self._known or (lambda clips: self.tokenizer.encode(clips).codes)
        return {**batch, "codes": encode(batch["clip"]).flatten(1)}


class _PatchCodes:
    """Codes of a dictionary tokenizer with a memory: pixel art shows the same patches again and again."""

    def __init__(self, tokenizer: VideoFSQTokenizer) -> None:
        self.tokenizer = tokenizer
        width = tokenizer.patch_table.shape[1]  # type: ignore[union-attr,index]
        generator = torch.Generator().manual_seed(0)
        self.hash = torch.randint(1, 2**40, (width,), generator=generator)  # type: ignore[misc]
        self.keys = torch.empty(0, dtype=torch.int64)
        self.codes = torch.empty(0, dtype=torch.int64)

    def __call__(self, clips: Tensor) -> Tensor:
        """``[B, 3, T, H, W]`` to ``[B, t, h, w]``, as ``encode`` does."""
        patches = self.tokenizer.patch(clips)
        rows = rearrange(patches, "b c t h w -> (b t h w) c")
        keys, inverse = (((rows + 1) * 127.5).round().long() @ self.hash.to(rows.device)).unique(return_inverse=True)
        if len(self.keys):
            place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
            new = self.keys[place] != keys
        else:
            new = torch.ones_like(keys, dtype=torch.bool)
        if bool(new.any()):
            example = torch.empty_like(keys).scatter_(0, inverse, torch.arange(len(rows), device=rows.device))
            vectors = rows[example[new]].T[None, :, None, None]  # one row of patches
            found = self.tokenizer._nearest(vectors).flatten()
            self.keys, order = torch.cat([self.keys.to(keys.device), keys[new]]).sort()
            self.codes = torch.cat([self.codes.to(keys.device), found])[order]
            place = torch.searchsorted(self.keys, keys)
        return self.codes[place][inverse].view(patches.shape[0], *patches.shape[2:])
