"""The drafter of Jacobi decoding: the outcome of the previous iteration, shifted by what was committed.

Letters: A images, S slots, V codes, w rows of an iteration, G guidance branches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from vargen.kernels.draw import draw
from vargen.kernels.verify.shift import shift_window
from vargen.kernels.verify.types import Draft, Label, VerifyOutcome

Init = Literal["auto", "uniform", "repeat_left", "repeat_above"]
INITS = ("auto", "uniform", "repeat_left", "repeat_above")
GUESS_BLOCK = 1 << 22  # noise numbers looked at together when the guesses of a run are made


class JacobiDrafter:
    """Drafts from the previous iteration; slots that were not in the window before are initialised.

    Args:
        init: how a slot that enters the window is filled; "auto" is uniform here.
        guesses: ``[A, S]`` int64 codes to use in place of independent uniform ones. Only where any proposal is exact:
            the equality rule and greedy decoding.
    """

    num_forwards = 0
    in_tree = False

    def __init__(self, init: Init, guesses: Tensor | None = None) -> None:
        self.init, self.guesses = "uniform" if init == "auto" else init, guesses

    def commit(self, count: Tensor) -> None:
        """Nothing is kept that a commit would change."""

    def select(self, rows: Tensor) -> None:
        """Keep these images."""
        self.guesses = None if self.guesses is None else self.guesses[rows]

    def propose(self, state: Any, logits: Tensor, outcome: VerifyOutcome, slots: Tensor, num_rows: Tensor) -> Draft:
        """Shift the outcome of the iteration by what was committed and fill the tail."""
        following = (slots + outcome.num_committed[:, None]).clamp(max=state.layout.num_slots - 1)  # a w
        draft = shift_window(
            outcome,
            logits,
            positions=slots,
            num_rows=num_rows,
            num_positions=state.layout.num_slots,
            seeds=state.keys,
            iteration=state.iteration,
            tail=self.init,
            grid_width=state.layout.stride,
            codes=state.tokens[state.rows, : state.layout.num_slots] if self.init == "repeat_above" else None,
            forced=None if state.forced is None else state.forced.gather(1, following),
        )
        if self.guesses is not None:
            tokens = torch.where(draft.kind == Label.UNIFORM, self.guesses.gather(1, following), draft.tokens)
            draft = replace(draft, tokens=tokens)
        return draft


def shared_guesses(state: Any) -> Tensor:
    """The code whose noise is largest in every slot, ``[A, S]`` int64: what the slot would hold if its distribution
    were uniform.

    It repeats the draw with that noise much more often than an independent guess does: the two draws are coupled.
    """
    num_images, num_codes = len(state.keys), int(state.backbone.codebook_size)
    block = max(1, GUESS_BLOCK // (num_images * num_codes))
    block = block if state.noise is None else min(block, state.noise.capacity)
    flat = torch.zeros(num_codes, dtype=torch.float32, device=state.keys.device)
    guesses = []
    for positions in state.layout.code_index.split(block):
        here = positions.expand(num_images, -1)
        rows = None if state.noise is None else state.noise.rows(here)
        guesses.append(draw(flat.expand(1, *here.shape, -1), seeds=state.keys, positions=here, noise=rows))
    return torch.cat(guesses, dim=1)
