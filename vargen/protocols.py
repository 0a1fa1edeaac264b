"""What samplers ask of a backbone: the window session, and the steps of a decode schedule.

A stream is the sequence of code slots 0..S-1 that follows the condition. ``open`` runs the condition, ``step`` scores a
window of proposals in one forward, ``commit`` makes a prefix (or a tree path) of it permanent. Randomness lives in the
sampler, never in the backbone.

Letters: B images, N code positions, V codes, W window, G guidance branches (conditional first), D width, S stream slots,
R = G * B rows, branch-major (row ``g * B + b`` is image b of branch g).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The stream of one image: which slots hold codes, which are forced, and where each code lies on its grid."""

    length: int  # S
    forced: Tensor  # [S] int64 token id of a structural slot, -1 for a code slot
    grids: tuple[tuple[int, int], ...]  # (h, w) in stream order; the last one is decoded to pixels
    slot_grid: Tensor  # [S, 3] int64 grid number, row, column; -1 for forced slots
    run_length: int  # slots that must be fed; the last code and trailing forced slots are not

    @classmethod
    def raster(cls, grid_size: tuple[int, int]) -> Layout:
        """One grid of codes, row by row, no forced slots."""
        h, w = grid_size
        index = torch.arange(h * w)
        slot_grid = torch.stack([torch.zeros_like(index), index // w, index % w], dim=-1)
        return cls(h * w, torch.full((h * w,), -1), ((h, w),), slot_grid, h * w - 1)


class StepOut(NamedTuple):
    """Scores of one window."""

    logits: Tensor  # [G, B, W, V] float32; entry j, fed at slot t, predicts slot t + 1
    hidden: Tensor | None = None  # [G, B, W, D] hidden states as they enter the head (after the final norm)


@runtime_checkable
class Condition(Protocol):
    """A prepared condition, opaque to samplers."""

    batch: int  # B
    branches: int  # G: 2 when guidance is on, else 1

    @property
    def lengths(self) -> Tensor:
        """[R] int64 condition positions of every row."""
        ...


# a condition as callers give it: class ids [B], attribute ids [B, T], or caption features ([B, T, C], mask [B, T])
ConditionInput = Tensor | tuple[Any, ...]


@runtime_checkable
class Model(Protocol):
    """What pipelines and every sampler ask of a backbone, whatever the order in which it draws."""

    num_codes: int  # N, codes or continuous tokens of a picture
    features: frozenset[str]  # of ``vargen.features.Feature``

    @property
    def device(self) -> torch.device:
        """Where conditions and codes are expected."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        ...

    def prepare(self, condition: Any, *, guidance_scale: float = 1.0) -> Any:
        """Check and embed a batch of conditions; two branches iff ``guidance_scale`` is not 1."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """What pipelines ask of a tokenizer; those of continuous tokens (diffusers' ``AutoencoderKL``) take latents for codes."""

    def decode(self, codes: Any) -> Any:
        """Codes ``[B, h, w]`` int64 to pixels ``[B, 3, H, W]`` around [-1, 1]."""
        ...


@runtime_checkable
class Session(Protocol):
    """The state of one decode, opaque to samplers but for its progress."""

    capacity: int

    @property
    def length(self) -> Tensor:
        """[B] int64 committed stream slots of every image."""
        ...


@runtime_checkable
class Backbone(Protocol):
    """A causal model that scores windows of codes."""

    num_codes: int  # N
    codebook_size: int  # V
    hidden_size: int  # D
    grid_size: tuple[int, int]
    features: frozenset[str]  # of ``vargen.features.Feature``

    @property
    def device(self) -> torch.device:
        """Where codes are expected."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; logits are float32 whatever it is."""
        ...

    def layout(self, height: int | None = None, width: int | None = None) -> Layout:
        """The stream of an image; backbones of one size refuse another."""
        ...

    def prepare(self, condition: Any, *, guidance_scale: float | Tensor = 1.0, negative: Any = None) -> Any:
        """Check and embed a batch of conditions; two branches iff ``guidance_scale`` is not 1."""
        ...

    def open(self, condition: Any, *, max_window: int = 1) -> tuple[Any, StepOut]:
        """Run the condition; logits ``[G, B, 1, V]`` predict slot 0. Windows of the session are at most max_window."""
        ...

    def step(
        self,
        session: Any,
        codes: Tensor,
        *,
        slots: Tensor | None = None,
        mask: Tensor | None = None,
        hidden: bool = False,
    ) -> StepOut:
        """Score a window; it vanishes unless ``commit`` follows.

        Args:
            session: from ``open``.
            codes: [B, W] int64, the same for every branch; values at forced slots are ignored.
            slots: [B, W] the slot whose content entry j is; default ``session.length[b] + j``.
            mask: [W, W] or [B, W, W], True where entry i may see entry j; replaces the causal order inside the window.
                Committed slots are always visible.
            hidden: return hidden states.
        """
        ...

    def commit(self, session: Any, n: int | Tensor, path: Tensor | None = None) -> None:
        """Make the first ``n`` entries of the last window permanent (0 <= n <= W), one int or ``[B]`` int64.

        For tree windows ``path [B, K]`` lists the indices of the accepted entries in order, ``n[b]`` of them valid.
        """
        ...

    def rewind(self, session: Any, n: int | Tensor) -> None:
        """Take back the last ``n`` committed entries, one int or ``[B]`` int64: a draft model that went too far."""
        ...

    def select(self, session: Any, rows: Tensor) -> None:
        """Keep the images ``rows`` (any order) and drop the others from session and cache."""
        ...

    def embed(self, codes: Tensor) -> Tensor:
        """Input embeddings of codes, ``[...]`` to ``[..., D]``."""
        ...


class Item(IntEnum):
    """What an item of a scheduled forward pass stands for; ``Step.index`` says which one."""

    CONDITION = 0  # condition position i
    CODE = 1  # the code at position p; where it is not drawn yet, the model's mask embedding
    SPECIAL = 2  # learned token i
    QUERY = 3  # a question for the code at position p


@dataclass(frozen=True)
class Step:
    """One forward pass of a decode schedule: w items in, g codes out.

    An item sees the slot s iff the stamp written there is not later than its view, ``tau[s] <= nu``, and always itself.
    """

    kinds: Tensor  # [w] int64, of Item
    index: Tensor  # [w] int64 condition position, code position or number of the learned token
    slots: Tensor  # [w] int64 cache slot, -1 = the item leaves nothing behind
    tau: Tensor  # [w] int64 stamps
    nu: Tensor  # [w] int64 views
    targets: Tensor  # [g] int64 positions of the codes that are drawn
    mix: (
        Tensor  # [H, g, w] float32: logits of target i = sum over heads h and items j of mix[h, i, j] * head_h(item j)
    )
    commit: Tensor  # [w] bool; False = forgotten after the pass
    counted: int = 0  # codes made before, as a guidance interval counts them

    @cached_property
    def parts(self) -> tuple[tuple[Item, Tensor | None, Tensor], ...]:
        """The items by kind: (kind, their columns or None for all, their index)."""
        found = self.kinds.unique().tolist()
        if len(found) == 1:
            return ((Item(found[0]), None, self.index),)
        columns = [(kind, (self.kinds == kind).nonzero().flatten()) for kind in found]
        return tuple((Item(kind), where, self.index[where]) for kind, where in columns)

    @cached_property
    def heads(self) -> tuple[int, ...]:
        """Heads that are read."""
        return tuple(int(h) for h in self.mix.flatten(1).any(1).nonzero().flatten())

    @cached_property
    def start(self) -> int | None:
        """First slot, where the items fill consecutive slots for good and see whatever is stamped before them."""
        first = int(self.slots[0])
        steady = bool(self.commit.all()) and torch.equal(self.tau, self.nu) and first >= 0
        line = torch.arange(first, first + len(self.slots), device=self.slots.device)
        return first if steady and torch.equal(self.slots, line) and bool((self.tau.diff() >= 0).all()) else None

    @cached_property
    def forgotten(self) -> Tensor | None:
        """Slots to erase after the pass."""
        gone = self.slots[~self.commit & (self.slots >= 0)]
        return gone if len(gone) else None
