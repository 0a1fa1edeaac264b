"""Blocks of xAR (Ren et al., 2025, arXiv:2502.20388) under the official names.

Letters: R rows, w tokens, k cells, M tokens of a cell, E width, d head width.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vargen.backbones.layers.cache.kv_cache import Attend
from vargen.backbones.layers.rope import rotate


class XARAttention(nn.Module):
    """Fused projection with bias, rotary rows and columns."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        """Attend from and to ``x [R, w, E]``; ``rope [w, 2, d]``."""
        query, key, value = rearrange(self.qkv(x), "r w (n h d) -> n r w h d", n=3, h=self.num_heads)
        query, key = rotate(query, rope), rotate(key, rope)
        y = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return cast(Tensor, self.proj(rearrange(y, "r h w d -> r w (h d)")))


class XARFeedForward(nn.Module):
    """Gated, with GELU where its name promises SiLU: so the official model was built."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x = nn.Linear(dim, hidden_dim), nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each item on its own."""
        return cast(Tensor, self.fc2(F.gelu(self.fc1_g(x)) * self.fc1_x(x)))


class XARBlock(nn.Module):
    """Attention and feed-forward, each between a modulated norm without weights and a gate; one modulation a cell."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = XARAttention(dim, num_heads)
        self.mlp = XARFeedForward(dim, int(dim * mlp_ratio * 2 / 3))
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        """``x [R, k M, E]`` of k cells under ``condition [R, k, E]``."""
        rows = self.ada_lin(condition).repeat_interleave(x.shape[1] // condition.shape[1], dim=1)
        gate1, gate2, scale1, scale2, shift1, shift2 = rows.chunk(6, dim=-1)
        x = x + gate1 * self.attn(torch.addcmul(shift1, _rms(x), 1 + scale1), rope, attend)
        return x + gate2 * self.mlp(torch.addcmul(shift2, _rms(x), 1 + scale2))


def _rms(x: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
