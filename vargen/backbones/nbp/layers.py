"""Blocks and conditions of NBP (Ren et al., 2025, arXiv:2502.07737): minGPT's, under the official names.

Letters: B clips, T condition positions, w items, D width, V codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vargen.backbones.layers.cache.kv_cache import Attend
from vargen.backbones.layers.conditions import AttributeEmbedding, ClassEmbedding, check_range, read_ids
from vargen.backbones.layers.rope import rotate


class BiasedAttention(nn.Module):
    """Separate query, key and value maps with bias; rotary positions where the model has them."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.key, self.query, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)
        self.resid_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Tensor | None, attend: Attend) -> Tensor:
        """Attend from and to ``x [R, w, D]``; ``rope`` as in ``rotate``."""
        query, key, value = (
            part(x).view(*x.shape[:2], self.num_heads, self.head_dim) for part in (self.query, self.key, self.value)
        )
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        y = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return self.resid_drop(self.proj(y.transpose(1, 2).flatten(2)))


class NBPBlock(nn.Module):
    """Pre-norm attention and a GELU feed-forward, both with bias."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = BiasedAttention(dim, num_heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, rope: Tensor | None, attend: Attend) -> Tensor:
        """Map ``x [R, w, D]`` to ``[R, w, D]``."""
        x = x + self.attn(self.ln1(x), rope, attend)
        return x + self.mlp(self.ln2(x))


class NoCondition:
    """Nothing stands before the codes; the condition only says how many clips: a number, or anything with a length."""

    num_tokens = 0

    def __init__(self, model: Any) -> None:
        self.model = model  # not its tensors: copies and moves of the model must be seen here

    def check(self, condition: Any, values: bool = True) -> Tensor:
        """Return ``[B, 0]``."""
        batch = condition if isinstance(condition, int) else len(condition)
        return torch.empty(batch, 0, dtype=torch.int64, device=self.model.device)

    def mask(self, condition: Tensor) -> Tensor | None:
        """No padding."""
        return None

    def null(self, condition: Tensor) -> Tensor:
        """Refuse guidance."""
        raise ValueError("this model has no condition to guide by; use guidance_scale=1")

    def drop(self, condition: Tensor, dropped: Tensor) -> Tensor:
        """Nothing to drop."""
        return condition

    def __call__(self, condition: Tensor) -> Tensor:
        """``[B, 0, D]``."""
        return torch.empty(len(condition), 0, self.model.hidden_size, device=self.model.device)


class TextIds:
    """Text as token ids of the model's own vocabulary; padding is seen like any other word, as in the official code.

    The null text is the buffer ``uncond_embedding`` of the checkpoint, marked here by ids of -1. The released models were
    never trained with it.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.num_tokens = model, int(model.config.num_condition_tokens)

    def check(self, condition: Any, values: bool = True) -> Tensor:
        """Return text ids ``[B, num_tokens]`` int64, or say what is wrong with them."""
        ids = read_ids(condition, "text ids", 2, self.model.device)
        if ids.shape[1] != self.num_tokens:
            raise ValueError(f"text ids must have shape [batch, {self.num_tokens}], got {tuple(ids.shape)}")
        if values:
            size = int(self.model.config.text_vocabulary)
            check_range(ids, size, f"text id must be in 0..{size - 1}")
        return ids

    def mask(self, condition: Tensor) -> Tensor | None:
        """Padding is not hidden."""
        return None

    def null(self, condition: Tensor) -> Tensor:
        """No text."""
        return torch.full_like(condition, -1)

    def drop(self, condition: Tensor, dropped: Tensor) -> Tensor:
        """Replace the texts of the samples ``dropped [B]`` by null."""
        return torch.where(dropped[:, None], -1, condition)

    def __call__(self, condition: Tensor) -> Tensor:
        """``[B, num_tokens]`` ids to ``[B, num_tokens, D]``."""
        rows = self.model.tok_emb(condition.clamp(min=0) + self.model.group_size)  # special tokens stand before text
        return torch.where((condition < 0)[..., None], self.model.uncond_embedding, rows)


class Beginning:
    """A condition, then the learned position that begins the picture and guesses its first code."""

    def __init__(self, inner: TextIds | ClassEmbedding | AttributeEmbedding, model: Any) -> None:
        self.inner, self.model, self.num_tokens = inner, model, inner.num_tokens + 1

    def check(self, condition: Any, values: bool = True) -> Tensor:
        """As the condition's own."""
        return self.inner.check(condition, values)

    def mask(self, condition: Tensor) -> Tensor | None:
        """No padding."""
        return None

    def null(self, condition: Tensor) -> Tensor:
        """As the condition's own."""
        return self.inner.null(condition)

    def drop(self, condition: Tensor, dropped: Tensor) -> Tensor:
        """As the condition's own."""
        return self.inner.drop(condition, dropped)

    def draw_slots(self, batch: int, prob: float, generator: torch.Generator | None = None) -> Tensor:
        """As the condition's own."""
        return self.inner.draw_slots(batch, prob, generator)  # type: ignore[union-attr,operator]  # asked of attributes only

    def __call__(self, condition: Tensor) -> Tensor:
        """Condition to ``[B, T, D]``."""
        first = torch.zeros(1, dtype=torch.int64, device=condition.device)
        begin = self.model.special_rows(first).expand(len(condition), 1, -1)
        return torch.cat([self.inner(condition), begin], dim=1)


def training_layout(order: Tensor, size: int, offset: int, given: bool) -> tuple[Tensor, Tensor]:
    """Stamps and rotary rows of the input of a training forward.

    Args:
        order: [N] raster position of the k-th code.
        size: P.
        offset: T.
        given: the first block is given; otherwise it is drawn code by code and P - 1 middle tokens follow it.

    Returns:
        Stamps [L - 1] and rows [L - 1] of the model's ``rope_table``, -1 = none; [N - P] with ``given``.
    """
    blocks = torch.arange(len(order) // size - 1).repeat_interleave(size)
    if given:
        return blocks, offset + order[:-size]
    lead = torch.tensor([0] * (offset - 1) + [min(offset - 1, 1)])
    stamps = torch.cat([lead, lead[-1] + 1 + torch.cat([torch.arange(size - 1), blocks + size - 1])])
    middle = torch.full((size - 1,), -1)
    rows = torch.cat([torch.arange(offset), offset + order[:size], middle, offset + order[size : len(order) - size]])
    return stamps, rows[: len(stamps)]  # one block: its last code is never read, nothing follows
