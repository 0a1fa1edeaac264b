"""Who proposes the codes of a window: the sampler's own previous iteration, or a small model.

Every proposal carries the law from which it was drawn, given earlier positions only: this label rule is what keeps the
sampled law exact (Teng et al., 2024, arXiv:2410.01699). A copied code carries a point mass, a code drawn from a row of
logits carries that row.

Letters: A images, S slots, V codes, W window, w rows of the last iteration, G guidance branches.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vargen.kernels.window import Draft, Label, Verdict
from vargen.random import Stream as Noise
from vargen.random import gumbel, random_bits
from vargen.samplers.stream import Stream

Init = Literal["uniform", "repeat_left", "repeat_above"]
INITS = ("uniform", "repeat_left", "repeat_above")


class Drafter(Protocol):
    """Proposes the codes of the next window; holds what it needs between the iterations of one run."""

    num_forwards: int  # forward passes of a drafting model, 0 without one

    def propose(self, state: Any, logits: Tensor, verdict: Verdict, num_rows: Tensor) -> Draft:
        """Propose ``state.width`` codes from slot ``state.length`` on.

        Args:
            state: the decoder's state after the commit.
            logits: ``[G, A, w, V]`` of the iteration that was just decided.
            verdict: its outcome. num_rows: ``[A]`` how many of its rows counted.
        """
        ...

    def select(self, rows: Tensor) -> None:
        """Keep these images (int64 indices), in that order."""
        ...


class JacobiDrafter:
    """Drafts from the previous iteration; slots that were not in the window before are initialised.

    The first code that a fresh slot holds depends on nothing but the seed and the codes before it, so all of them can
    be made ahead: with ``shared_noise`` it is the argmax of the very noise that the draw of this slot will use, which
    repeats that draw far more often than an independent guess (equality rule only, where any proposal is exact).
    """

    num_forwards = 0

    def __init__(self, init: Init, stream: Stream, seeds: Tensor, num_codes: int, *, shared_noise: bool) -> None:
        self.init, self.stream, self.num_codes = init, stream, num_codes
        self.guess = (
            shared_guesses(seeds, stream, num_codes) if shared_noise else uniform_guesses(seeds, stream, num_codes)
        )

    def select(self, rows: Tensor) -> None:
        """Keep these images."""
        self.guess = self.guess[rows]

    def propose(self, state: Any, logits: Tensor, verdict: Verdict, num_rows: Tensor) -> Draft:
        """Shift the outcome of the iteration by what was committed and fill the tail."""
        source = verdict.num_committed[:, None] + torch.arange(state.width, device=logits.device)  # a w'
        carried = source < num_rows[:, None]
        source = source.clamp(max=logits.shape[2] - 1)
        slots = state.window_slots()
        new, new_kind = self._initialise(state, slots, verdict, num_rows)
        new_prob = torch.where(new_kind == Label.POINT, 1.0, 1.0 / self.num_codes)
        fed = (
            torch.arange(state.width, device=logits.device) < state.width - 1
        )  # nobody reads a proposal for the last row
        tokens = torch.where(carried, verdict.tokens.gather(1, source), torch.where(fed, new, -1))
        kind = torch.where(carried, int(Label.ROW), torch.where(fed, new_kind, int(Label.NONE)))
        prob = torch.where(carried, verdict.prob.gather(1, source), new_prob)
        if state.forced is not None:
            tokens, kind, prob = force(state.forced.gather(1, slots), tokens, kind, prob)
        return Draft(tokens, kind.to(torch.int8), prob, source, logits, verdict.stats)

    def _initialise(self, state: Any, slots: Tensor, verdict: Verdict, num_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and labels ``[A, w']`` for slots that no iteration has looked at yet."""
        guess = self.guess.gather(1, slots)
        if self.init == "uniform":
            return guess, torch.full_like(guess, int(Label.UNIFORM))
        known = state.length - verdict.num_committed + num_rows  # a; slots below it are permanent or carried
        if self.init == "repeat_left":
            origin, copied = (known - 1)[:, None].expand_as(slots), self.stream.has_left[slots]
        else:
            up = (slots - known[:, None]).clamp(min=0) // self.stream.stride + 1  # rows up to the nearest known code
            origin = slots - up * self.stream.stride
            copied = self.stream.has_above[slots] & (origin >= 0)
        carried = verdict.tokens.gather(
            1, (origin - known[:, None] + num_rows[:, None]).clamp(0, verdict.tokens.shape[1] - 1)
        )
        permanent = state.slots[state.rows[:, None], origin.clamp(min=0)]
        token = torch.where(permanent >= 0, permanent, carried)
        kind = torch.where(copied, int(Label.POINT), int(Label.UNIFORM))
        return torch.where(copied, token, guess), kind


def force(forced: Tensor, tokens: Tensor, kind: Tensor, prob: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put the codes fixed beforehand (``[A, w]``, -1 where free) into a draft, as point masses."""
    fixed = forced >= 0
    return (
        torch.where(fixed, forced, tokens),
        torch.where(fixed, int(Label.POINT), kind),
        torch.where(fixed, 1.0, prob),
    )


def uniform_guesses(seeds: Tensor, stream: Stream, num_codes: int) -> Tensor:
    """One uniform code for every slot, ``[A, S]`` int64, independent of all other noise of the image."""
    positions = stream.code_index.expand(len(seeds), -1)
    bits = random_bits(seeds, positions, 1, Noise.INIT)[..., 0]
    return bits * num_codes >> 32


def shared_guesses(seeds: Tensor, stream: Stream, num_codes: int) -> Tensor:
    """The code whose noise is largest, ``[A, S]`` int64: the draw of every slot if its law were uniform."""
    positions = stream.code_index.expand(len(seeds), -1)
    return gumbel(seeds, positions, num_codes).argmax(-1)
