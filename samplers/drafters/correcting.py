"""Jacobi's stale drafts, corrected by a small model. The correction is this library's own.

Letters: A images, G guidance branches, V codes, w rows of an iteration.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vargen.kernels.draw import draw
from vargen.kernels.verify.types import Draft, VerifyOutcome
from vargen.kernels.warp import combine
from vargen.protocols import Backbone
from vargen.samplers.drafters.base import force
from vargen.samplers.drafters.jacobi import JacobiDrafter, shared_guesses


class CorrectingDrafter:
    """Shifts the last iteration's outcome, then redraws every proposal from the corrected distributions."""

    in_tree = False

    def __init__(self, sampler: Any, state: Any, model: Backbone, condition: Any) -> None:
        self.sampler, self.model = sampler, model
        self.shift = JacobiDrafter("uniform", shared_guesses(state) if sampler.temperature > 0 else None)
        prepared = model.prepare(condition, guidance_scale=sampler.guidance_scale)
        self.session, out = model.open(prepared, max_window=state.width)
        self.num_forwards = 1
        self.old = self._combine(out.logits).expand(-1, state.width, -1)  # a w v: drafter's scores of the last window

    def commit(self, count: Tensor) -> None:
        """Keep what the target committed: the last window of the drafter was the target's."""
        self.model.commit(self.session, count)

    def select(self, rows: Tensor) -> None:
        """Keep these images."""
        self.model.select(self.session, rows)
        self.shift.select(rows)
        self.old = self.old[rows]

    def propose(self, state: Any, logits: Tensor, outcome: VerifyOutcome, slots: Tensor, num_rows: Tensor) -> Draft:
        """Draft the next window in ``num_sweeps`` passes of the drafter, and one more over the result."""
        draft = self.shift.propose(state, logits, outcome, slots, num_rows)
        source = outcome.num_committed[:, None] + torch.arange(state.width, device=logits.device)  # a w'
        seen = (source < num_rows[:, None])[..., None]
        index = source.clamp(max=slots.shape[1] - 1)[..., None].expand(-1, -1, logits.shape[-1])
        # where the target has looked: its stale scores without what the drafter thinks of their old context
        stale = self._combine(logits).gather(1, index)  # a w' v
        base = torch.where(seen, stale - self.sampler.strength * self.old.gather(1, index), 0.0)
        weight = torch.where(seen, self.sampler.strength, 1.0)

        tokens, ahead = draft.tokens[:, : state.width], state.next_slots()
        positions = state.layout.code_index[ahead]
        forced = torch.full_like(ahead, -1) if state.forced is None else state.forced.gather(1, ahead)
        noise = None if state.noise is None else state.noise.rows(positions)
        warp = {**self.sampler.warp, "guidance_scale": 1.0}  # guidance is in the combined scores already
        for _ in range(self.sampler.num_sweeps):
            scores = base + weight * self._score(state, tokens)
            scores.masked_fill_((forced >= 0)[..., None], 0.0)  # a fixed slot may have no distribution
            tokens = draw(scores[None], seeds=state.keys, positions=positions, noise=noise, **warp)
            tokens = torch.where(forced >= 0, forced, tokens)
        self.old = self._score(state, tokens)
        parts = {name: getattr(draft, name)[:, : state.width] for name in ("kind", "prob", "row")}
        return force(forced, replace(draft, tokens=tokens, **parts))

    def _score(self, state: Any, tokens: Tensor) -> Tensor:
        """The drafter's guided logits ``[A, w, V]`` under these proposals."""
        self.num_forwards += 1
        window = torch.cat([state.last_codes(), tokens[:, : state.width - 1].clamp(min=0)], dim=1)
        return self._combine(self.model.step(self.session, window).logits)

    def _combine(self, logits: Tensor) -> Tensor:
        return combine(logits, self.sampler.guidance_scale, 1.0)
