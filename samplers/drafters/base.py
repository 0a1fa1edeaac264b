"""Who proposes the codes of a window: the sampler's own previous iteration, a small model, or a simple guess.

Every proposal carries the distribution from which it was drawn, given earlier positions only: this label rule is what keeps the
sampled distribution exact (Teng et al., 2024, arXiv:2410.01699).

Letters: A images, S slots, V codes, W window, w rows of an iteration, G guidance branches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.kernels.verify.types import Draft, Label, VerifyOutcome
from vargen.protocols import Backbone


class Drafter(Protocol):
    """Proposes the codes of the next window; holds what it needs between the iterations of one run."""

    num_forwards: int  # forward passes of a drafting model, 0 without one
    in_tree: bool  # whether it proposes trees

    def propose(self, state: Any, logits: Tensor, outcome: VerifyOutcome, slots: Tensor, num_rows: Tensor) -> Draft:
        """Propose codes for the ``state.width`` slots behind the permanent ones.

        Args:
            state: the decoder's state after the commit.
            logits: ``[G, A, w, V]`` of the iteration that was just decided.
            outcome: what was decided.
            slots: ``[A, w]`` int64 slots of its rows.
            num_rows: ``[A]`` int64 how many of its rows counted.
        """
        ...

    def commit(self, count: Tensor) -> None:
        """Learn how many codes of the last window ``[A]`` became permanent; comes before ``select`` and ``propose``."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep these images (int64 indices), in that order."""
        ...


class PlainDrafter:
    """Base of drafters without a model: ``guess`` says which codes to try, everything else is done here.

    One object serves any number of runs; a drafter that keeps something between iterations returns a new one from ``begin``.
    """

    num_forwards = 0
    in_tree = False
    guesses_alone = True  # makes a guess, which costs nothing, in windows of one as well

    def begin(self, state: Any) -> Self:
        """Return the drafter of one run."""
        return self

    def guess(self, state: Any, slots: Tensor) -> Tensor:
        """Return codes ``[A, w]`` int64 for the slots ``[A, w]`` behind the permanent ones, -1 for no proposal."""
        raise NotImplementedError

    def commit(self, count: Tensor) -> None:
        """Nothing is kept that a commit would change."""

    def select(self, rows: Tensor) -> None:
        """Nothing is kept an image."""

    def propose(self, state: Any, logits: Tensor, outcome: VerifyOutcome, slots: Tensor, num_rows: Tensor) -> Draft:
        """Propose the guesses, for which a distribution is a point; the last slot of an image needs no proposal."""
        ahead = state.next_slots()
        draft = Draft.none(len(ahead), state.width, logits.device)
        tokens = self.guess(state, ahead)
        behind = state.length[:, None] + torch.arange(state.width, device=ahead.device)
        tried = (tokens >= 0) & (behind < state.layout.num_slots - 1)
        draft = replace(
            draft,
            tokens=tokens.where(tried, -1),
            kind=torch.where(tried, int(Label.POINT), int(Label.NONE)).to(torch.int8),
            prob=tried.float(),
        )
        return draft if state.forced is None else force(state.forced.gather(1, ahead), draft)


def force(forced: Tensor, draft: Draft) -> Draft:
    """Put the codes fixed beforehand (``[A, w]``, -1 where free) into a draft, as point masses."""
    fixed = forced >= 0
    return replace(
        draft,
        tokens=torch.where(fixed, forced, draft.tokens),
        kind=torch.where(fixed, int(Label.POINT), draft.kind).to(torch.int8),
        prob=torch.where(fixed, 1.0, draft.prob),
    )


def check_drafter(owner: str, backbone: Backbone, drafter: Any) -> None:
    """Raise ``ValueError`` unless ``drafter`` is a backbone over the same codes."""
    if drafter is None:
        raise ValueError(f"{owner} needs drafter=, a small backbone over the same codes (pipe.drafter)")
    missing = {Feature.WINDOW, Feature.RAGGED} - Feature.of(drafter)
    if missing:
        raise ValueError(
            f"drafter {type(drafter).__name__} lacks {', '.join(sorted(missing))}; give a causal backbone"
        )
    for name in ("codebook_size", "num_codes"):
        mine, other = getattr(backbone, name), getattr(drafter, name)
        if mine != other:
            raise ValueError(f"drafter and backbone need the same {name}, got {other} and {mine}")
