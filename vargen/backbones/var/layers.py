"""Blocks of VAR's transformer (Tian et al., 2024, arXiv:2404.02905) under the parameter names of its checkpoints.

Letters: R rows, w items, D width, H heads, d head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vargen.backbones.layers.cache.kv_cache import Attend
from vargen.backbones.layers.rope import rotate
from vargen.backbones.layers.transformer import DropPath
from vargen.hooks import runs_as_forward

MAX_LOG_SCALE = math.log(100)  # ceiling of the learned attention scale
PLAIN_SCALE = 0.25  # without normalised queries and keys the official model divides by 4 sqrt(head width)


class VARAttention(nn.Module):
    """Fused projection with biases on queries and values only; unit queries and keys with a learned scale a head."""

    zero_k_bias: Tensor

    def __init__(self, dim: int, num_heads: int, l2_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.l2_norm = num_heads, l2_norm
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4)))
        self.mat_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("zero_k_bias", torch.zeros(dim), persistent=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attend: Attend, rope: Tensor | None = None) -> Tensor:
        """Attend from and to ``x [R, w, D]``; ``rope`` as in ``layers.rope.rotate``, None = no rotation."""
        bias = torch.cat([self.q_bias, self.zero_k_bias.to(self.q_bias), self.v_bias])
        qkv = self.mat_qkv(x) + bias
        query, key, value = rearrange(qkv, "r w (n h d) -> n r h w d", n=3, h=self.num_heads)
        root = query.shape[-1] ** 0.5  # the attention function divides by it
        if self.l2_norm:  # float32: half precision overflows in the norm
            scale = self.scale_mul_1H11.float().clamp(max=MAX_LOG_SCALE).exp() * root
            query = (F.normalize(query.float(), dim=-1) * scale).to(x.dtype)
            key = F.normalize(key.float(), dim=-1).to(x.dtype)
        else:
            query = query * PLAIN_SCALE
        if rope is not None:
            query, key = (rotate(part.transpose(1, 2), rope).transpose(1, 2) for part in (query, key))
        return self.proj(rearrange(attend(query, key, value), "r h w d -> r w (h d)"))


class VARFeedForward(nn.Module):
    """Two linear layers, GELU (tanh form) between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each item of ``x [R, w, D]`` on its own."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulation(dim: int, num_rows: int) -> nn.Sequential:
    """SiLU and a linear layer from the condition to ``num_rows`` vectors (adaptive normalisation, arXiv:2212.09748)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, num_rows * dim))


class VARBlock(nn.Module):
    """Attention and feed-forward, each between a modulated norm in front and a gate behind."""

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, eps: float, shared_aln: bool, l2_norm: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.attn = VARAttention(dim, num_heads, l2_norm)
        self.ffn = VARFeedForward(dim, hidden_dim)
        self.drop_path = DropPath(drop_path)
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, dim) / dim**0.5)
        else:
            self.ada_lin = modulation(dim, 6)

    @runs_as_forward
    def modulate(self, condition: Tensor, shared: Tensor | None) -> Tensor:
        """``[R, D]`` to ``[6, R, 1, D]``: gates, scales and shifts, first of attention, then of the feed-forward."""
        if shared is None:
            return rearrange(self.ada_lin(condition), "r (n d) -> n r 1 d", n=6)
        return rearrange(self.ada_gss + shared, "r 1 n d -> n r 1 d")

    def forward(self, x: Tensor, rows: Tensor, attend: Attend) -> Tensor:
        """Map ``x [R, w, D]`` to ``[R, w, D]`` with the rows of ``modulate``."""
        gate1, gate2, scale1, scale2, shift1, shift2 = rows.to(x.dtype).unbind(0)
        y = torch.addcmul(shift1, F.layer_norm(x, (self.dim,), eps=self.eps), 1 + scale1)
        x = x + self.drop_path(self.attn(y, attend) * gate1)
        y = torch.addcmul(shift2, F.layer_norm(x, (self.dim,), eps=self.eps), 1 + scale2)
        return x + self.drop_path(self.ffn(y) * gate2)


class HeadNorm(nn.Module):
    """Modulated norm in front of the head."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.ada_lin = modulation(dim, 2)

    def modulate(self, condition: Tensor) -> Tensor:
        """``[R, D]`` to ``[2, R, 1, D]``: scale and shift."""
        return rearrange(self.ada_lin(condition), "r (n d) -> n r 1 d", n=2)

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """Normalise in float32."""
        scale, shift = rows.float().unbind(0)
        return torch.addcmul(shift, F.layer_norm(x.float(), (self.dim,), eps=self.eps), 1 + scale)
