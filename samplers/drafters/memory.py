"""The drafter of Jacobi windows whose width changes: it remembers the last code drawn for every slot.

Only for the shared-noise rule and greedy decoding, where any guess is exact. A window that shrinks and grows again finds what was
known of its slots.

Letters: A images, S slots, w slots of a window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vargen.kernels.verify.types import Draft, VerifyOutcome
from vargen.samplers.drafters.base import PlainDrafter
from vargen.samplers.drafters.jacobi import INITS, Init, shared_guesses
from vargen.samplers.drafters.row_above import RowAboveDrafter

WAYS = tuple(init for init in INITS if init != "auto")


class MemoryDrafter(PlainDrafter):
    """Guesses what the model drew last for a slot; slots that it has not seen are initialised.

    Args:
        init: how; "auto" is, for every image, the way that would have been right most often so far.
    """

    def __init__(self, init: Init) -> None:
        self.init = init
        self.memory: Tensor | None = None  # [A, S + 1] int64; the last column takes what is thrown away
        self.seen: Tensor | None = None  # [A, S + 1] int64 how often the model drew the slot
        self.uniform: Tensor | None = None  # [A, S] int64, for "auto" only
        self.hits: Tensor | None = None  # [A, 3] int64 permanent codes that each way would have guessed
        self.known: Tensor | None = None  # [A] int64 slots that were counted

    @property
    def guesses_alone(self) -> bool:  # type: ignore[override]
        """Whether there are guesses: not before the first window wider than one."""
        return self.memory is not None

    def select(self, rows: Tensor) -> None:
        """Keep these images."""
        if self.memory is not None and self.seen is not None:
            self.memory, self.seen = self.memory[rows], self.seen[rows]
        if self.uniform is not None and self.hits is not None and self.known is not None:
            self.uniform, self.hits, self.known = self.uniform[rows], self.hits[rows], self.known[rows]

    def ages(self, slots: Tensor) -> Tensor:
        """How often the model has drawn ``slots [A, w]``, ``[A, w]`` int64."""
        return torch.zeros_like(slots) if self.seen is None else self.seen.gather(1, slots)

    def propose(self, state: Any, logits: Tensor, outcome: VerifyOutcome, slots: Tensor, num_rows: Tensor) -> Draft:
        """Remember what was drawn, then guess."""
        if outcome is not None and self.memory is not None and self.seen is not None:
            offset = torch.arange(slots.shape[1], device=slots.device)
            where = slots.where(offset < num_rows[:, None], state.layout.num_slots)
            self.memory.scatter_(1, where, outcome.tokens)
            self.seen.scatter_add_(1, where, torch.ones_like(where))
        if state.width == 1:
            return self.narrowed(state)
        if self.memory is None:
            guesses = shared_guesses(state)
            self.memory = torch.cat([guesses, guesses[:, -1:]], dim=1)
            self.seen = torch.zeros_like(self.memory)
            if self.init == "auto":
                self.uniform, self.known = guesses, state.length.clone()
                self.hits = guesses.new_zeros(len(guesses), len(WAYS))
        self._count(state)
        return super().propose(state, logits, outcome, slots, num_rows)

    def narrowed(self, state: Any) -> Draft:
        """The guess for the next slot alone, which is only compared."""
        draft = Draft.none(len(state.keys), 1, state.keys.device)
        if self.memory is not None:
            draft.tokens.copy_(self.memory.gather(1, state.length[:, None]))
        return draft

    def guess(self, state: Any, slots: Tensor) -> Tensor:
        """What is remembered."""
        assert self.memory is not None
        tokens = self.memory.gather(1, slots)
        if self.init == "uniform":
            return tokens
        fresh = self.ages(slots) == 0
        return torch.where(fresh, self._first(state, slots, tokens), tokens)

    def _first(self, state: Any, slots: Tensor, uniform: Tensor) -> Tensor:
        """Guesses for slots that were not seen yet."""
        if self.init == "repeat_left":
            return state.last_codes()  # type: ignore[no-any-return]
        above = RowAboveDrafter().guess(state, slots)
        if self.hits is None:
            return above
        way = self.hits.argmax(-1, keepdim=True)  # A 1
        left = torch.where(way == WAYS.index("repeat_left"), state.last_codes(), uniform)
        return torch.where(way == WAYS.index("repeat_above"), above, left)

    def _count(self, state: Any) -> None:
        """Ask of the codes that became permanent which of the ways would have guessed them."""
        if self.uniform is None or self.hits is None or self.known is None:
            return
        free = state.length.device.type == "cpu"
        num = int((state.length - self.known).max()) if free else state.widths.most
        slots = self.known[:, None] + torch.arange(num, device=state.length.device)
        counted, inside = slots < state.length[:, None], slots.clamp(max=state.layout.num_slots - 1)
        rows = state.rows[:, None]
        code = state.tokens[rows, inside]
        guesses = (
            self.uniform.gather(1, inside),
            state.tokens[rows, (inside - 1).clamp(min=0)],
            state.tokens[rows, (inside - state.layout.stride).clamp(min=0)],
        )
        self.hits += torch.stack([((guess == code) & counted).sum(-1) for guess in guesses], dim=-1)
        self.known = state.length.clone()
