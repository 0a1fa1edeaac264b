"""The row drafter of one run: proposes the rest of a row and what fits of the next one, from heads of neighbours.

A slot that the target has scored under an older guess has a stale distribution; what the right head says of the code that has
changed to its left brings it up to date. A slot that it has not scored is guessed by both heads. Guesses use the noise of their
position, as the rule does.

Letters: A images, S slots, G guidance branches, V codes, D width, w slots of a window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vargen.kernels.draw import draw
from vargen.kernels.verify.types import Draft, VerifyOutcome
from vargen.kernels.warp import combine
from vargen.samplers.drafters.base import PlainDrafter

SWEEPS = 3  # passes of the right head over a window: the guess of a slot has to reach the one behind it


class RowDrafts(PlainDrafter):
    """Keeps the hidden states of permanent codes and the last scores of the slots behind them.

    Args:
        model: a ``RowDrafter``.
        state: of the decoder, after the prefill's forward pass.
        warp: settings of the sampler.
    """

    guesses_alone = False
    reads_hidden = True

    def __init__(self, model: Any, state: Any, warp: dict[str, Any]) -> None:
        self.model, self.state = model, state
        self.scale, self.warp = warp.get("guidance_scale", 1.0), {**warp, "guidance_scale": 1.0}
        first = state.hidden[:, :, -1]  # G A D
        self.hidden = first[:, :, None].repeat(1, 1, state.layout.num_slots + 1, 1)  # [f + 1] is that of slot f
        self.length = state.length.clone()  # before the last commit
        self.fed = torch.zeros_like(state.tokens[:, :1])  # [A, w] codes of the last window
        self.scores: Tensor | None = None  # [A, w, V] guided, of the last window

    def commit(self, count: Tensor) -> None:
        """Remember the hidden states of the window whose first ``count [A]`` codes became permanent."""
        hidden, num = self.state.hidden, self.hidden.shape[2]
        fed = self.length[:, None] + torch.arange(hidden.shape[2], device=count.device)  # A w: 1 + slot
        image, row = (fed < num).nonzero().unbind(1)
        self.hidden[:, image, fed[image, row]] = hidden[:, image, row]
        self.length = self.length + count

    def select(self, rows: Tensor) -> None:
        """Keep these images."""
        self.hidden, self.length = self.hidden[:, rows], self.length[rows]
        self.fed = self.fed[rows]

    def propose(self, state: Any, logits: Tensor, outcome: VerifyOutcome, slots: Tensor, num_rows: Tensor) -> Draft:
        """Remember the scores, then guess."""
        self.length = state.length.clone()
        self.slots, self.scores = slots, combine(logits, self.scale, 1.0)
        self.num_rows = (
            torch.zeros_like(num_rows) if outcome is None else num_rows
        )  # windows of one leave nothing stale
        draft = super().propose(state, logits, outcome, slots, num_rows)
        drafts = draft.tokens[:, : state.width - 1].clamp(min=0)
        self.fed = torch.cat([state.last_codes(), drafts], dim=1)
        return draft

    def guess(self, state: Any, slots: Tensor) -> Tensor:
        """Codes ``[A, w]``; -1 beyond a row, where the code above is not permanent."""
        base, seen, tokens = self._start(state, slots)
        positions = state.layout.code_index[slots]
        noise = None if state.noise is None else state.noise.rows(positions)
        forced = torch.full_like(slots, -1) if state.forced is None else state.forced.gather(1, slots)
        last = state.last_codes()
        for _ in range(SWEEPS):
            left = torch.cat([last, tokens[:, :-1]], dim=1)
            scores = base + self._right(state, left)
            scores.masked_fill_((forced >= 0)[..., None], 0.0)
            tokens = draw(scores[None], seeds=state.keys, positions=positions, noise=noise, **self.warp)
            tokens = torch.where(forced >= 0, forced, tokens)
        known = slots - state.layout.stride + 1 < state.length[:, None]
        return torch.where(known | seen, tokens, -1)

    def _right(self, state: Any, codes: Tensor) -> Tensor:
        """What the right head adds to the logits behind codes ``[A, w]``: ``[A, w, V]``."""
        features = self.model.righter(state.backbone.embed(codes))
        scores: Tensor = state.backbone.head_logits(features)
        return scores

    def _start(self, state: Any, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores ``[A, w, V]`` to which the right head adds, where the target has looked, and codes to start from."""
        assert self.scores is not None
        place = slots - self.slots[:, :1]  # rows of the last window
        seen = place < self.num_rows[:, None]
        index = place.clamp(max=self.scores.shape[1] - 1)
        stale = self.scores.gather(1, index[..., None].expand(-1, -1, self.scores.shape[-1]))
        before = self.fed.gather(1, index.clamp(max=self.fed.shape[1] - 1))  # the code to the left when it looked
        image = torch.arange(len(slots), device=slots.device)[:, None]
        above = (slots - state.layout.stride + 1).clamp(min=0)  # in rows of the memory, whose first is the condition's
        corner = slots - state.layout.stride + 1
        codes = state.tokens[state.rows[:, None], corner.clamp(min=0)].clamp(min=0)
        corners = state.backbone.embed(codes) * (corner >= 0)[..., None]
        features = self.model.lower(self.hidden[:, image, above], corners.expand(len(self.hidden), -1, -1, -1))
        fresh = combine(state.backbone.head_logits(features), self.scale, 1.0)
        base = torch.where(seen[..., None], stale - self._right(state, before), fresh)
        return base, seen, base.argmax(-1)


def proposes_rows(drafter: Any) -> bool:
    """Whether a model guesses neighbours: a ``RowDrafter``."""
    return hasattr(drafter, "righter") and hasattr(drafter, "lower")
