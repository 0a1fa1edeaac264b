"""Prompts as rows of token ids: read from texts, processor outputs or tensors, and packed for one prefill.

Letters: P prompts, L prompt length, B images, G guidance branches, R = G * B rows (branch-major), U different ones, T longest
row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PromptIds(NamedTuple):
    """Tokenised prompts, padded on either side. A named tuple of tensors, so that pipelines can repeat and slice it."""

    input_ids: Tensor  # [P, L] int64
    attention_mask: Tensor  # [P, L] int64 or bool, 0 = padding


@dataclass(frozen=True)
class PackedPrompts:
    """Rows of all branches, padded on the right."""

    ids: Tensor  # [R, T] int64
    lengths: Tensor  # [R] int64
    batch: int  # B
    branches: int  # G
    distinct: Tensor  # [U] int64 rows that differ from each other: images of one prompt share their prefill
    source: Tensor  # [R] int64 which of the U rows each row is
    mix: float | None = None  # of three branches: weight of the last in the unconditional logits, see ``pack``

    @property
    def valid(self) -> Tensor:
        """[R, T] bool, False = padding."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]


def pack(branches: Sequence[Sequence[Tensor]], device: torch.device, mix: float | None = None) -> PackedPrompts:
    """Pad rows of token ids, conditional branch first, on the right.

    Padding is never attended, so any id serves; 0 is used.

    Args:
        branches: rows of ids, B in each branch.
        device: of the result.
        mix: for three branches: samplers know two, so the second of them becomes ``mix * last + (1 - mix) * middle``.
    """
    rows = [row.to(device) for branch in branches for row in branch]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    number: dict[tuple[int, ...], int] = {}
    source = [number.setdefault(tuple(row.tolist()), len(number)) for row in rows]
    return PackedPrompts(
        ids,
        lengths,
        len(branches[0]),
        len(branches),
        distinct=torch.tensor([source.index(i) for i in range(len(number))], device=device),
        source=torch.tensor(source, device=device),
        mix=mix,
    )


def split_rows(prompts: Any, vocab_size: int) -> list[Tensor]:
    """Return the valid token ids of every prompt.

    Args:
        prompts: a mapping with ``input_ids`` and maybe ``attention_mask`` (what processors return), a tuple of both,
            or ids alone; lists are taken as tensors.
        vocab_size: ids must be below.

    Raises:
        ValueError: no ids, wrong shape or type, ids out of range, or a prompt of padding only.
    """
    ids, mask = _ids_and_mask(prompts)
    ids = _integers("input_ids", ids)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(f"input_ids must be [P, L] and not empty, got {list(ids.shape)}")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else _integers("attention_mask", mask).bool()
    valid = valid[None] if valid.ndim == 1 else valid
    if valid.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {list(ids.shape)}, got {list(valid.shape)}"
        )
    if bool(((ids < 0) | (ids >= vocab_size)).any()):
        raise ValueError(f"input_ids must be in 0..{vocab_size - 1}, got {int(ids.min())}..{int(ids.max())}")
    if not bool(valid.any(1).all()):
        raise ValueError(f"prompt {int((~valid.any(1)).nonzero()[0])} is empty: its attention_mask is 0 everywhere")
    return [row[keep] for row, keep in zip(ids.long(), valid, strict=True)]


def _ids_and_mask(prompts: Any) -> tuple[Any, Any]:
    if isinstance(prompts, Mapping):  # transformers' BatchFeature is one
        if "input_ids" not in prompts:
            raise ValueError(f"processor outputs must hold input_ids, got {', '.join(prompts) or 'nothing'}")
        return prompts["input_ids"], prompts.get("attention_mask")
    if isinstance(prompts, tuple) and len(prompts) == 2:
        return prompts
    return prompts, None


def _integers(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{name} must be a tensor of integers, got {type(value).__name__}; for lists of different lengths call "
            "the processor with padding=True, return_tensors='pt'"
        ) from None
    if tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"{name} must be integers, got {tensor.dtype}")
    return tensor
