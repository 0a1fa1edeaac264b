"""What an acceptance rule is: it decides all rows of a forward pass in one call.

Letters: A images, G guidance branches, V codes, n rows scored, w slots that may be decided, D width of hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from vargen.kernels.verify.types import Carry, Draft, GroupSpec, VerifyNoise, VerifyOutcome
from vargen.kernels.verify.verify import verify_window
from vargen.random import GumbelCache, NoiseRows


@dataclass(frozen=True)
class Rows:
    """The scores of one forward pass and the slots that they are about."""

    logits: Tensor  # [G, A, n, V]
    positions: Tensor  # [A, w] int64 code position of every slot: keys the noise
    num_rows: Tensor  # [A] int64 slots that count, 0 for a finished image
    forced: Tensor | None  # [A, w] int64 code that a slot must hold, -1 where free
    warp: dict[str, Any]  # guidance, temperature, top-k, top-p
    hidden: Tensor | None = None  # [G, A, n, D] hidden states, where the drafter reads them


@dataclass(frozen=True)
class Noise:
    """Where the random numbers of a decision come from."""

    keys: Tensor  # [A] int64 seeds
    iteration: Tensor  # [A] int64 forward passes so far
    cache: GumbelCache | NoiseRows | None = None  # rows of ``Stream.GUMBEL``, made beforehand or given
    errors: Tensor | None = None  # on a CUDA device: record of bad rows


class Outcome(Protocol):
    """What a rule returns; all its fields are tensors with one row an image."""

    tokens: Tensor  # [A, w] int64
    num_committed: Tensor  # [A] int64: so many of them become permanent


class Rule(Protocol):
    """Decides which proposals become permanent."""

    head: ClassVar[str]  # kind of token head that the rule is for

    @property
    def first(self) -> Rule:
        """The rule of slot 0, for which nothing is proposed."""
        ...

    def decide(self, rows: Rows, draft: Any, noise: Noise) -> Any:
        """Return the ``Outcome`` of all rows; ``draft`` is a ``Draft`` or, of tree rules, a ``TreeDraft``."""
        ...


@dataclass(frozen=True)
class WindowRule:
    """A rule over windows, decided by the kernel ``verify_window``.

    Args:
        carry: as there.
        group: groups of codes that count for one another, as there.
    """

    head: ClassVar[str] = "categorical"

    carry: Carry
    group: GroupSpec | None = None

    @property
    def first(self) -> WindowRule:
        """Itself: without a proposal a row is drawn."""
        return self

    def decide(self, rows: Rows, draft: Draft, noise: Noise) -> VerifyOutcome:
        """Decide a window."""
        return verify_window(
            rows.logits,
            draft,
            carry=self.carry,
            seeds=noise.keys,
            positions=rows.positions,
            iteration=noise.iteration,
            num_rows=rows.num_rows,
            forced=rows.forced,
            group=self.group,
            noise=self.given(rows, noise),
            errors=noise.errors,
            **rows.warp,
        )

    def given(self, rows: Rows, noise: Noise) -> VerifyNoise | None:
        """Noise made beforehand; None = the kernel makes it."""
        return None
