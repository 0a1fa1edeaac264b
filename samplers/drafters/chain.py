"""A small backbone drafts a chain, code after code.

Letters: A images, G guidance branches, V codes, w rows of an iteration.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vargen.kernels.draw import draw
from vargen.kernels.verify.types import Draft, Label, VerifyOutcome
from vargen.kernels.warp import warp_logits
from vargen.protocols import Backbone
from vargen.random import Stream
from vargen.samplers.drafters.base import force


class ChainDrafter:
    """Draws every draft from the draft model, given the drafts before it."""

    in_tree = False

    def __init__(self, sampler: Any, model: Backbone, condition: Any, max_window: int) -> None:
        self.sampler, self.model, self.max_window = sampler, model, max_window
        self.session, _ = model.open(condition, max_window=max_window)
        self.num_forwards = 1
        self.fed = 0  # codes fed for the last window, all of them in the cache
        self.behind = 0  # codes that were committed by windows of one and not fed yet, in every image

    def commit(self, count: Tensor) -> None:
        """Keep what the target committed of the last window and take the rest back."""
        if self.fed == 0:  # a window of one, of which every image keeps its code
            self.behind += 1
            return
        self.model.rewind(self.session, self.fed - count)
        self.fed = 0

    def select(self, rows: Tensor) -> None:
        """Keep these images."""
        self.model.select(self.session, rows)

    def propose(self, state: Any, logits: Tensor, outcome: VerifyOutcome, slots: Tensor, num_rows: Tensor) -> Draft:
        """Draft code after code; each pass feeds one code, which stays until the target has judged the window."""
        draft = Draft.none(len(state.rows), state.width, logits.device)
        if state.widths is not None and state.width == 1:
            return draft
        self._catch_up(state)
        slots = state.next_slots()  # a w
        forced = torch.full_like(slots, -1) if state.forced is None else state.forced.gather(1, slots)
        token = state.last_codes()  # a 1
        scores = []
        for j in range(state.width - 1):
            fixed = forced[:, j, None]
            out = self._forward(token)  # g a 1 v
            out = self.sampler.within_interval(out, state.layout.code_index[slots[:, j, None]])
            out = torch.where((fixed >= 0)[..., None], 0.0, out)  # a fixed slot may have no distribution
            token, draft.prob[:, j, None] = self._draw(state, out, slots[:, j, None])
            token = torch.where(fixed >= 0, fixed, token)
            scores.append(out)
            draft.tokens[:, j], draft.row[:, j] = token[:, 0], j
        self._forward(token)  # for the cache: the target may keep the last draft as well
        # no draft for the last slot, whatever the window of the batch: its code is drawn in any case
        offset = torch.arange(state.width, device=slots.device)
        drafted = (offset < state.width - 1) & (state.length[:, None] + offset < state.layout.num_slots - 1)
        draft.kind.masked_fill_(drafted, int(Label.ROW))
        draft = force(forced, draft)
        return draft.with_logits(torch.cat(scores, dim=2)) if scores else draft

    def _catch_up(self, state: Any) -> None:
        """Feed what was committed while nothing was drafted."""
        while self.behind:
            count = min(self.behind, self.max_window)
            first = state.length - 1 - self.behind  # a
            slots = first[:, None] + torch.arange(count, device=first.device)
            self.model.step(self.session, state.tokens[state.rows[:, None], slots])
            self.model.commit(self.session, count)
            self.num_forwards += 1
            self.behind -= count

    def _forward(self, token: Tensor) -> Tensor:
        logits = self.model.step(self.session, token).logits
        self.model.commit(self.session, 1)
        self.num_forwards += 1
        self.fed += 1
        return logits

    def _draw(self, state: Any, logits: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """A draft of one slot and its probability: ``[A, 1]`` each."""
        warp, positions = self.sampler.warp, state.layout.code_index[slots]
        shared = self.sampler.rule == "shared-noise"
        token = draw(
            logits,
            seeds=state.keys,
            positions=positions,
            stream=Stream.GUMBEL if shared else Stream.DRAFT,
            iteration=None if shared else torch.full_like(state.keys, state.num_forwards),
            noise=state.noise.rows(positions) if shared and state.noise is not None else None,
            **warp,
        )
        if shared or self.sampler.temperature == 0:  # agreement is tested, no probability
            return token, torch.ones_like(token, dtype=torch.float32)
        probs = warp_logits(logits, **warp).softmax(-1)
        return token, probs.gather(-1, token[..., None])[..., 0]
