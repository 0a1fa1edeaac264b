"""Training of video tokenizers with scalar codes: reconstruction of clips (arXiv:2502.07737, section 3.1).

No discriminator. Where the encoder is a dictionary, its patches come from k-means before the first step, and the decoder
alone is trained: it corrects patches from their surroundings and from earlier frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vargen.datasets.motion.compose import FRAMES
from vargen.tokenizers.video_fsq.model import VideoFSQTokenizer
from vargen.tokenizers.vq.kmeans import assign, update
from vargen.training.sources import start_from_weights
from vargen.training.tasks.base import Task, model_from, to_grid
from vargen.training.tasks.vq import to_psnr, to_uint8

_MANY = 60.0  # a patch seen more often weighs no more: plain background is a third of everything


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """Settings of clips, of the loss and of the dictionary."""

    frames: int = 17
    l1_weight: float = 0.2
    mse_weight: float = 1.0
    num_dictionary_clips: int = 2000
    num_kmeans_iterations: int = 10
    start: str = ""  # run, tokenizer or model to go on from: k-means then continues from its dictionary
    grid_size: int = 8  # clips on the sample strip, originals above reconstructions

    def __post_init__(self) -> None:
        if self.frames not in FRAMES:
            raise ValueError(f"options.frames must be one of {', '.join(map(str, FRAMES))}, got {self.frames}")
        for name in ("num_dictionary_clips", "num_kmeans_iterations", "grid_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"options.{name} must be >= 1, got {getattr(self, name)}")


class ClipTask(Task):
    """Base of the tasks on clips."""

    data_kind = "clip"

    def data_options(self) -> dict[str, Any]:
        """The length of clips."""
        return {"frames": self.options.frames}


class VideoTask(ClipTask):
    """Train a ``VideoFSQTokenizer``."""

    Options = VideoOptions

    def build(self, initialize: bool) -> VideoFSQTokenizer:
        """Make the tokenizer; the patches of a dictionary are found over training clips."""
        model: VideoFSQTokenizer = model_from(VideoFSQTokenizer, self.recipe.model)
        if initialize and self.options.start:
            start_from_weights(model, self.options.start, "tokenizer")
        if initialize and self.recipe.model.get("dictionary"):
            o = self.options
            parts = np.array_split(np.arange(o.num_dictionary_clips), -(-o.num_dictionary_clips // 50))
            clips = (self.train_data.examples(part)["clip"] for part in parts)
            rows = [rearrange(model.features(part), "b c t h w -> (b t h w) c") for part in clips]
            patches = ((torch.cat(rows) + 1) * 127.5).round().to(torch.uint8)
            generator = torch.Generator().manual_seed(self.recipe.seed)
            known = model.patch_table if o.start else None
            found = find_patches(patches, model.codebook_size, generator, o.num_kmeans_iterations, start=known)  # type: ignore[arg-type]
            model.patch_table.copy_(found)  # type: ignore[operator]
            if o.start:
                return model
            for value in model.decoder_layers[-1].parameters():
                nn.init.zeros_(value)  # the patches themselves are where training starts
        return model

    def compile(self, model: nn.Module) -> None:
        """Compile nothing: the convolutions fill the time and are the same compiled."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted L1 and squared error."""
        clips = batch["clip"]
        videos = model(clips).videos
        l1, mse = F.l1_loss(videos, clips), F.mse_loss(videos, clips)
        return self.options.l1_weight * l1 + self.options.mse_weight * mse, {"l1": l1.detach(), "mse": mse.detach()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """PSNR in dB over all pixels, over first frames and over later ones (8-bit clips, one mean over the set)."""
        total = torch.zeros(2, 2, dtype=torch.float64)
        for batch in self.test_batches(16):
            clips = batch["clip"]
            error = ((to_uint8(model(clips).videos) - to_uint8(clips)) / 255).square()
            for row, part in enumerate((error[:, :, :1], error[:, :, 1:])):
                total[row] += torch.tensor([part.sum().item(), part.numel()], dtype=torch.float64)
        sums = {"psnr": total.sum(0), "psnr_first": total[0], "psnr_later": total[1]}
        return {name: to_psnr(error / count) for name, (error, count) in sums.items() if count}

    @torch.no_grad()
    def sample_grid(self, model: nn.Module) -> Tensor:
        """Test clips as strips, each above its reconstruction."""
        clips = self.test_batch(0, self.options.grid_size)["clip"]
        return to_strips(rearrange([clips, model(clips).videos], "pair n c t h w -> (n pair) c t h w"))


def to_strips(clips: Tensor, scale: int = 2) -> Tensor:
    """One row a clip, ``[n, 3, T, H, W]`` in [-1, 1], the first frame and every second one after it: ``[3, H', W']`` uint8."""
    shown = clips[:, :, [0, *range(1, clips.shape[2], 2)]]
    return to_grid(rearrange(shown, "n c t h w -> (n t) c h w"), shown.shape[2], scale)


@torch.no_grad()
def find_patches(
    patches: Tensor, num_codes: int, generator: torch.Generator, num_iterations: int, start: Tensor | None = None
) -> Tensor:
    """Cluster patches of pixel art: ``[n, C]`` uint8 to ``[V, C]`` uint8, in an order that puts like by like.

    k-means over distinct patches; centroids that few patches need move onto the patches that are served worst. With
    ``start``, a table ``[V, C]`` uint8, k-means goes on from there: rows keep their place, and only those that no patch
    needs move.
    """
    hashes = patches.long() @ torch.randint(1, 2**31, (patches.shape[1],), generator=generator)
    _, inverse, counts = hashes.unique(return_inverse=True, return_counts=True)
    first = torch.empty(len(counts), dtype=torch.long).scatter_(0, inverse, torch.arange(len(hashes)))
    vectors, weights = patches[first].float() / 127.5 - 1, counts.float()
    if start is not None:
        return _continue(vectors, weights, start.float() / 127.5 - 1, num_iterations)
    if len(vectors) <= num_codes:
        chosen = torch.arange(num_codes) % len(vectors)
    else:
        chosen = torch.multinomial(weights.clamp(max=_MANY) ** 0.75, num_codes, generator=generator)
    centroids = vectors[chosen]
    for iteration in range(num_iterations if len(vectors) > num_codes else 0):
        index, distance = assign(vectors, centroids)
        centroids = update(vectors, weights, index, distance, num_codes)
        if iteration < num_iterations - 3:
            used = torch.zeros(num_codes).index_add_(0, index, weights)
            moved = used.argsort()[: num_codes // 20]
            centroids[moved] = vectors[(distance * weights).topk(len(moved)).indices]
    return _to_bytes(centroids[_tree_order(centroids)])


def _continue(vectors: Tensor, weights: Tensor, centroids: Tensor, num_iterations: int) -> Tensor:
    for _ in range(num_iterations):
        centroids = update(vectors, weights, *assign(vectors, centroids), len(centroids))
    return _to_bytes(centroids)


def _to_bytes(vectors: Tensor) -> Tensor:
    return ((vectors + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _tree_order(vectors: Tensor) -> Tensor:
    """Order rows by halving along the direction in which they differ most, again and again."""
    if len(vectors) < 3:
        return torch.arange(len(vectors))
    centred = vectors - vectors.mean(0)
    direction = centred[centred.square().sum(1).argmax()]
    for _ in range(4):
        direction = F.normalize(centred.T @ (centred @ direction), dim=0)
    order = (centred @ direction).argsort()
    halves = order.split(-(-len(order) // 2))
    return torch.cat([half[_tree_order(vectors[half])] for half in halves])
