"""The transformer under every discrete backbone: blocks that know nothing of caches or masks, and one forward of items.

Blocks have the signature ``block(x [R, w, D], rope, attend)``; ``attend(query, key, value)`` is plain attention in
training and the cache's own function in decoding. A new family reuses the blocks here or brings its own with the same
signature, and gets ``forward_items`` for any decoding order.

Letters: R rows, w items, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vargen.backbones.layers.cache.kv_cache import Attend, KVCache, Plan, attention
from vargen.backbones.layers.rope import rotate, spread
from vargen.hooks import HookedModel


class RMSNorm(nn.Module):
    """Root-mean-square normalisation; statistics in float32, scale applied after the cast back (LlamaGen's order)."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        if x.dtype == self.weight.dtype == torch.float32:  # the same numbers from one operator
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


class SelfAttention(nn.Module):
    """Fused query-key-value projection without bias, rotary positions, grouped key-value heads."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.wqkv = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Tensor | None, attend: Attend) -> Tensor:
        """Attend from and to ``x [R, w, D]``; ``rope`` as in ``rotate``."""
        turned = self.num_heads + self.num_kv_heads  # queries and keys stand side by side: one rotation for both
        qkv = self.wqkv(x).view(*x.shape[:2], -1, self.head_dim)
        qk, value = qkv[:, :, :turned], qkv[:, :, turned:]
        if rope is not None:
            qk = rotate(qk, rope)
        query, key = qk[:, :, : self.num_heads], qk[:, :, self.num_heads :]
        y = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        y = self.wo(y.transpose(1, 2).flatten(2))
        return self.resid_dropout(y) if self.training else y


def swiglu_dim(dim: int, multiple_of: int = 256, multiplier: float | None = None) -> int:
    """Hidden width of the feed-forward: two thirds of 4 D, rounded up to a multiple."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of


class FeedForward(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)``, no bias."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.ffn_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each item of ``x [R, w, D]`` on its own."""
        y = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return self.ffn_dropout(y) if self.training else y


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch of a whole sample, keep the expectation (arXiv:1603.09382).

    As timm's, which inference must not import.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Scale or zero each sample of ``x [R, ...]`` in training."""
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1.0 - self.rate)
        return x * keep / (1.0 - self.rate)


class TransformerBlock(nn.Module):
    """LlamaGen's block: pre-norm attention and SwiGLU with residual connections."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        ffn_dim: int,
        norm_eps: float = 1e-5,
        resid_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, num_heads, num_kv_heads, resid_dropout)
        self.feed_forward = FeedForward(dim, ffn_dim, ffn_dropout)
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.ffn_norm = RMSNorm(dim, norm_eps)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rope: Tensor | None, attend: Attend) -> Tensor:
        """Map ``x [R, w, D]`` to ``[R, w, D]``."""
        if not self.training:
            x = x + self.attention(self.attention_norm(x), rope, attend)
            return x + self.feed_forward(self.ffn_norm(x))
        x = x + self.drop_path(self.attention(self.attention_norm(x), rope, attend))
        return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))


class ItemTransformer(HookedModel):
    """Mixin of every discrete backbone: run its ``layers`` over items, with or without a cache.

    The module that mixes it in provides ``layers`` (blocks as above) and ``rope_table``, and calls ``make_tables`` once built.
    """

    layers: nn.ModuleList
    gradient_checkpointing: bool = False

    def rope_table(self, device: torch.device | None = None) -> Tensor | None:
        """[positions, d / 2, 2] float32, None without rotary positions; the last row is NULL.

        ``device`` is where it is wanted; None = the model's.
        """
        return None

    def make_tables(self, device: torch.device) -> None:
        """Make what follows from the settings alone (``DeviceTables``), so that no call has to."""
        self.rope_table(device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)  # type: ignore[misc]
        device = next(cast(nn.Module, self).parameters()).device
        if device.type != "meta":
            self.make_tables(device)
        return moved

    def forward_items(
        self,
        embeddings: Tensor,
        *,
        cache: KVCache,
        slots: Tensor | None = None,
        tau: Tensor | None = None,
        nu: Tensor | None = None,
        positions: Tensor | None = None,
        window_mask: Tensor | None = None,
        all_visible: bool = False,
        plan: Plan | None = None,
        taps: Sequence[int] | None = None,
    ) -> Tensor:
        """Run w items through the layers, reading and writing the cache.

        Args:
            embeddings: [R, w, D].
            cache: written in place.
            slots: [w] or [R, w] cache slots, see ``KVCache.plan``; tau, nu, window_mask, all_visible likewise.
            tau: stamps.
            nu: view times.
            positions: [w] or [R, w] rows of ``rope_table()``; -1 = NULL.
            window_mask: extra visibility among the items.
            all_visible: promise that no mask is needed.
            plan: a ready plan instead of slots, tau, nu and masks.
            taps: number of layers after which to read the hidden state, ascending; None = after the last.

        Returns:
            [R, w, D] hidden states before any final norm; [taps, R, w, D] with ``taps``.
        """
        if plan is None:
            assert slots is not None
            plan = cache.plan(slots, tau=tau, nu=nu, window_mask=window_mask, all_visible=all_visible)
        attends = [cache.layer(i, plan) for i in range(len(self.layers))]
        return self.run_layers(embeddings, self.rope_rows(positions), attends, taps)

    def forward_full(
        self,
        embeddings: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        taps: Sequence[int] | None = None,
    ) -> Tensor:
        """Run a whole sequence without a cache: training, and models that recompute everything.

        Args:
            embeddings: [R, L, D].
            positions: [L] or [R, L] rows of ``rope_table()``; -1 = NULL.
            mask: broadcastable to [R, H, L, L], True = attend; None = full attention, or causal with ``is_causal``.
            is_causal: lower-triangular attention; excludes ``mask``.
            taps: as in ``forward_items``.

        Returns:
            As ``forward_items``.
        """
        attend = partial(attention, mask=mask, is_causal=is_causal)
        return self.run_layers(embeddings, self.rope_rows(positions), [attend] * len(self.layers), taps)

    def rope_rows(self, positions: Tensor | None) -> Tensor | None:
        """Rotations of ``positions`` as ``rotate`` takes them, [..., 2, d]; None where there is neither."""
        table = None if positions is None else self.rope_table(positions.device)
        return None if table is None else spread(table[positions])

    def run_layers(
        self, x: Tensor, rope: Tensor | None, attends: Sequence[Attend], taps: Sequence[int] | None = None
    ) -> Tensor:
        """Run the blocks, each with its own attention function, and collect the tapped states."""
        states = []
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for i, (layer, attend) in enumerate(zip(self.layers, attends, strict=True)):
            if recompute:
                x = checkpoint(layer, x, rope, attend, use_reentrant=False)
            else:
                x = layer(x, rope, attend)
            if taps is not None and i + 1 in taps:
                states.append(x)
        return x if taps is None else torch.stack(states)
