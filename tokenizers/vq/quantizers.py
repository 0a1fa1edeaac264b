"""Vector quantization of VQ-VAE and VQGAN (arXiv:1711.00937, arXiv:2012.09841) as LlamaGen trains it.

Scalar quantizers (FSQ) and residual ones live beside the tokenizers that use them.

Letters: n vectors, V codes, C channels of a code, b images, h w positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vargen.hooks import execution_device
from vargen.kernels.nearest import nearest_code
from vargen.outputs import pytree
from vargen.tokenizers.vq.kmeans import kmeans

USAGE_WINDOW = 65536  # codes over which usage is measured, the length of LlamaGen's queue


@pytree
@dataclass
class QuantizerOutput:
    """Result of ``VectorQuantizer.forward``; the loss parts are ``None`` in evaluation mode."""

    latents: Tensor  # [b, C, h, w] code vectors; carries the straight-through gradient in training mode
    codes: Tensor  # [b, h, w] int64
    vq_loss: Tensor | None = None  # [] moves codes towards encoder outputs
    commit_loss: Tensor | None = None  # [] moves encoder outputs towards codes, beta applied
    entropy_loss: Tensor | None = None  # [] confident rows, even use of codes; ratio applied


def entropy_loss(distances: Tensor, temperature: float = 0.01) -> Tensor:
    """Mean entropy of each row's soft assignment minus the entropy of their average.

    Args:
        distances: ``[n, V]`` squared distances to the codes.
        temperature: softness of the assignment, > 0.

    Returns:
        Scalar; smaller means confident rows and evenly used codes.
    """
    affinity = -distances / temperature
    probs = affinity.softmax(-1)
    mean_probs = probs.mean(0)
    mean_entropy = -(mean_probs * (mean_probs + 1e-5).log()).sum()
    row_entropy = -(probs * (affinity + 1e-5).log_softmax(-1)).sum(-1).mean()
    return row_entropy - mean_entropy


class VectorQuantizer(nn.Module):
    """Replace every vector by its nearest code.

    With ``l2_norm`` both sides are scaled to unit length at every call, in encoding and in decoding; stored rows are
    not unit vectors. Arithmetic is float32 whatever the dtype of the model.

    Args:
        codebook_size: V.
        codebook_dim: C.
        l2_norm: compare directions instead of points.
        commit_loss_beta: weight of the commitment term.
        entropy_loss_ratio: weight of the entropy term; 0 leaves it out.
        entropy_temperature: softness of the assignment in the entropy term.
        legacy_beta: put beta on the codebook term instead, as taming's released models do.
    """

    recent_codes: Tensor
    code_counts: Tensor

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        l2_norm: bool = True,
        commit_loss_beta: float = 0.25,
        entropy_loss_ratio: float = 0.0,
        entropy_temperature: float = 0.01,
        legacy_beta: bool = False,
    ) -> None:
        super().__init__()
        self.l2_norm = l2_norm
        self.commit_loss_beta = commit_loss_beta
        self.entropy_loss_ratio = entropy_loss_ratio
        self.entropy_temperature = entropy_temperature
        self.legacy_beta = legacy_beta
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        with torch.no_grad():
            self.embedding.weight.uniform_(-1 / codebook_size, 1 / codebook_size)
            if l2_norm:
                self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))
        self.reset_statistics()

    def reset_statistics(self) -> None:
        """Forget the statistics of training, never saved: the last codes (-1 = none yet), how often each code was taken."""
        counts = torch.zeros(self.embedding.num_embeddings, dtype=torch.int64)
        self.register_buffer("recent_codes", torch.full((USAGE_WINDOW,), -1), persistent=False)
        self.register_buffer("code_counts", counts, persistent=False)

    @property
    def codebook(self) -> Tensor:
        """``[V, C]`` code vectors as used: unit length with ``l2_norm``."""
        return self.lookup(torch.arange(self.embedding.num_embeddings, device=execution_device(self.embedding)))

    @property
    def usage(self) -> float:
        """Share of the codebook that the last 65,536 training codes touched, in [0, 1]."""
        return float((self.recent_codes.unique() >= 0).sum()) / self.embedding.num_embeddings

    def lookup(self, codes: Tensor) -> Tensor:
        """Map codes ``[...]`` to vectors ``[..., C]``."""
        rows = self.embedding(codes)
        return F.normalize(rows.float(), dim=-1).to(rows.dtype) if self.l2_norm else rows

    def nearest(self, vectors: Tensor) -> Tensor:
        """Map vectors ``[n, C]`` to codes ``[n]`` int64; the first code on ties."""
        index = torch.arange(self.embedding.num_embeddings, device=vectors.device)
        return nearest_code(vectors.detach(), self.embedding(index).detach(), self.l2_norm)

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize ``[b, C, h, w]``; in training mode also measure the losses and record the use of codes."""
        b, _, h, w = z.shape
        flat = rearrange(z, "b c h w -> (b h w) c")
        codes = self.nearest(flat)
        if self.training:
            x = F.normalize(flat.float(), dim=-1) if self.l2_norm else flat.float()
            quantized = self.lookup(codes).float()
            losses: tuple[Tensor | None, Tensor | None, Tensor | None] = self._losses(x, quantized)
            self._record(codes)
            rows = (x + (quantized - x).detach()).to(z.dtype)  # straight-through
        else:
            losses = (None, None, None)
            rows = self.lookup(codes).to(z.dtype)
        latents = rearrange(rows, "(b h w) c -> b c h w", b=b, h=h).contiguous()
        return QuantizerOutput(latents, codes.view(b, h, w), *losses)

    def _losses(self, x: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vq = F.mse_loss(quantized, x.detach())
        commit = F.mse_loss(x, quantized.detach())
        if self.legacy_beta:
            vq = self.commit_loss_beta * vq
        else:
            commit = self.commit_loss_beta * commit
        if self.entropy_loss_ratio == 0:
            return vq, commit, x.new_zeros(())
        codebook = self.codebook.float()
        distances = x.square().sum(-1, keepdim=True) + codebook.square().sum(-1) - 2 * x @ codebook.T
        return vq, commit, self.entropy_loss_ratio * entropy_loss(distances, self.entropy_temperature)

    @torch.no_grad()
    def _record(self, codes: Tensor) -> None:
        recent = codes[-USAGE_WINDOW:]
        self.recent_codes.copy_(torch.cat([self.recent_codes[recent.numel() :], recent]))
        self.code_counts.scatter_add_(0, codes, torch.ones_like(codes))

    @torch.no_grad()
    def kmeans_(self, vectors: Tensor, generator: torch.Generator | None = None, num_iterations: int = 12) -> float:
        """Set the codebook to the k-means centroids of encoder outputs.

        Args:
            vectors: ``[n, C]`` float; ``[b, C, h, w]`` feature maps must be flattened first.
            generator: source of the seeding, a CPU generator; the result is a function of it and the vectors.
            num_iterations: Lloyd iterations.

        Returns:
            Mean squared distance of a vector to its code.
        """
        weight = self.embedding.weight
        centroids, error = kmeans(
            vectors, weight.shape[0], l2_norm=self.l2_norm, generator=generator, num_iterations=num_iterations
        )
        weight.copy_(centroids)
        self.code_counts.zero_()
        return error

    @torch.no_grad()
    def restart_dead_codes_(
        self, vectors: Tensor, generator: torch.Generator | None = None, min_count: int = 1
    ) -> int:
        """Move codes taken fewer than ``min_count`` times since the last call onto encoder outputs drawn at random.

        Args:
            vectors: ``[n, C]`` recent encoder outputs.
            generator: a CPU generator.
            min_count: smallest count with which a code survives.

        Returns:
            Number of codes moved.
        """
        dead = (self.code_counts < min_count).nonzero().flatten()
        if dead.numel():
            # without replacement while the vectors last, so that two dead codes do not become one
            order = torch.randperm(vectors.shape[0], generator=generator).to(vectors.device)
            picks = vectors[order[torch.arange(dead.numel(), device=vectors.device) % vectors.shape[0]]].float()
            rows = F.normalize(picks, dim=-1) if self.l2_norm else picks
            self.embedding.weight[dead] = rows.to(self.embedding.weight)
        self.code_counts.zero_()
        return int(dead.numel())
