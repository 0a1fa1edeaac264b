"""Parts of Switti's transformer (Voronov et al., 2024, arXiv:2412.01819) under the names of its checkpoints.

Letters: R rows, w items, T text positions, C text width, P width of the pooled text, D width, H heads, c head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vargen.backbones.decoding.text_scales import TextPair, check_words
from vargen.backbones.layers.cache.kv_cache import Attend, attention
from vargen.backbones.layers.rope import rotate
from vargen.backbones.layers.transformer import DropPath, RMSNorm
from vargen.backbones.var.layers import VARFeedForward, modulation
from vargen.hooks import compute_dtype, execution_device, runs_as_forward

TextInput = tuple[Tensor, Tensor, Tensor]  # features [B, T, C], pooled [B, P], mask [B, T]
EPS = 1e-6
CROP = (512.0, 512.0, 0.0, 0.0)  # height, width, top and left of every picture that is generated, whatever its size


def _unit(x: Tensor) -> Tensor:
    """Layer norm over all heads together, in float32, without gain."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype)


class SwittiAttention(nn.Module):
    """Self-attention; queries and keys are normalised over the whole width before they are split into heads."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, attend: Attend, rope: Tensor | None) -> Tensor:
        """Attend from and to ``x [R, w, D]``; ``rope`` as in ``layers.rope.rotate``, None = no rotation."""
        query, key, value = self.to_qkv(x).chunk(3, dim=-1)
        parts = (
            rearrange(part, "r w (h c) -> r w h c", h=self.num_heads) for part in (_unit(query), _unit(key), value)
        )
        query, key, value = parts
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        return self.proj(rearrange(attend(query, key, value), "r h w c -> r w (h c)"))


class SwittiCrossAttention(nn.Module):
    """From items to the text, without positions; keys and values of the text are made once a decode."""

    def __init__(self, dim: int, text_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_kv, self.proj = nn.Linear(dim, dim), nn.Linear(text_dim, 2 * dim), nn.Linear(dim, dim)

    @runs_as_forward
    def keys_and_values(self, text: Tensor) -> TextPair:
        """Text ``[R, T, C]`` to keys and values ``[R, H, T, c]``."""
        key, value = self.to_kv(text).chunk(2, dim=-1)
        key, value = (rearrange(part, "r t (h c) -> r h t c", h=self.num_heads) for part in (_unit(key), value))
        return key, value

    def forward(self, x: Tensor, text: TextPair, mask: Tensor | None) -> Tensor:
        """Read from keys and values ``[R, H, T, c]`` for ``x [R, w, D]``; ``mask [R, 1, 1, T]``, True = a word."""
        query = rearrange(_unit(self.to_q(x)), "r w (h c) -> r h w c", h=self.num_heads)
        return self.proj(rearrange(attention(query, *text, mask), "r h w c -> r w (h c)"))


class SwiGLU(nn.Module):
    """Gated feed-forward without biases."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each item of ``x [R, w, D]`` on its own."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class CropEmbedding(nn.Module):
    """Fourier features of four numbers of a crop: in float32 whatever the model's dtype.

    The angles go up to thousands: in bfloat16, as the released pipeline has them, they are wrong by radians.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim // 8))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow devices, keep the numbers."""
        kept = self.weight.detach()
        super()._apply(fn, recurse)
        if self.weight.dtype != kept.dtype:
            self.weight.data = kept.to(self.weight.device)
        return self

    def forward(self, crop: Tensor) -> Tensor:
        """``[R, 4]`` numbers to ``[R, D]`` float32."""
        angles = crop.float()[..., None] * self.weight.float() * (2 * math.pi)
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


class SwittiText(nn.Module):
    """Captions: checked, and pooled to a vector. There is no learned null caption: the empty text is encoded as any other.

    A caption is (features ``[B, T, C]``, pooled ``[B, P]``, mask ``[B, T]``) as ``CLIPCaptionConditioner`` returns it.
    """

    def __init__(self, pooled_dim: int, text_dim: int, text_length: int, dim: int) -> None:
        super().__init__()
        self.pooled_dim, self.text_dim, self.text_length = pooled_dim, text_dim, text_length
        self.text_pooler = nn.Linear(pooled_dim, dim)

    def check(self, condition: Any, values: bool = True) -> TextInput:
        """Return features, pooled features and mask on the module's device, or say what is wrong with them."""
        if not isinstance(condition, tuple | list) or len(condition) != 3:
            raise ValueError(f"a caption condition must be (features, pooled, mask), got {type(condition).__name__}")
        device, dtype = execution_device(self), compute_dtype(self.text_pooler)
        features, pooled, mask = condition
        features, mask = check_words(features, mask, self.text_dim, self.text_length, device, values)
        pooled = torch.as_tensor(pooled, device=device)
        if pooled.shape != (len(mask), self.pooled_dim):
            allowed = [len(mask), self.pooled_dim]
            raise ValueError(f"pooled caption features must have shape {allowed}, got {list(pooled.shape)}")
        return features.to(dtype), pooled.to(dtype), mask

    def null(self, condition: TextInput) -> TextInput:
        """Refuse: the model has none."""
        raise ValueError(
            "this model has no empty caption of its own: give negative=..., the encoded empty text, or guidance_scale=1"
        )

    def drop(self, condition: TextInput, dropped: Tensor) -> TextInput:
        """Refuse, as ``null`` does: who trains puts the encoded empty text in place of captions."""
        return self.null(condition)

    def forward(self, features: Tensor, pooled: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled vector ``[R, D]`` and what blocks attend to, ``[R, T, C]``."""
        return self.text_pooler(pooled), features


class SwittiBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each between two norms; the first and the last are modulated."""

    def __init__(
        self, dim: int, text_dim: int, num_heads: int, hidden_dim: int, swiglu: bool, crop: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.attn = SwittiAttention(dim, num_heads)
        self.cross_attn = SwittiCrossAttention(dim, text_dim, num_heads)
        self.ffn: nn.Module = (SwiGLU if swiglu else VARFeedForward)(dim, hidden_dim)
        self.attention_y_norm = RMSNorm(text_dim, EPS)
        self.self_attention_norm1, self.self_attention_norm2 = RMSNorm(dim, EPS), RMSNorm(dim, EPS)
        self.cross_attention_norm1, self.cross_attention_norm2 = RMSNorm(dim, EPS), RMSNorm(dim, EPS)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(dim, EPS), RMSNorm(dim, EPS)
        self.ada_lin = modulation(dim, 6)
        if crop:
            self.crop_cond_scales = nn.Parameter(torch.zeros(1, dim))
        self.drop_path = DropPath(drop_path)

    @runs_as_forward
    def read_text(self, text: Tensor) -> TextPair:
        """Text ``[R, T, C]`` to the keys and values ``[R, H, T, c]`` that the items of a decode attend to."""
        return self.cross_attn.keys_and_values(self.attention_y_norm(text))

    @runs_as_forward
    def modulate(self, pooled: Tensor, crop: Tensor | None) -> Tensor:
        """``[R, D]`` to ``[6, R, 1, D]``: gates, scales and shifts, first of attention, then of the feed-forward."""
        vector = pooled if crop is None else pooled + self.crop_cond_scales * crop
        return rearrange(self.ada_lin(vector), "r (n d) -> n r 1 d", n=6)

    def forward(
        self, x: Tensor, rows: Tensor, attend: Attend, text: TextPair, mask: Tensor | None, rope: Tensor | None
    ) -> Tensor:
        """Map ``x [R, w, D]`` to ``[R, w, D]`` with the rows of ``modulate`` and rotations ``rope [w, 2, c]``."""
        gate1, gate2, scale1, scale2, shift1, shift2 = rows.to(x.dtype).unbind(0)
        y = torch.addcmul(shift1, self.self_attention_norm1(x), 1 + scale1)
        x = x + self.drop_path(self.self_attention_norm2(self.attn(y, attend, rope)) * gate1)
        x = x + self.cross_attention_norm2(self.cross_attn(self.cross_attention_norm1(x), text, mask))
        y = torch.addcmul(shift2, self.ffn_norm1(x), 1 + scale2)
        return x + self.drop_path(self.ffn_norm2(self.ffn(y)) * gate2)
