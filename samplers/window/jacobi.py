"""Speculative Jacobi decoding (Teng et al., 2024, arXiv:2410.01699) and its coupled forms (So et al., 2025, arXiv:2510.24211).

Drafts come from the sampler's own previous iteration; no draft model is used and nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vargen.outputs import SamplerOutput
from vargen.samplers.acceptance.base import Rule
from vargen.samplers.acceptance.rejection import Rejection
from vargen.samplers.acceptance.shared_noise import SharedNoise
from vargen.samplers.base import Run
from vargen.samplers.drafters.base import Drafter
from vargen.samplers.drafters.jacobi import INITS, Init, JacobiDrafter, shared_guesses
from vargen.samplers.drafters.memory import MemoryDrafter
from vargen.samplers.window.controller import AutoController, WidthController
from vargen.samplers.window.decoder import WindowInputs, WindowSampler, WindowState
from vargen.samplers.window.fixed import WINDOW, chosen_window
from vargen.samplers.window.layout import SlotLayout
from vargen.samplers.window.widths import Widths, check_rule, open_widths, read_widths, widest
from vargen.validation.checks import check_choice

RULES = ("shared-noise", "maximal", "independent")


@dataclass(frozen=True, kw_only=True)
class SpeculativeJacobiSampler(WindowSampler):
    """Score a window of guesses at once, keep the prefix that proves right, guess again from what was seen.

    Exact for every setting: the codes follow the distribution of next-token sampling.

    Args:
        window: W, codes scored in one forward pass. Wider windows need fewer passes and more work in each. None takes "auto"
            where codes do not depend on the width (float32, or ``row_invariant=True``) and else a width from a table of device
            and images (``samplers/window/fixed.py``), so that a seed gives one picture; ``stats.notes`` says which. ``"auto"`` takes
            for every pass the width with the most expected codes per second, from what the run has seen so far; a list,
            such as ``stats.widths`` of an earlier run, gives the width of each pass behind the first; an object with the
            methods of ``samplers.window.controller.WidthController`` chooses by rules of its own. These three are for rule
            ``"shared-noise"``, whose codes do not depend on widths.
        rule: what becomes of a row that cannot be committed yet. ``"shared-noise"`` draws it with the noise of its
            position and commits while the draw repeats the guess: the result is, code for code, that of
            ``NextTokenSampler`` with the same seed. ``"maximal"`` changes a guess as rarely as its distribution allows.
            ``"independent"`` draws it anew (the published rule); it gains little from windows above 16.
        init: first guess for a slot that enters the window: ``"uniform"``, ``"repeat_left"`` (the last known code) or
            ``"repeat_above"`` (the code in the row above). ``"auto"`` takes, where the width changes, the one of these that
            would have been right most often in the image so far, else "uniform".
    """

    replayable: ClassVar[bool] = True

    window: int | str | Sequence[int] | WidthController | None = None
    rule: Literal["shared-noise", "maximal", "independent"] = "shared-noise"
    init: Init = "auto"

    def check(self) -> None:
        """Check the shared settings, the window, the rule and the initialiser."""
        super().check()
        check_choice("rule", self.rule, RULES)
        if self.window is not None:
            object.__setattr__(self, "window", read_widths("window", self.window, low=1))
            check_rule("window", self.window, self.rule)
        check_choice("init", self.init, INITS)

    @property
    def num_rows(self) -> int:
        """W, the most where it changes."""
        return widest("auto" if self.window is None else self.window)

    def begin(self, run: Run, inputs: WindowInputs) -> WindowState:
        """Run the condition and commit the first code; a sampler without a window takes one for the run."""
        if self.window is not None:
            return super().begin(run, inputs)
        window, why = chosen_window(self.rule, self.row_invariant, run.backbone, len(run.seeds))
        if inputs.cuda_graph and window == "auto":  # which no graph replays
            window, why = WINDOW, f"window={WINDOW}: cuda_graph=True needs a fixed width"
        chosen = self.replace(window=window)
        state = chosen.begin(run, inputs)
        state.sampler = chosen
        state.notes.append(why)
        return state

    def step(self, state: WindowState) -> WindowState:
        """Score the drafts in one forward pass, commit, draft again."""
        return super().step(state) if state.sampler is None else WindowSampler.step(state.sampler, state)

    def finish(self, state: WindowState) -> SamplerOutput:
        """Collect codes and statistics."""
        return super().finish(state) if state.sampler is None else WindowSampler.finish(state.sampler, state)

    def make_widths(self, run: Run, layout: SlotLayout) -> Widths | None:
        """Who chooses, unless the window is a number."""
        auto = AutoController(known=run.backbone, kind=int(run.condition.branches))
        return open_widths("window", self.window, auto, run, layout.num_slots, int(run.backbone.codebook_size))

    def make_rule(self, run: Run, inputs: Any) -> Rule:
        """The rule of that name."""
        return SharedNoise() if self.rule == "shared-noise" else Rejection(self.rule)

    def make_drafter(self, state: WindowState, drafter: Any, condition: Any) -> Drafter:
        """Draft from the previous iteration."""
        if state.widths is not None:
            return MemoryDrafter(self.init)
        shared = self.rule == "shared-noise" and self.temperature > 0
        return JacobiDrafter(self.init, shared_guesses(state) if shared else None)
