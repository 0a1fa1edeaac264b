"""The schedule loop: one forward pass a step, all targets of the step drawn at once, whatever the schedule.

Noise is keyed by the place of a code on its grid, so an image depends on its seed and its settings only. Not covered:
window decoding of causal models (samplers/window/decoder.py) and next-scale models.

Letters: B images, N codes, V codes of the codebook, G guidance branches, g targets of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from vargen.kernels.draw import new_errors, raise_errors
from vargen.outputs import Guarantee, SamplerOutput
from vargen.protocols import Step
from vargen.random import GivenNoise, given_rows
from vargen.samplers.base import GUIDANCE_SCHEDULES, Inputs, Run, Sampler
from vargen.samplers.heads.base import TokenHead
from vargen.samplers.heads.categorical import CategoricalHead
from vargen.samplers.schedule.schedule import DecodeSchedule
from vargen.samplers.state import DecodeState
from vargen.validation.checks import check_choice, check_integer


@dataclass(frozen=True, kw_only=True, eq=False)
class ScheduleInputs(Inputs):
    """What a call may give.

    Args:
        forced_codes: ``[N]`` or ``[B, N]`` codes fixed beforehand, -1 where free: in-painting, or the given frames of a
            video. The distribution of every free code is the backbone's, given the codes drawn or fixed before it.
        schedule: replaces the sampler's own; it is validated, and refused where the backbone cannot run it.
        noise: ``noise(images [A], positions [A, g]) -> [A, g, V]``, Gumbel numbers instead of those of the seeds, so that
            recorded runs of other code replay; a draw is ``argmax(logits + noise)``. ``MaskedSampler``, which draws a position
            in several passes, also hands over the number of the pass; its ``choice_temperature`` keeps the seeds' noise.
    """

    forced_codes: Tensor | None = None
    schedule: DecodeSchedule | None = None
    noise: GivenNoise | None = None


@dataclass(kw_only=True)
class ScheduleState(DecodeState):
    """Everything that changes while a schedule runs; images leave it only if the sampler finishes some early."""

    schedule: DecodeSchedule
    head: TokenHead
    forced: Tensor | None  # [B, N] int64, -1 where free
    errors: Tensor  # [B] record of bad rows, read at the end
    noise: GivenNoise | None = None

    @property
    def next_step(self) -> Step:
        """The step that the next forward pass runs."""
        return self.schedule.steps[self.num_forwards]

    def record(self, rows: Tensor, positions: Tensor, codes: Tensor) -> None:
        """Make ``codes [A, g]`` of the images ``rows [A]`` permanent; called before the forward is counted."""
        self.tokens[rows[:, None], positions] = codes
        self.trace[rows[:, None], positions] = self.num_forwards


@dataclass(frozen=True, kw_only=True)
class ScheduleSampler(Sampler):
    """Base of the samplers that run a decode schedule; concrete ones choose the schedule.

    Args:
        guidance_scale, temperature, top_k, top_p: as in ``Sampler``, for every code on its own.
        guidance_interval: guide only passes before which at most so many codes were drawn; -1 = always
            (``cfg_interval`` of the official code).
        guidance_schedule: ``"constant"``, or ``"linear"`` from 1 at the first code to ``guidance_scale`` at the last.
    """

    guarantee: ClassVar[Guarantee] = "exact"
    inputs_type: ClassVar[type[Inputs]] = ScheduleInputs

    guidance_interval: int = -1
    guidance_schedule: str = "constant"

    def check(self) -> None:
        """Raise ``ValueError`` for a setting out of range."""
        super().check()
        check_integer("guidance_interval", self.guidance_interval, low=-1, hint="-1 is always")
        check_choice("guidance_schedule", self.guidance_schedule, GUIDANCE_SCHEDULES)

    def make_schedule(self, backbone: Any) -> DecodeSchedule:
        """The schedule for a backbone."""
        raise NotImplementedError

    def make_head(self, errors: Tensor) -> TokenHead:
        """What turns the rows of a step into tokens; bad rows are noted in ``errors [B]``."""
        return CategoricalHead(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, errors=errors)

    def guidance_at(self, step: Step, num_codes: int, made: int) -> float:
        """The guidance scale of a pass before which ``made`` of N codes were drawn."""
        if 0 <= self.guidance_interval < step.counted:
            return 1.0
        ramp = made / num_codes if self.guidance_schedule == "linear" else 1.0
        return 1.0 + (self.guidance_scale - 1.0) * ramp

    def begin(self, run: Run, inputs: ScheduleInputs) -> ScheduleState:
        """Choose the schedule and run its first step."""
        backbone, schedule = run.backbone, inputs.schedule
        if schedule is None:
            schedule = self.make_schedule(backbone)
        elif not isinstance(schedule, DecodeSchedule):
            raise ValueError(f"schedule must be a DecodeSchedule or None, got {type(schedule).__name__}")
        else:
            schedule.validate()
        backbone.check_schedule(schedule)
        device, num_images = run.keys.device, len(run.seeds)
        forced = check_forced(inputs.forced_codes, num_images, schedule, int(backbone.codebook_size))
        errors = new_errors(num_images, device)
        empty = torch.full((num_images, schedule.num_codes), -1, dtype=torch.int64, device=device)
        state = ScheduleState(
            backbone=backbone,
            session=backbone.begin(run.condition, schedule),
            seeds=run.seeds,
            keys=run.keys,
            rows=torch.arange(num_images, device=device),
            tokens=empty,
            trace=empty.clone(),
            schedule=schedule.to(device),
            head=self.make_head(errors),
            forced=None if forced is None else forced.to(device),
            errors=errors,
            noise=inputs.noise,
        )
        if state.forced is not None and schedule.prefix:
            first = torch.arange(schedule.prefix, device=device)
            state.record(state.rows, first, state.forced[:, : schedule.prefix])
        if state.forced is not None and schedule.revising:
            state.tokens, state.trace = state.forced.clone(), torch.where(state.forced >= 0, 0, -1)
        return self.step(state)

    @torch.no_grad()
    def step(self, state: ScheduleState) -> ScheduleState:
        """Spend one forward pass and draw its targets. Advances the state in place."""
        if state.done:
            return state
        step = state.next_step
        self.decide(state, step, state.backbone.run_items(state.session, step, state.tokens[state.rows]))
        state.num_forwards += 1
        state.done = state.done or state.num_forwards == len(state.schedule.steps)
        return state

    def decide(self, state: ScheduleState, step: Step, rows: Tensor) -> None:
        """Draw a token a target from ``rows [G, A, g, V]`` and record them; fixed codes as they are."""
        made = sum(state.schedule.group_sizes[: state.num_forwards])
        scale = self.guidance_at(step, state.schedule.num_codes, made)
        rows = rows[:1] if scale == 1.0 else rows
        fixed = None if state.forced is None else state.forced[state.rows][:, step.targets]
        if fixed is not None:  # the distribution of a fixed code is never read
            rows = torch.where((fixed >= 0)[None, :, :, None], 0.0, rows)
        positions, head = step.targets.expand(rows.shape[1], -1), state.head
        if state.noise is not None:
            head = replace(cast(Any, head), noise=given_rows(state.noise, state.rows, positions, rows.shape[-1]))
        tokens = head.draw(rows, state.keys, positions, scale)
        state.record(state.rows, step.targets, tokens if fixed is None else torch.where(fixed >= 0, fixed, tokens))

    def finish(self, state: ScheduleState) -> SamplerOutput:
        """Collect codes and statistics; rows that could not be drawn from are named."""
        raise_errors(state.errors)
        return super().finish(state)


def check_forced(
    forced: Tensor | None, num_images: int, schedule: DecodeSchedule, codebook_size: int
) -> Tensor | None:
    """Return codes fixed beforehand as ``[B, N]`` int64, -1 where free.

    Raises:
        ValueError: wrong shape or type, a code outside -1..V-1, or a prefix that the schedule needs is missing.
    """
    num_codes = schedule.num_codes
    if forced is None:
        if schedule.prefix:
            raise ValueError(
                f"schedule {schedule.kind!r} continues {schedule.prefix} given codes; pass them as forced_codes"
            )
        return None
    codes = torch.as_tensor(forced)
    if (
        codes.is_floating_point()
        or codes.dtype == torch.bool
        or codes.shape not in ((num_codes,), (num_images, num_codes))
    ):
        got = f"{codes.dtype} {list(codes.shape)}"
        raise ValueError(f"forced_codes must be integers [{num_codes}] or [{num_images}, {num_codes}], got {got}")
    if bool(((codes < -1) | (codes >= codebook_size)).any()):
        raise ValueError(f"forced_codes must lie in 0..{codebook_size - 1}, or be -1 where free")
    codes = codes.long().expand(num_images, -1)
    if bool((codes[:, : schedule.prefix] < 0).any()):
        raise ValueError(
            f"forced_codes must hold the first {schedule.prefix} codes, which {schedule.kind!r} continues"
        )
    return codes
