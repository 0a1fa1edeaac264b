"""Embeddings of conditions: class labels, caption features, attribute slots.

Each turns a batch of conditions into T embeddings that stand before the codes, and knows its null condition (classifier-
free guidance, arXiv:2207.12598). Key layout of the first two is LlamaGen's (arXiv:2406.06525).

Letters: B images, T condition positions, C caption feature width, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.hooks import compute_dtype, execution_device, runs_as_forward


class ClassEmbedding(nn.Module):
    """One embedding for a label; the null label is row ``num_classes``, present when it is trained."""

    def __init__(self, num_classes: int, dim: int, dropout_prob: float = 0.1) -> None:
        super().__init__()
        self.num_classes, self.num_tokens = num_classes, 1
        self.has_null = dropout_prob > 0
        self.embedding_table = nn.Embedding(num_classes + int(self.has_null), dim)

    def check(self, condition: Any, values: bool = True) -> Tensor:
        """Return the labels ``[B]`` int64 on the module's device, or say what is wrong with them.

        The null label passes. ``values=False`` leaves the range unchecked: looking at it stops a GPU.
        """
        return check_labels(condition, self.num_classes, self.has_null, execution_device(self), values)

    def mask(self, condition: Tensor) -> Tensor | None:
        """Positions that hold something, ``[B, T]`` bool; None = all."""
        return None

    def null(self, condition: Tensor) -> Tensor:
        """The null condition of the same batch."""
        if not self.has_null:
            raise ValueError(
                "this model was built with class_dropout_prob=0 and has no null label; use guidance_scale=1"
            )
        return torch.full_like(condition, self.num_classes)

    def drop(self, condition: Tensor, dropped: Tensor) -> Tensor:
        """Replace the conditions of the samples ``dropped [B]`` by null."""
        return torch.where(dropped, self.null(condition), condition)

    def forward(self, condition: Tensor) -> Tensor:
        """``[B]`` labels to ``[B, 1, D]``."""
        return self.embedding_table(condition)[:, None]


class LabelTable(nn.Embedding):
    """Class vectors without a null row: the null label ``num_classes`` is what the model says (MAR's ``fake_latent``)."""

    has_null = True

    def __init__(self, num_classes: int, dim: int, num_rows: int | None = None) -> None:
        super().__init__(num_classes if num_rows is None else num_rows, dim)
        self.num_classes = num_classes

    def check(self, condition: Any, values: bool = True) -> Tensor:
        """Return the labels ``[B]`` int64 on the module's device, or say what is wrong with them; None is no class."""
        return check_labels(condition, self.num_classes, self.has_null, execution_device(self), values)

    def null(self, condition: Tensor) -> Tensor:
        """The null label of the same batch."""
        return torch.full_like(condition, self.num_classes)

    def drop(self, condition: Tensor, dropped: Tensor) -> Tensor:
        """Replace the labels of the samples ``dropped [B]`` by null."""
        return torch.where(dropped, self.null(condition), condition)


class LabelEmbedding(LabelTable):
    """Class vectors; the last row is the null label."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__(num_classes, dim, num_classes + 1)


class CaptionProjection(nn.Module):
    """Two linear layers without bias, GELU (tanh form) between: zero features stay zero."""

    def __init__(self, caption_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """``[..., C]`` to ``[..., D]``."""
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """Projected text features, left-padded; the null caption is a fixed random buffer of the checkpoint.

    Dropping a caption keeps its mask: the unconditional branch sees as many positions as the caption had words.
    """

    uncond_embedding: Tensor

    def __init__(self, caption_dim: int, dim: int, num_tokens: int = 120) -> None:
        super().__init__()
        self.caption_dim, self.num_tokens = caption_dim, num_tokens
        self.cap_proj = CaptionProjection(caption_dim, dim)
        self.register_buffer("uncond_embedding", torch.randn(num_tokens, caption_dim) / caption_dim**0.5)

    def check(self, condition: Any, values: bool = True) -> tuple[Tensor, Tensor]:
        """Return (features [B, T, C], mask [B, T] bool), padded features zeroed."""
        if not isinstance(condition, tuple | list) or len(condition) != 2:
            raise ValueError(f"caption condition must be (features, mask), got {type(condition).__name__}")
        device = execution_device(self)
        features, mask = (torch.as_tensor(part, device=device) for part in condition)
        if features.ndim != 3 or features.shape[1:] != (self.num_tokens, self.caption_dim):
            allowed = ("batch", self.num_tokens, self.caption_dim)
            raise ValueError(f"caption features must have shape {allowed}, got {tuple(features.shape)}")
        if mask.shape != features.shape[:2]:
            raise ValueError(f"caption mask must have shape {tuple(features.shape[:2])}, got {tuple(mask.shape)}")
        mask = mask.bool()
        return features.to(compute_dtype(self.cap_proj.fc1)) * mask[..., None], mask

    def mask(self, condition: tuple[Tensor, Tensor]) -> Tensor | None:
        """Positions that hold a word, ``[B, T]`` bool."""
        return condition[1]

    @runs_as_forward
    def null(self, condition: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The null caption under the same mask."""
        features, mask = condition
        return self.uncond_embedding.to(features.dtype).expand_as(features), mask

    def drop(self, condition: tuple[Tensor, Tensor], dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Replace the features of the samples ``dropped [B]`` by the null caption."""
        features, mask = condition
        return torch.where(dropped[:, None, None], self.null(condition)[0], features), mask

    def forward(self, condition: tuple[Tensor, Tensor]) -> Tensor:
        """Project to ``[B, T, D]``."""
        return self.cap_proj(condition[0])


class AttributeEmbedding(nn.Module):
    """One position per attribute slot: embedding of its value plus a learned embedding of the slot; id 0 = unspecified."""

    def __init__(self, num_attributes: int, num_slots: int, dim: int) -> None:
        super().__init__()
        self.num_attributes, self.num_tokens = num_attributes, num_slots
        self.embedding_table = nn.Embedding(num_attributes, dim)
        self.slot_embedding = nn.Embedding(num_slots, dim)

    def check(self, condition: Any, values: bool = True) -> Tensor:
        """Return the ids ``[B, num_slots]`` int64 on the module's device, or say what is wrong with them.

        ``values=False`` leaves the range unchecked.
        """
        ids = read_ids(condition, "attribute ids", 2, execution_device(self))
        if ids.shape[1] != self.num_tokens:
            raise ValueError(f"attribute ids must have shape [batch, {self.num_tokens}], got {tuple(ids.shape)}")
        if values:
            check_range(ids, self.num_attributes, f"attribute id must be in 0..{self.num_attributes - 1}")
        return ids

    def mask(self, condition: Tensor) -> Tensor | None:
        """Positions that hold something; None = all (an unspecified slot is a value of its own)."""
        return None

    def null(self, condition: Tensor) -> Tensor:
        """Nothing specified."""
        return torch.zeros_like(condition)

    def drop(self, condition: Tensor, dropped: Tensor) -> Tensor:
        """Unspecify the samples ``dropped [B]`` or the single slots ``dropped [B, T]``."""
        dropped = dropped if dropped.ndim == 2 else dropped[:, None]
        return torch.where(dropped, 0, condition)

    def draw_slots(self, batch: int, prob: float, generator: torch.Generator | None = None) -> Tensor:
        """Draw which slots to unspecify: each sample has its own rate, uniform in [0, 2 * prob] clipped to 1.

        A mean rate of ``prob`` with samples from nearly full to nearly empty, so that prompts of any length are seen.

        Returns:
            [B, T] bool on the generator's device.
        """
        device = execution_device(self) if generator is None else generator.device
        rate = (2 * prob * torch.rand(batch, 1, generator=generator, device=device)).clamp(max=1.0)
        return torch.rand(batch, self.num_tokens, generator=generator, device=device) < rate

    def forward(self, condition: Tensor) -> Tensor:
        """``[B, T]`` ids to ``[B, T, D]``."""
        slots = torch.arange(self.num_tokens, device=condition.device)
        return self.embedding_table(condition) + self.slot_embedding(slots)


ConditionEmbedding = ClassEmbedding | CaptionEmbedding | AttributeEmbedding


def drop_condition(
    embedding: Any,
    condition: Any,
    config: Any,
    drop: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    training: bool,
) -> Any:
    """Drop the conditions of a training batch; in evaluation nothing is dropped unless ``drop`` is given.

    Args:
        embedding: the condition embedding.
        condition: as its ``check`` returns it.
        config: of the model: ``condition_type``, ``class_dropout_prob``, and ``attribute_dropout_prob`` if it has one.
        drop: [B] bool, True = train without condition; for attributes also [B, T], single slots; None draws.
        generator: of what is drawn; None = the global one.
        training: whether the model is in training mode.
    """
    ids = condition[0] if isinstance(condition, tuple) else condition
    if drop is not None:
        return embedding.drop(condition, drop.to(ids.device))
    if not training or config.condition_type == "none":
        return condition
    if config.condition_type == "attributes" and config.get("attribute_dropout_prob", 0.0) > 0:
        slots = embedding.draw_slots(len(ids), config.attribute_dropout_prob, generator)
        condition = embedding.drop(condition, slots.to(ids.device))
    if config.class_dropout_prob > 0:
        where = ids.device if generator is None else generator.device
        dropped = torch.rand(len(ids), generator=generator, device=where) < config.class_dropout_prob
        condition = embedding.drop(condition, dropped.to(ids.device))
    return condition


def check_labels(condition: Any, num_classes: int, has_null: bool, device: torch.device, values: bool) -> Tensor:
    """Return labels ``[B]`` int64 on the device; ``values`` also looks at their range."""
    labels = read_ids(condition, "class labels", 1, device)
    if values:
        null = f" ({num_classes} = no class)" if has_null else ""
        rule = f"class label must be in 0..{num_classes - 1}{null}"
        check_range(labels, num_classes + has_null, rule)
    return labels


def read_ids(condition: Any, name: str, ndim: int, device: torch.device) -> Tensor:
    """Return integer ids of ``ndim`` axes on a device; anything else raises ``ValueError``."""
    ids = torch.as_tensor(condition, device=device)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {ids.dtype}")
    if ids.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {tuple(ids.shape)}")
    return ids.long()


def check_range(ids: Tensor, size: int, rule: str) -> None:
    """Raise ``ValueError`` for an id outside of 0..size - 1."""
    if ids.device.type == "meta" or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise ValueError(f"{rule}, got {low if low < 0 else high}")
