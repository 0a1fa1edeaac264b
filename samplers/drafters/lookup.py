"""Drafters that look their distributions up in a table instead of running a model.

A table knows the code before a slot and the code above it. Trees and chains are filled from it as from a draft model, so every
shape works; the table goes on learning from what the target says, and keeps what it learned for the next call.

Letters: A images, V codes, n nodes of a tree, w nodes of a level, D codes on a path, m nodes read since the last permanent code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vargen.samplers.drafters.tree import TreeDraft


class LookupDrafter:
    """Base of drafters with a table; concrete ones say what it holds.

    One object serves any number of runs and is the warmer the more it has seen: what it proposes changes the time and, under
    the shared-noise rule, never a code.
    """

    watches_logits = False  # whether ``watch`` reads logits

    def begin(self, state: Any) -> LookupDrafts:
        """Open the table for one run."""
        self.prepare(int(state.backbone.codebook_size), state.keys.device)
        return LookupDrafts(self, state)

    def prepare(self, codebook_size: int, device: torch.device) -> None:
        """Make the table for V codes, or check that the one which stands has them.

        Raises:
            ValueError: it was made for another codebook.
        """
        raise NotImplementedError

    def lookup(self, left: Tensor, above: Tensor) -> Tensor:
        """Return logits ``[A, w, V]`` of codes behind ``left [A, w]`` and below ``above [A, w]`` (-1: outside the picture)."""
        raise NotImplementedError

    def watch(self, codes: Tensor, logits: Tensor) -> None:
        """Learn the guided logits ``[A, n, V]`` behind the codes ``[A, n]`` that were fed (-1: nothing)."""

    def learn(self, codes: Tensor, left: Tensor, above: Tensor) -> None:
        """Learn permanent codes ``[A]`` with what stands before and above them (-1: nothing)."""


class LookupDrafts:
    """A table as draft model of one run."""

    num_forwards = 0
    reads_hidden = False

    def __init__(self, drafter: LookupDrafter, state: Any) -> None:
        self.drafter, self.state = drafter, state
        self.paths = torch.empty(0)  # [A, m, D] codes from the first proposal down to a node
        self.level = 0  # D

    def extend(self, codes: Tensor, hidden: Tensor | None, num: Tensor) -> Tensor:
        """Learn what became permanent; logits ``[1, A, V]`` behind it."""
        length = self.state.length
        for j in range(codes.shape[1]):
            fresh = j < num
            slot = length - num + j
            code = self._permanent(slot).where(fresh, -1)
            self.drafter.learn(code, self._permanent(slot - 1), self._permanent(slot - self.state.layout.stride))
        self.level, self.paths = 0, codes.new_zeros(len(codes), 0, 0)
        return self._behind(self.state.last_codes(), codes.new_zeros(len(codes), 1, 0))[:, 0][None]

    def expand(self, codes: Tensor, parents: Tensor) -> Tensor:
        """Logits ``[1, A, w, V]`` behind the nodes of one more level."""
        index = parents.clamp(min=0)[..., None].expand(-1, -1, self.level)
        over = self.paths.gather(1, index) if self.level else codes.new_zeros(*codes.shape, 0)
        own = torch.cat([over, codes[..., None]], dim=-1)
        self.paths = torch.cat([torch.nn.functional.pad(self.paths, (0, 1)), own], dim=1)
        self.level += 1
        return self._behind(codes, own)[None]

    def select(self, rows: Tensor) -> None:
        """Nothing is kept an image between two iterations."""

    def watch(self, draft: TreeDraft, logits: Tensor) -> None:
        """Learn the guided logits ``[A, n, V]`` of a tree that was scored."""
        self.drafter.watch(draft.tokens, logits)

    def _behind(self, left: Tensor, paths: Tensor) -> Tensor:
        """What the table says of the slot behind ``left [A, w]``, whose paths are ``[A, w, D]``."""
        state = self.state
        back = state.length + self.level - state.layout.stride  # A, the slot above
        above = self._permanent(back)[:, None].expand_as(left)
        if self.level:
            drafted = back - state.length
            here = paths.gather(2, drafted.clamp(0, self.level - 1)[:, None, None].expand(-1, left.shape[1], 1))[
                ..., 0
            ]
            above = torch.where((drafted >= 0)[:, None], here, above)
        return self.drafter.lookup(left, above)

    def _permanent(self, slot: Tensor) -> Tensor:
        """Permanent codes ``[A]`` of slots, -1 where there is none."""
        state = self.state
        code = state.tokens[state.rows, slot.clamp(0, state.layout.num_slots)]
        return code.where((slot >= 0) & (slot < state.length), -1)


def one_each(index: Tensor, size: int) -> Tensor:
    """Of equal entries of ``index [m]``, only the last keeps its value; the others and negative ones become ``size``.

    What is written to rows ``0..size - 1`` then does not depend on the order of writing; row ``size`` takes the rest.
    """
    place = index.where(index >= 0, size)
    number = torch.arange(len(index), device=index.device)
    last = torch.full((size + 1,), -1, device=index.device).scatter_reduce(0, place, number, "amax")
    return place.where(last[place] == number, size)
