"""Masked decoding: all codes at once, the surest ones stay, the others are guessed again (MaskGIT, arXiv:2202.04200).

Which codes stay is a rule of settings: a share that grows with the passes (MaskGIT's cosine, Dimple's line, equal
shares), all codes above a confidence (Dimple, Yu et al., 2025, arXiv:2505.16990), and everything once the model is sure
(Prophet, Li et al., 2025, arXiv:2508.19982). Every image follows its own confidences; images that are complete leave the
batch.

Letters: B images, A images still decoded, N codes, S passes, V codes of the codebook, G guidance branches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.kernels.draw import draw
from vargen.kernels.warp import combine
from vargen.outputs import Guarantee
from vargen.protocols import Step
from vargen.random import Stream, given_rows, gumbel
from vargen.samplers.schedule.decoder import ScheduleSampler, ScheduleState
from vargen.samplers.schedule.schedule import DecodeSchedule
from vargen.validation.checks import check_choice, check_integer, check_number

SHARES = ("cosine", "linear", "even")
CONFIDENCES = ("probability", "margin", "entropy")
LAST_TIME = 1e-3  # where Dimple's line of times ends
PHASES = (0.33, 0.67)  # progress at which Prophet's threshold falls


@dataclass(frozen=True, kw_only=True)
class MaskedSampler(ScheduleSampler):
    """Draw by confidence in at most ``num_steps`` passes.

    Codes of a pass are drawn independently of each other, so their distribution is not the backbone's.

    Args:
        guidance_scale, temperature, top_k, top_p, guidance_interval, guidance_schedule: as in ``ScheduleSampler``.
        num_steps: S, passes at most.
        share: how many codes a pass keeps: ``"cosine"`` (MaskGIT: few at first), ``"linear"`` (Dimple) or ``"even"``.
        confidence: of a drawn code, from the guided distribution without temperature: its ``"probability"``, the ``"margin"``
            between the two largest probabilities, or the ``"entropy"`` (small is sure).
        choice_temperature: Gumbel noise on the confidences, times the share of passes left; MaskGIT uses 4.5.
        commit_threshold: keep every code surer than this at once (entropy: below it); the share counts only where none
            is. ``None`` is off. Calibrate it: large codebooks rarely reach Dimple's 0.95.
        early_commit: keep everything when the mean gap between the two largest guided logits of the masked codes reaches
            a threshold: three numbers, for the first, second and last third of the passes. Prophet uses
            ``(7.5, 5.0, 2.5)``; ``None`` is off.

    Example:
        >>> MaskedSampler(num_steps=12, commit_threshold=0.9).guarantee
        'heuristic'
    """

    guarantee: ClassVar[Guarantee] = "heuristic"
    required_features: ClassVar[frozenset[str]] = frozenset({Feature.MASKED})

    num_steps: int = 12
    share: str = "cosine"
    confidence: str = "probability"
    choice_temperature: float = 0.0
    commit_threshold: float | None = None
    early_commit: Sequence[float] | None = None

    def check(self) -> None:
        """Raise ``ValueError`` for a setting out of range."""
        super().check()
        check_integer("num_steps", self.num_steps, low=1)
        check_choice("share", self.share, SHARES)
        check_choice("confidence", self.confidence, CONFIDENCES)
        check_number("choice_temperature", self.choice_temperature, low=0.0, hint="0 is off")
        if self.commit_threshold is not None:
            check_number("commit_threshold", self.commit_threshold, low=0.0, hint="None is off")
        if self.early_commit is not None:
            if len(self.early_commit) != len(PHASES) + 1:
                raise ValueError(f"early_commit must be {len(PHASES) + 1} thresholds or None, got {self.early_commit}")
            for value in self.early_commit:
                check_number("early_commit", value, low=0.0, hint="None is off")
            object.__setattr__(self, "early_commit", tuple(self.early_commit))  # a stored configuration holds a list

    def make_schedule(self, backbone: Any) -> DecodeSchedule:
        """S passes over all codes."""
        num_codes = int(backbone.num_codes)
        check_integer("num_steps", self.num_steps, low=1, high=num_codes, hint=f"the grid has {num_codes} codes")
        return _passes(tuple(backbone.grid_size), int(self.num_steps), int(backbone.num_condition_tokens))

    def decide(self, state: ScheduleState, step: Step, logits: Tensor) -> None:
        """Guess the masked codes and keep the surest."""
        masked = state.tokens[state.rows] < 0  # A N
        made = int((~masked).sum(-1).min())
        scale = self.guidance_at(step, state.schedule.num_codes, made)
        logits = logits[:1] if scale == 1.0 else logits
        now = torch.full_like(state.rows, state.num_forwards)
        positions, noise = step.targets.expand(len(masked), -1), None
        if state.noise is not None:
            noise = given_rows(state.noise, state.rows, positions, logits.shape[-1], state.num_forwards)
        guesses = draw(
            logits,
            seeds=state.keys,
            positions=positions,
            noise=noise,
            guidance_scale=scale,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stream=Stream.FRESH,
            iteration=now,
        )
        guided = combine(logits, scale, 1.0)  # A N V
        kept = self._keep(state, masked, self._confidences(guided, guesses), now)
        if self.early_commit is not None:
            kept = torch.where(self._sure(state, guided, masked)[:, None], masked, kept)
        state.tokens[state.rows] = torch.where(kept, guesses, state.tokens[state.rows])
        state.trace[state.rows] = torch.where(kept, state.num_forwards, state.trace[state.rows])
        left = (masked & ~kept).any(-1)
        if not bool(left.all()):
            state.rows, state.keys = state.rows[left], state.keys[left]
            state.done = len(state.rows) == 0
            if not state.done:
                state.backbone.select(state.session, left.nonzero().flatten())

    def num_kept(self, masked: int, free: int, number: int, num_passes: int) -> int:
        """How many of the ``masked`` codes pass ``number`` (from 0) keeps; ``free`` were masked at the beginning."""
        if number == num_passes - 1 or masked <= 1:
            return masked
        if self.share == "linear":
            return _line_share(masked, masked / free, number, num_passes)
        if self.share == "even":
            return min(masked, max(1, free // num_passes + (number < free % num_passes)))
        stay = int(free * math.cos(math.pi / 2 * (number + 1) / num_passes))
        return masked - max(1, min(stay, masked - 1))

    def monitored(self, masked: Tensor) -> Tensor:
        """[A, N] the codes whose logits ``early_commit`` looks at."""
        return masked

    def _confidences(self, guided: Tensor, guesses: Tensor) -> Tensor:
        """[A, N], larger is surer: log-probability, margin or negative entropy."""
        logs = guided.log_softmax(-1)
        if self.confidence == "probability":
            return logs.gather(-1, guesses[..., None])[..., 0]
        probabilities = logs.exp()
        if self.confidence == "margin":
            first, second = probabilities.topk(2, dim=-1).values.unbind(-1)
            return first - second
        return (probabilities * logs.clamp(min=torch.finfo(logs.dtype).min)).sum(-1)

    def _keep(self, state: ScheduleState, masked: Tensor, confidence: Tensor, now: Tensor) -> Tensor:
        """[A, N] bool: which guesses stay."""
        number, num_passes = state.num_forwards, len(state.schedule.steps)
        free = torch.full_like(now, masked.shape[1])
        if state.forced is not None:
            free = (state.forced[state.rows] < 0).sum(-1)
        counts = [
            self.num_kept(m, f, number, num_passes)
            for m, f in zip(masked.sum(-1).tolist(), free.tolist(), strict=True)
        ]
        score = confidence
        if self.choice_temperature > 0:
            places = torch.arange(masked.shape[1], device=masked.device).expand(len(masked), -1)
            noise = gumbel(state.keys, places, 1, Stream.MASK, now)[..., 0]
            score = score + self.choice_temperature * (1 - (number + 1) / num_passes) * noise
        order = torch.argsort(score.masked_fill(~masked, -math.inf), dim=-1, descending=True, stable=True)
        rank = order.argsort(-1)
        kept = masked & (rank < torch.tensor(counts, device=rank.device)[:, None])
        if self.commit_threshold is None or number == num_passes - 1:
            return kept
        sure = masked & (confidence > self._bar())
        return torch.where(sure.any(-1, keepdim=True), sure, kept)

    def _bar(self) -> float:
        """``commit_threshold`` on the scale of the confidences."""
        assert self.commit_threshold is not None
        if self.confidence == "probability":
            return math.log(self.commit_threshold) if self.commit_threshold > 0 else -math.inf
        return -self.commit_threshold if self.confidence == "entropy" else self.commit_threshold

    def _sure(self, state: ScheduleState, guided: Tensor, masked: Tensor) -> Tensor:
        """[A] bool: the model is sure of everything that is left."""
        assert self.early_commit is not None
        first, second = guided.topk(2, dim=-1).values.unbind(-1)
        looked = self.monitored(masked)
        gap = ((first - second) * looked).sum(-1) / looked.sum(-1)
        progress = (state.num_forwards + 1) / len(state.schedule.steps)  # this pass included, as in the released loop
        return gap >= self.early_commit[sum(progress >= phase for phase in PHASES)]


def _line_share(masked: int, ratio: float, number: int, num_passes: int) -> int:
    """Dimple's count: times fall on a line from 1 to nearly 0, start at the first one below the masked share."""
    times = torch.linspace(1, LAST_TIME, num_passes + 1, dtype=torch.float32).tolist()
    start = max(next((i for i, time in enumerate(times) if time < ratio), num_passes), number + 1)
    for i in range(start, num_passes + 1):
        count = masked if i == num_passes else int(masked * (1 - times[i] / ratio))
        if count >= 1:
            return count
    return masked


@lru_cache(maxsize=16)
def _passes(grid_size: tuple[int, ...], num_steps: int, num_condition: int) -> DecodeSchedule:
    return DecodeSchedule.maskgit(grid_size, num_steps, num_condition)
