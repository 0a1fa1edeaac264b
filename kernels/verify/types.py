"""What a window decoder carries from one iteration to the next: drafts with their distributions, outcomes.

Everything is indexed by target position (Teng et al., 2024, arXiv:2410.01699, with the label rule that keeps
the distribution exact): entry j of a draft is the proposal for the very position whose distribution is row j of this
iteration's logits, and it is stored with the one from which it was drawn, given everything about earlier positions only.

Letters: G guidance branches (conditional first), B images, W window, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Literal, get_args

import torch
from torch import Tensor

Carry = Literal["gumbel", "maximal", "independent", "none"]
CARRIES: tuple[Carry, ...] = get_args(Carry)


class Label(IntEnum):
    """The distribution a draft token was drawn from."""

    NONE = 0  # no proposal
    POINT = 1  # all mass on the token: copies, forced tokens, deterministic drafters
    UNIFORM = 2  # the same probability (the entry's ``prob``) for every code
    ROW = 3  # the warped row ``row`` of ``Draft.logits``


@dataclass(frozen=True)
class Draft:
    """Proposals for the next window.

    ``logits`` are raw; they are warped with the settings of the verification (``G`` may be 1 although the target has 2).
    ``stats`` holds what the warp found for every row of ``logits`` (threshold, log-normaliser), so that a label costs
    one pass instead of a second top-k; without it the rows are warped anew.
    """

    tokens: Tensor  # [B, W] int64, -1 where there is none
    kind: Tensor  # [B, W] int8, values of Label
    prob: Tensor  # [B, W] float32, probability of the token under its label
    row: Tensor  # [B, W] int64, row of ``logits`` that is the label (ROW only)
    logits: Tensor | None = None  # [G, B, W', V]
    stats: Tensor | None = None  # [B, W', 2] float32

    @classmethod
    def none(cls, batch: int, window: int, device: torch.device | str | None = None) -> Draft:
        """A window without proposals."""
        shape = (batch, window)
        return cls(
            tokens=torch.full(shape, -1, dtype=torch.int64, device=device),
            kind=torch.zeros(shape, dtype=torch.int8, device=device),
            prob=torch.zeros(shape, dtype=torch.float32, device=device),
            row=torch.zeros(shape, dtype=torch.int64, device=device),
        )

    def select(self, rows: Tensor) -> Draft:
        """Keep the images ``rows`` (int64 indices), in that order."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = {name: value if value is None else value[rows] for name, value in kept.items() if name != "logits"}
        return Draft(**kept, logits=None if self.logits is None else self.logits[:, rows])

    def with_logits(self, logits: Tensor | None, stats: Tensor | None = None) -> Draft:
        """The same proposals over other label logits."""
        return replace(self, logits=logits, stats=stats)


@dataclass(frozen=True)
class Place:
    """Which positions the rows of a window are, and what keys their noise."""

    seeds: Tensor  # [B] int64
    positions: Tensor  # [B, W] int64
    iteration: Tensor  # [B] int64
    num_rows: Tensor  # [B] int64 in [0, W], how many rows count
    forced: Tensor | None = None  # [B, W] int64, -1 where free


@dataclass(frozen=True)
class VerifyOutcome:
    """Outcome of every row of a window.

    ``tokens[b, : num_committed[b]]`` become permanent; the rows behind them are proposals for the next window, drawn
    from the distribution of their row. Rows that do not count (``j >= num_rows[b]``) hold -1.
    """

    tokens: Tensor  # [B, W] int64
    accepted: Tensor  # [B, W] bool
    prob: Tensor  # [B, W] float32, probability of the token under row j
    num_committed: Tensor  # [B] int64, 0 for finished images
    stats: Tensor  # [B, W, 2] float32: threshold and log-normaliser of every row


@dataclass(frozen=True)
class VerifyNoise:
    """Explicit noise in place of Philox.

    ``fresh`` and ``residual`` are either Gumbel rows ``[B, W, V]`` (argmax of log-weight plus noise) or uniforms
    ``[B, W]`` (inverse of the cumulative weights in code order, double precision).
    """

    accept: Tensor | None = None  # [B, W] float32 in [0, 1)
    fresh: Tensor | None = None
    residual: Tensor | None = None


@dataclass(frozen=True)
class GroupSpec:
    """Groups of grouped speculative decoding (GSD, arXiv:2508.07747): neighbours of the draft in target rank.

    The group of a draft token of ascending rank r holds ranks [r - size/2, r + size/2) (the token alone if the range
    starts below 0), without codes whose probability differs by ``prob_threshold`` or more or whose embedding is
    ``distance_threshold`` (squared) or farther away. Defaults are those of the released code.
    """

    size: int = 14
    prob_threshold: float = 0.15
    distance_threshold: float = 0.5
    embeddings: Tensor | None = None  # [E, D]; a group with a code >= E is not filtered by distance
