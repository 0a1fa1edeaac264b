"""Speculative Jacobi decoding of continuous tokens: no drafter, nothing trained.

Once the noise of its chain is fixed by seed and position, a token is a smooth function of the tokens before it. So a window of
guesses is scored in one forward pass, all their chains are run with their own fixed noise, and the tokens are permanent up to and
including the first whose input had moved: everything before it was computed from what the pass before had put there. This
library's own; the discrete form is that of So et al., 2025 (arXiv:2510.24211).

It has a loop of its own, a short one, for the reasons given in ``continuous_speculative``.

Letters: B images, A images still decoded, N tokens, D numbers of a token, W window, w rows of this iteration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.outputs import Guarantee, SamplerOutput
from vargen.samplers.base import Inputs, Run
from vargen.samplers.heads.diffusion import ChainHead, ContinuousSampler, work_dtype
from vargen.samplers.state import DecodeState
from vargen.samplers.window.controller import CHAINS, SETTLING, AutoController, ByAge, WidthController
from vargen.samplers.window.widths import Widths, open_widths, read_widths, widest
from vargen.validation.checks import check_number

BY_BATCH = "by-batch"
# images at most, W: fast on a CPU core (benchmarks/results/continuous_jacobi.json); larger batches gain nothing
WIDTH_BY_BATCH = ((1, 64), (2, 32), (4, 12))


class _Guarantee:
    """``ContinuousJacobiSampler.guarantee``: exact at tolerance 0; of the class the one of its default."""

    def __get__(self, sampler: ContinuousJacobiSampler | None, owner: type) -> Guarantee:
        return "exact" if sampler is not None and sampler.tolerance == 0 else "heuristic"


@dataclass(kw_only=True)
class JacobiState(DecodeState):
    """Everything that changes while windows of continuous tokens settle."""

    head: ChainHead
    length: Tensor  # [A] int64 tokens permanent
    guesses: Tensor  # [A, N, D] what every slot holds: permanent tokens, then guesses
    seen: Tensor  # [A, N] int64 how often a slot was drawn
    width: int  # w of the next iteration
    most: int  # W
    widths: Widths | None  # who chooses it
    used: list[int] = field(default_factory=list)
    moved: float = 0.0  # largest change of a number that a permanent token stands on unseen


@dataclass(frozen=True, kw_only=True)
class ContinuousJacobiSampler(ContinuousSampler):
    """Draw a window of tokens from guesses of those before them, keep those that stand on what has settled, go on.

    Tokens are those of next-token decoding with the same seed (``ContinuousSpeculativeSampler(num_draft_tokens=0)``): exactly, up
    to rounding, at tolerance 0, else nearly.

    Args:
        guidance_scale, temperature, guidance_schedule, num_diffusion_steps: as in ``ContinuousSampler``.
        window: W, tokens scored in one forward pass: a number, ``"auto"``, a list or a controller, as in
            ``SpeculativeJacobiSampler``. All rows of a window run their chains, which cost more than the backbone. ``"by-batch"``
            takes a number by how many images are drawn together, so that two equal calls agree to the last bit: "auto" goes by
            the clock, and above tolerance 0 the last digits of tokens follow the widths.
        tolerance: a token has settled when no number of it changed by more than this from one pass to the next. 0 waits until
            nothing changes and is exact; above it the guarantee is heuristic, and ``stats.extra["largest_change"]`` says the
            largest change that was let pass.
        final_noise: the last step of a chain adds its noise, as in ``ContinuousSpeculativeSampler``.

    Example:
        >>> ContinuousJacobiSampler(tolerance=0.0).guarantee
        'exact'
    """

    guarantee: ClassVar[Guarantee] = _Guarantee()  # type: ignore[assignment]
    required_features: ClassVar[frozenset[str]] = frozenset({Feature.CONTINUOUS, Feature.CONTINUOUS_WINDOW})

    window: int | str | Sequence[int] | WidthController = 32
    tolerance: float = 1e-4
    final_noise: bool = True

    def check(self) -> None:
        """Raise ``ValueError`` for a setting out of range."""
        super().check()
        if self.window != BY_BATCH:
            object.__setattr__(self, "window", read_widths("window", self.window, low=1))
        check_number("tolerance", self.tolerance, low=0.0, hint="0 is exact")

    @torch.no_grad()
    def begin(self, run: Run, inputs: Inputs) -> JacobiState:
        """Run the condition and draw the first token."""
        backbone, keys = run.backbone, run.keys
        shape = (len(run.seeds), backbone.num_codes, backbone.token_dim)
        head = ChainHead(
            net=backbone.head,
            chain=backbone.head.diffusion(self.num_diffusion_steps),
            dtype=work_dtype(backbone),
            temperature=self.temperature,
            final_noise=self.final_noise,
        )
        auto = AutoController(ByAge(SETTLING), CHAINS, known=backbone, kind=("chains", int(run.condition.branches)))
        window = self._chosen(shape[0])
        widths = open_widths("window", window, auto, run, shape[1], shape[2])
        most = min(widest(window), shape[1]) if widths is None else widths.most
        session, out = backbone.open(run.condition, max_window=most)
        state = JacobiState(
            backbone=backbone,
            session=session,
            seeds=run.seeds,
            keys=keys,
            rows=torch.arange(shape[0], device=keys.device),
            tokens=torch.full(shape, math.nan, dtype=head.dtype, device=keys.device),
            trace=torch.full(shape[:2], -1, device=keys.device),
            head=head,
            length=torch.zeros_like(keys),
            guesses=torch.zeros(shape, dtype=head.dtype, device=keys.device),
            seen=torch.zeros(shape[:2], dtype=torch.int64, device=keys.device),
            width=1,
            most=most,
            widths=widths,
        )
        ones = torch.ones_like(keys)
        first = self._draw(state, out.logits[:, :, -1:], state.length[:, None])
        state.guesses[:] = first  # the last token is the guess of all that the model has not drawn
        self._commit(state, first, state.length[:, None], ones)
        if widths is not None:
            widths.pause()
        return state

    @torch.no_grad()
    def step(self, state: JacobiState) -> JacobiState:
        """Score the guesses in one forward pass, run their chains, commit what has settled. Advances the state in place."""
        state.used.append(state.width)
        if state.widths is not None:
            state.widths.resume()
        if state.width == 1:
            self._commit_one(state)
        else:
            self._commit_window(state)
        if state.widths is not None:
            state.widths.pause()
        return state

    def _commit_one(self, state: JacobiState) -> None:
        """Next-token decoding: nothing is guessed, so nothing is compared."""
        slots, image = state.length, torch.arange(len(state.keys), device=state.keys.device)
        z = state.backbone.step(state.session, state.guesses[image, slots - 1][:, None]).logits
        tokens = self._draw(state, z, slots[:, None])[:, 0]
        state.guesses[image, slots], state.tokens[state.rows, slots] = tokens, tokens
        state.trace[state.rows, slots] = state.num_forwards
        state.seen[image, slots] += 1
        state.backbone.commit(state.session, 1)
        state.length, state.num_forwards = slots + 1, state.num_forwards + 1
        self._look(state, state.tokens.shape[1])

    def _commit_window(self, state: JacobiState) -> None:
        num, image = state.tokens.shape[1], torch.arange(len(state.keys), device=state.keys.device)[:, None]
        ahead = state.length[:, None] + torch.arange(state.width, device=image.device)  # A w
        slots = ahead.clamp(max=num - 1)
        fed = state.guesses[image, (ahead - 1).clamp(max=num - 1)]  # A w D: entry j is the token before slot j
        z = state.backbone.step(state.session, fed).logits
        tokens = self._draw(state, z, slots)
        change = (tokens - state.guesses[image, slots]).abs().amax(-1)  # A w
        settled = (change <= self.tolerance) & (ahead < num)
        # row j stands on the guesses before it, so the first that moved is the last that is right
        kept = settled.long().cumprod(1)
        count = torch.minimum(kept.sum(1) + 1, num - state.length).clamp(max=state.width)
        passed = (kept > 0) & (torch.arange(state.width, device=image.device) < count[:, None] - 1)
        state.moved = max(state.moved, float(change.where(passed, 0.0).amax()))
        self._commit(state, tokens, ahead, count, settled)

    def finish(self, state: JacobiState) -> SamplerOutput:
        """Return the tokens ``[B, N, D]`` and statistics; ``stats.extra["largest_change"]`` is what tolerance let pass."""
        state.num_head_rows, state.counts["largest_change"] = state.head.num_rows, state.moved
        if self.tolerance > 0:
            state.notes = [
                f"tokens were kept that stand on others which still moved by up to {state.moved:.1e}, "
                f"below the tolerance of {self.tolerance:g}; tolerance=0 waits for them"
            ]
        out = super().finish(state)
        out.stats.widths = list(state.used)
        return out

    def _chosen(self, num_images: int) -> Any:
        """The window of a batch."""
        if self.window != BY_BATCH:
            return self.window
        return next((width for most, width in WIDTH_BY_BATCH if num_images <= most), 1)

    def _draw(self, state: JacobiState, z: Tensor, slots: Tensor) -> Tensor:
        """Tokens ``[A, w, D]`` for states ``[G, A, w, Z]``, by chains whose noise belongs to ``slots [A, w]``."""
        return state.head.draw(z, state.keys, slots, self.guidance_at(slots + 1, state.tokens.shape[1]))

    def _commit(
        self, state: JacobiState, tokens: Tensor, slots: Tensor, count: Tensor, settled: Tensor | None = None
    ) -> None:
        """Make the first ``count [A]`` of ``tokens [A, w, D]`` permanent, remember the others, drop images that are complete."""
        num = state.tokens.shape[1]
        offset = torch.arange(tokens.shape[1], device=slots.device)
        permanent = offset < count[:, None]  # A w
        if state.widths is not None and settled is not None:
            state.widths.add(state.seen.gather(1, slots.clamp(max=num - 1)), permanent, permanent & settled)
        image, item = (slots < num).nonzero().unbind(1)
        state.guesses[image, slots[image, item]] = tokens[image, item]
        state.seen[image, slots[image, item]] += 1
        image, item = permanent.nonzero().unbind(1)
        state.tokens[state.rows[image], slots[image, item]] = tokens[image, item]
        state.trace[state.rows[image], slots[image, item]] = state.num_forwards
        if state.num_forwards:  # the prefill feeds no token
            state.backbone.commit(state.session, count)
        state.length, state.num_forwards = state.length + count, state.num_forwards + 1
        self._look(state, num)

    def _look(self, state: JacobiState, num: int) -> None:
        """Drop complete images, choose the next width, fill the slots that enter."""
        left = num - state.length
        most = int(left.max())
        state.done = most == 0
        width = min(state.most, most) if state.widths is None else state.widths.next(state, most)
        if state.done:
            return
        state.width = width
        if not bool((left > 0).all()):
            keep = (left > 0).nonzero().flatten()
            state.rows, state.keys, state.length = state.rows[keep], state.keys[keep], state.length[keep]
            state.guesses, state.seen = state.guesses[keep], state.seen[keep]
            state.backbone.select(state.session, keep)
        if width == 1:
            return
        # a slot that the model has not drawn is guessed to repeat the one above, or the last permanent one
        image = torch.arange(len(state.keys), device=left.device)[:, None]
        slots = (state.length[:, None] + torch.arange(width, device=left.device)).clamp(max=num - 1)
        above = slots - state.backbone.grid_size[1]
        known = (above >= 0) & (state.seen.gather(1, above.clamp(min=0)) > 0)
        source = torch.where(known, above, state.length[:, None] - 1)
        fresh = (state.seen.gather(1, slots) == 0)[..., None]
        state.guesses[image, slots] = torch.where(fresh, state.guesses[image, source], state.guesses[image, slots])
