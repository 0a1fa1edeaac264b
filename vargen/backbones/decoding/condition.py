"""What every decoding of codes shares: the condition in front of them, prepared for a decode or dropped in training.

Letters: B images, G guidance branches, R = G * B rows, T condition positions, N codes, L = T + N, D width, V codes of the
codebook.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vargen.backbones.layers.conditions import drop_condition
from vargen.backbones.layers.transformer import ItemTransformer
from vargen.hooks import runs_as_forward


@dataclass(frozen=True)
class PreparedCondition:
    """Embedded condition rows, conditional branch first."""

    embeddings: Tensor  # [R, T, D]
    mask: Tensor | None  # [R, T] bool, False = padding; None = no padding
    batch: int
    branches: int

    @property
    def lengths(self) -> Tensor:
        """[R] int64 cache slots of the condition, padding included."""
        rows, length = self.embeddings.shape[:2]
        return torch.full((rows,), length, device=self.embeddings.device)

    @property
    def padded(self) -> bool:
        """Whether some condition positions are padding, so that no forward can do without a mask."""
        return self.mask is not None and not bool(self.mask.all())


class ConditionedBackbone(ItemTransformer):
    """Mixin of code models whose condition stands before the codes.

    The module provides ``config``, ``cls_embedding`` (a condition embedding), ``tok_embeddings`` and ``grid_size``; where
    one head follows the last layer, also ``norm`` and ``output``.
    """

    config: Any
    cls_embedding: Any
    tok_embeddings: nn.Embedding
    norm: nn.Module
    output: nn.Linear
    grid_size: tuple[int, ...]
    training: bool

    @property
    def num_codes(self) -> int:
        """Codes of an image, N."""
        return math.prod(self.grid_size)

    @property
    def codebook_size(self) -> int:
        """Codes of the codebook, V."""
        return int(self.config.codebook_size)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states, D."""
        return int(self.config.dim)

    @property
    def num_condition_tokens(self) -> int:
        """Condition positions, T."""
        return int(self.cls_embedding.num_tokens)

    @runs_as_forward
    def embed(self, codes: Tensor) -> Tensor:
        """Input embeddings of codes: [...] int64 to [..., D]."""
        return self.tok_embeddings(codes)

    @runs_as_forward
    @torch.no_grad()
    def prepare(
        self, condition: Any, *, guidance_scale: float | Tensor = 1.0, negative: Any = None
    ) -> PreparedCondition:
        """Check and embed a batch of conditions.

        Args:
            condition: class ids [B], (features [B, T, C], mask [B, T]), or attribute ids [B, T], as the model takes.
            guidance_scale: 1 = one branch; anything else adds the unconditional branch.
            negative: a condition for the second branch instead of the null condition; needs guidance.
        """
        checked = self.cls_embedding.check(condition)
        parts = [checked]
        guided = bool((torch.as_tensor(guidance_scale) != 1).any())
        if negative is not None and not guided:
            raise ValueError("a negative condition has no effect without guidance; set guidance_scale above 1")
        if guided:
            parts.append(self.cls_embedding.null(checked) if negative is None else self.cls_embedding.check(negative))
        rows = [self.cls_embedding(part) for part in parts]
        if len(rows[0]) != len(rows[-1]):
            raise ValueError("the negative condition must have as many rows as the condition")
        masks = [self.cls_embedding.mask(part) for part in parts]
        mask = None if masks[0] is None else torch.cat([m for m in masks if m is not None])
        return PreparedCondition(torch.cat(rows), mask, len(rows[0]), len(parts))

    def training_condition(
        self, codes: Tensor, condition: Any, drop: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """Check what a training forward is given, drop conditions and embed them.

        Args:
            codes: must be all codes, [B, N].
            condition: as in ``prepare``.
            drop: as in ``drop_condition``.
            generator: likewise.

        Returns:
            Rows [B, T, D], and [B, T] bool where a condition is no padding (None = everywhere).
        """
        if codes.ndim != 2 or codes.shape[1] != self.num_codes:
            raise ValueError(f"codes must be [batch, {self.num_codes}], got {tuple(codes.shape)}")
        return self.embed_condition(condition, drop, generator)

    def embed_condition(
        self, condition: Any, drop: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """As ``training_condition``, for any number of codes."""
        embedding = self.cls_embedding
        checked = embedding.check(condition, values=False)
        checked = drop_condition(embedding, checked, self.config, drop, generator, training=self.training)
        return embedding(checked), embedding.mask(checked)


def padding_mask(present: Tensor | None, length: int, order: Tensor | None = None) -> Tensor | None:
    """Padded condition columns hidden from everyone but themselves.

    Args:
        present: [R, T] bool, False = padding; None = no padding.
        length: L.
        order: [L, L] bool, what rows may see; None = everything.

    Returns:
        [R, 1, L, L]; ``order`` itself without padding.
    """
    if present is None:
        return order
    columns = torch.cat([present, present.new_ones(len(present), length - present.shape[1])], dim=1)
    own = torch.eye(length, dtype=torch.bool, device=present.device)
    visible = columns[:, None] if order is None else order & columns[:, None]
    return (visible | own)[:, None]
