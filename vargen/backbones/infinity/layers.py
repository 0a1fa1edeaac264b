"""Parts of Infinity's transformer (Han et al., 2024, arXiv:2412.04431) under the names of its checkpoints.

Letters: R rows, w items, T text positions, C text width, D width, H heads, c head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vargen.backbones.decoding.text_scales import TextPair, check_words
from vargen.backbones.layers.cache.kv_cache import Attend, attention
from vargen.backbones.layers.transformer import DropPath, RMSNorm
from vargen.backbones.var.layers import VARAttention, VARFeedForward
from vargen.hooks import execution_device, runs_as_forward


class _KeysAndValues(nn.Module):
    """Fused projection of the text with a bias on values only."""

    def __init__(self, text_dim: int, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mat_kv = nn.Linear(text_dim, 2 * dim, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    @runs_as_forward
    def keys_and_values(self, text: Tensor) -> TextPair:
        """Text ``[R, T, C]`` to keys and values ``[R, H, T, c]``."""
        key, value = self.mat_kv(text).chunk(2, dim=-1)
        key, value = (rearrange(part, "r t (h c) -> r h t c", h=self.num_heads) for part in (key, value + self.v_bias))
        return key, value


class CrossAttention(_KeysAndValues):
    """From items to the text, without positions; keys and values of the text are made once a decode."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, dim, num_heads)
        self.mat_q = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: TextPair, mask: Tensor | None) -> Tensor:
        """Read from keys and values ``[R, H, T, c]`` for ``x [R, w, D]``; ``mask [R, 1, 1, T]``, True = a word."""
        query = rearrange(self.mat_q(x), "r w (h c) -> r h w c", h=self.num_heads)
        return self.proj(rearrange(attention(query, *text, mask), "r h w c -> r w (h c)"))


class AttentivePool(_KeysAndValues):
    """The text as one vector: what one learned query reads."""

    def __init__(self, text_dim: int, dim: int, num_heads: int) -> None:
        super().__init__(text_dim, dim, num_heads)
        self.mat_q = nn.Parameter(torch.randn(1, num_heads, dim // num_heads) / dim**0.5)

    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """``[R, T, C]`` to ``[R, D]``."""
        query = self.mat_q[:, :, None].expand(len(text), -1, -1, -1)  # R H 1 c
        return self.proj(attention(query, *self.keys_and_values(text), mask).flatten(1))


class TextCondition(nn.Module):
    """Captions: checked, replaced by the learned null caption, pooled and projected.

    A caption is (features ``[B, T, C]``, mask ``[B, T]``), padded on either side and as long as the longest of its batch. The
    null caption of n words is the first n rows of a learned table.
    """

    def __init__(self, text_dim: int, text_length: int, dim: int, num_heads: int) -> None:
        super().__init__()
        self.text_dim, self.text_length = text_dim, text_length
        self.cfg_uncond = nn.Parameter(torch.randn(text_length, text_dim) / text_dim**0.5)
        self.text_norm = RMSNorm(text_dim, eps=1e-6)
        self.text_proj_for_sos = nn.ModuleDict({"ca": AttentivePool(text_dim, dim, num_heads)})
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )

    def check(self, condition: Any, values: bool = True) -> TextPair:
        """Return features and mask on the module's device, or say what is wrong with them.

        ``values=False`` does not look for captions without words: it stops a GPU.
        """
        if not isinstance(condition, tuple | list) or len(condition) != 2:
            raise ValueError(f"a caption condition must be (features, mask), got {type(condition).__name__}")
        width, device = self.text_dim, execution_device(self)
        features, mask = condition
        features, mask = check_words(features, mask, width, self.text_length, device, values)
        return features.to(self.cfg_uncond.dtype), mask

    @runs_as_forward
    def null(self, condition: TextPair) -> TextPair:
        """The null captions of the same lengths."""
        features, mask = condition
        word = (mask.long().cumsum(1) - 1).clamp(min=0)
        return self.cfg_uncond[word].to(features.dtype), mask

    def drop(self, condition: TextPair, dropped: Tensor) -> TextPair:
        """Replace the captions of the samples ``dropped [B]`` by null ones."""
        features, mask = condition
        return torch.where(dropped[:, None, None], self.null(condition)[0], features), mask

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``[R, T, C]`` to the pooled vector ``[R, D]`` and what blocks attend to ``[R, T, D]``; padding is masked, not read."""
        text = self.text_norm(features)
        pooled = self.text_proj_for_sos["ca"](text, mask[:, None, None])
        return pooled, self.text_proj_for_ca(text)


class InfinityBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and the last between modulation and gate."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, eps: float, drop_path: float) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.sa = VARAttention(dim, num_heads, l2_norm=True)
        self.ca = CrossAttention(dim, num_heads)
        self.ca_norm = nn.LayerNorm(dim, eps=eps)
        self.ffn = VARFeedForward(dim, hidden_dim)
        self.drop_path = DropPath(drop_path)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, dim) / dim**0.5)

    @runs_as_forward
    def read_text(self, text: Tensor) -> TextPair:
        """Text ``[R, T, D]`` to the keys and values ``[R, H, T, c]`` that the items of a decode attend to."""
        return self.ca.keys_and_values(text)

    @runs_as_forward
    def modulate(self, shared: Tensor) -> Tensor:
        """``[R, 1, 6, D]`` to ``[6, R, 1, D]``: gates, scales and shifts, first of attention, then of the feed-forward."""
        return rearrange(self.ada_gss + shared, "r 1 n d -> n r 1 d")

    def forward(
        self, x: Tensor, rows: Tensor, attend: Attend, text: TextPair, mask: Tensor | None, rope: Tensor
    ) -> Tensor:
        """Map ``x [R, w, D]`` to ``[R, w, D]`` with the rows of ``modulate`` and rotations ``rope [w, 2, c]``."""
        gate1, gate2, scale1, scale2, shift1, shift2 = rows.to(x.dtype).unbind(0)
        y = torch.addcmul(shift1, F.layer_norm(x, (self.dim,), eps=self.eps), 1 + scale1)
        x = x + self.drop_path(self.sa(y, attend, rope) * gate1)
        x = x + self.ca(self.ca_norm(x), text, mask)
        y = torch.addcmul(shift2, F.layer_norm(x, (self.dim,), eps=self.eps), 1 + scale2)
        return x + self.drop_path(self.ffn(y) * gate2)
