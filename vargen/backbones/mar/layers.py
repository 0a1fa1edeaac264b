"""Blocks of MAR (Li et al., 2024, arXiv:2406.11838): a masked autoencoder's two transformers.

Letters: R rows, w items, E width of the encoder, Z width of the decoder, N tokens, D numbers of a token, p patch side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vargen.backbones.layers.cache.kv_cache import Attend


class ViTAttention(nn.Module):
    """Fused projection with bias."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Attend from and to ``x [R, w, E]``."""
        query, key, value = rearrange(self.qkv(x), "r w (n h d) -> n r h w d", n=3, h=self.num_heads)
        return self.proj_drop(self.proj(rearrange(attend(query, key, value), "r h w d -> r w (h d)")))


class ViTFeedForward(nn.Module):
    """Two linear layers, GELU between."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each item on its own."""
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class ViTBlock(nn.Module):
    """Attention and feed-forward, a layer norm in front of each."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = ViTAttention(dim, num_heads, dropout)
        self.mlp = ViTFeedForward(dim, int(dim * mlp_ratio), dropout)

    def forward(self, x: Tensor, rope: Tensor | None, attend: Attend) -> Tensor:
        """Map ``x [R, w, E]`` to ``[R, w, E]``; positions are in the input, ``rope`` is not used."""
        x = x + self.attn(self.norm1(x), attend)
        return x + self.mlp(self.norm2(x))


def draw_mask_ratio(low: float, std: float = 0.25, generator: torch.Generator | None = None) -> float:
    """Share of tokens to mask in a step: normal around 1, cut to [low, 1]."""
    normal = torch.distributions.Normal(1.0, std)
    edges = normal.cdf(torch.tensor([low, 1.0], dtype=torch.float64))
    u = torch.rand((), generator=generator, dtype=torch.float64)
    return float(normal.icdf(edges[0] + u * (edges[1] - edges[0])).clamp(low, 1.0))
