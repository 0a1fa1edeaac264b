"""The window decoder: every sampler for causal backbones, next-token included, is a drafter and an acceptance rule here.

One iteration scores a window of W proposals in one forward pass. Entry j of the window is the proposal for slot
``length + j`` and row j of the logits is the law of that same slot, given the permanent codes and the proposals before
it. The rule decides how many rows become permanent, at least one; the drafter proposes again for the others. Images
advance raggedly, each by its own count, and leave the batch when they are complete. Next-token sampling is W = 1.

Trees of proposals take the same path with another score and another rule (samplers/window/trees.py). Not covered: backbones
without a causal session.

Letters: B images of the call, A images still decoded, N code positions, S slots that need a decision, V codes,
W window, w rows of this iteration, G guidance branches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.kernels.draw import draw, new_errors, raise_errors
from vargen.kernels.verify.types import Draft
from vargen.outputs import SamplerOutput
from vargen.random import GivenNoise, GumbelCache, NoiseRows
from vargen.samplers.acceptance.base import Noise, Rows, Rule
from vargen.samplers.acceptance.shared_noise import SharedNoise
from vargen.samplers.base import Inputs, Run, Sampler
from vargen.samplers.drafters.base import Drafter
from vargen.samplers.window.cuda_graph import Replay, obstacle
from vargen.samplers.window.layout import SlotLayout, forced_slots
from vargen.samplers.window.state import WindowState
from vargen.samplers.window.widths import POLL_EVERY, Widths, commit_one
from vargen.validation.checks import check_flag, check_integer

__all__ = ["WindowInputs", "WindowSampler", "WindowState"]

NOISE_BLOCK = 1 << 18  # Gumbel numbers made at once on the CPU for next-token sampling, which reads each row once
GIVEN_BLOCK = 16  # positions for which a call's own noise is asked at once by next-token sampling
NOISE_CACHE = 1 << 25  # Gumbel numbers kept on the CPU for window decoding, which reads each row many times
HALVES = (torch.bfloat16, torch.float16)
ROUNDED = (
    "widths follow the clock, and in half precision logits depend on them a little: two runs with one seed may differ; give "
    "stats.widths as the window to repeat this one"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowInputs(Inputs):
    """What a call may give.

    Args:
        forced_codes: ``[N]`` or ``[B, N]`` codes fixed beforehand, -1 where free. A fixed prefix continues an image; the
            distribution of every free code is the backbone's, given all codes before it.
        cuda_graph: replay iterations as a CUDA graph: None = wherever that is possible, False = never, True = refuse to
            run without. Complete images then stay in the batch until all are complete.
        noise: ``noise(images [A], positions [A, W]) -> [A, W, V]``, Gumbel numbers instead of those of the seeds, so that
            recorded runs of other code replay; a draw is ``argmax(logits + noise)``. For the rule "shared-noise".
    """

    forced_codes: Tensor | None = None
    cuda_graph: bool | None = None
    noise: GivenNoise | None = None


@dataclass(frozen=True, kw_only=True)
class WindowSampler(Sampler):
    """Base of the samplers that decode by windows; concrete ones choose a drafter and a rule.

    Args:
        guidance_interval: I, guide the first code and the I + 1 behind it, later ones follow the conditional branch alone; -1 =
            all are guided (``cfg_interval`` of LlamaGen, which counts the codes behind the first from 0).
        top_p_first: measure top-p on the whole distribution and keep of its codes the ``top_k`` likeliest, as LANTERN's code does;
            otherwise top-k comes first, and top-p counts what it left (LlamaGen, VAR, transformers).
        row_invariant: logits do not depend on how many rows or images share a forward pass, so the codes of the shared-noise
            rule are next-token's (run with the same setting) in every dtype. Slower: see ``docs/samplers.md``.
    """

    required_features: ClassVar[frozenset[str]] = frozenset({Feature.WINDOW, Feature.RAGGED})
    inputs_type: ClassVar[type[Inputs]] = WindowInputs
    replayable: ClassVar[bool] = False  # an iteration has fixed shapes and reads nothing back

    guidance_interval: int = -1
    top_p_first: bool = False
    row_invariant: bool = False

    def check(self) -> None:
        """Check the shared settings, the interval and the flags."""
        super().check()
        check_integer("guidance_interval", self.guidance_interval, low=-1, hint="-1 is always")
        check_flag("top_p_first", self.top_p_first)
        check_flag("row_invariant", self.row_invariant)

    @property
    def num_rows(self) -> int:
        """W, the rows of one forward pass; 1 is next-token sampling."""
        return 1

    @property
    def reach(self) -> int:
        """Most codes that one iteration makes permanent; less than ``num_rows`` where proposals form a tree."""
        return self.num_rows

    def make_widths(self, run: Run, layout: SlotLayout) -> Widths | None:
        """Return who chooses the width of every iteration; None = all have the same."""
        return None

    def make_rule(self, run: Run, inputs: Any) -> Rule:
        """Return the acceptance rule of one run; ``inputs`` is of ``inputs_type``."""
        return SharedNoise()

    def make_drafter(self, state: WindowState, drafter: Any, condition: Any) -> Drafter | None:
        """Return the drafter of one run; None proposes nothing, which is right for W = 1 only."""
        return None

    def reads_hidden(self, drafter: Any) -> bool:
        """Whether the run needs the backbone's hidden states."""
        return False

    @property
    def warp(self) -> dict[str, Any]:
        """The shared settings as keyword arguments of the kernels."""
        return {
            "guidance_scale": self.guidance_scale,
            "temperature": self.temperature,
            "top_k": -self.top_k if self.top_p_first else self.top_k,  # how the kernels tell the order
            "top_p": self.top_p,
        }

    @torch.no_grad()
    def begin(self, run: Run, inputs: WindowInputs) -> WindowState:
        """Run the condition and commit the first code."""
        backbone = run.backbone
        rule = self.make_rule(run, inputs)
        table, structural = SlotLayout.of(backbone)
        widths = self.make_widths(run, table)
        if self.row_invariant and Feature.ROW_INVARIANT not in backbone.features:
            raise ValueError(f"{type(backbone).__name__} offers no row_invariant passes; leave row_invariant=False")
        fixed = "row_invariant=True takes passes apart" if self.row_invariant else None
        reason = "widths change from iteration to iteration; give a number instead" if widths else None
        reason = reason if inputs.noise is None else "noise is given"
        reason = "switched off" if inputs.cuda_graph is False else reason or fixed or obstacle(self, backbone)
        if inputs.noise is not None:
            self._check_replayed(rule)
        if inputs.cuda_graph and reason is not None:
            raise ValueError(f"cuda_graph=True is not possible: {reason}; leave it out or take cuda_graph=None")
        forced = forced_slots(inputs.forced_codes, structural, table, len(run.seeds), int(backbone.codebook_size))
        options = {"hidden": True} if self.reads_hidden(run.drafter) else {}
        options |= {"static": True} if reason is None else {}
        options |= {"row_invariant": True} if self.row_invariant else {}
        most = self._rows_at_once(table) if widths is None else widths.most
        session, out = backbone.open(run.condition, max_window=most, **options)
        state = self._first_state(run, session, table.to(out.logits.device), out.logits.shape[-1], widths)
        state.forced = None if forced is None else forced.to(out.logits.device)
        state.hidden = out.hidden
        state.noise = None if reason is None else state.noise  # a replay makes its own
        if inputs.noise is not None:
            held, size = min(max(self.reach, GIVEN_BLOCK), table.num_slots), out.logits.shape[-1]
            state.noise = NoiseRows(inputs.noise, len(run.seeds), held, size, run.keys.device)
        state.rule = rule.first
        if widths is not None and widths.by_clock and self._depends_on_rows(backbone):
            state.notes.append(ROUNDED)
        if self.num_rows > 1:
            state.drafter = self.make_drafter(state, run.drafter, run.given)
        self._decide(state, out.logits.expand(-1, -1, state.width, -1))  # the prefill has one row, of slot 0
        state.rule = rule
        if reason is None and not state.done:
            state.replay = Replay(state, labels=rule != SharedNoise() and self.temperature > 0)
        elif inputs.cuda_graph is None and out.logits.is_cuda and reason is not None:
            state.notes.append(f"iterations are not replayed as a CUDA graph: {reason}")
        if widths is not None:
            widths.pause()
        return state

    def _check_replayed(self, rule: Rule) -> None:
        if rule != SharedNoise():
            raise ValueError(
                f"noise replays the draws of NextTokenSampler and of the rule 'shared-noise' over windows; {type(self).__name__} "
                "as it is set draws in another way, leave noise out"
            )

    def _rows_at_once(self, layout: SlotLayout) -> int:
        """Rows that a session must have room for: a window reaches no further than the image, a tree has its own size."""
        return self.num_rows if self.num_rows > self.reach else min(self.num_rows, layout.num_slots)

    def step(self, state: WindowState) -> WindowState:
        """Score the drafts in one forward pass, commit, draft again."""
        if state.done:
            return state
        state.used.append(state.width)
        if state.widths is not None:
            state.widths.resume()
        if state.replay is not None:
            state.replay.step(self, state)
            self._look(state)
        elif self.num_rows == 1:
            codes = state.tokens[:, state.num_forwards - 1, None]  # b 1
            self._decide(state, state.backbone.step(state.session, codes).logits)
        else:
            self._decide(state, self._score(state))
        if state.widths is not None:
            state.widths.pause()
        return state

    def _score(self, state: WindowState) -> Tensor:
        """Feed the last permanent code and the proposals: logits ``[G, A, w, V]``."""
        if state.width == 1:
            codes = state.last_codes() if state.last is None else state.last
        else:
            drafts = state.draft.tokens[:, : state.width - 1].clamp(min=0)  # a w-1; a missing one is fed as any code
            codes = torch.cat([state.last_codes(), drafts], dim=1)  # a w
        if not getattr(state.drafter, "reads_hidden", False):
            return state.backbone.step(state.session, codes).logits
        out = state.backbone.step(state.session, codes, hidden=True)
        state.hidden = out.hidden
        return out.logits

    def finish(self, state: WindowState) -> SamplerOutput:
        """Collect codes and statistics."""
        state.num_drafter_forwards = 0 if state.drafter is None else state.drafter.num_forwards
        if state.replay is not None:
            state.counts["graph_replays"] = state.replay.count
        out = super().finish(state)
        out.stats.widths = list(state.used)
        out.stats.depends_on_rows = self._depends_on_rows(state.backbone)
        return out

    def _depends_on_rows(self, backbone: Any) -> bool:
        """Whether the rows of a pass change each other's logits by more than the last bits of float32."""
        return not self.row_invariant and getattr(backbone, "dtype", None) in HALVES

    def _first_state(
        self, run: Run, session: Any, layout: SlotLayout, num_codes: int, widths: Widths | None
    ) -> WindowState:
        device, num_images = run.keys.device, len(run.seeds)
        empty = torch.full((num_images, layout.num_slots + 1), -1, dtype=torch.int64, device=device)
        reach = self.reach if widths is None else widths.most
        width = min(reach, layout.num_slots) if widths is None else 1
        noise = None
        if device.type == "cpu" and self.temperature > 0:
            room = NOISE_BLOCK if self.num_rows == 1 else NOISE_CACHE
            held = min(layout.num_slots, max(reach, room // (num_images * num_codes)))
            noise = GumbelCache(run.keys, held, num_codes)
        return WindowState(
            backbone=run.backbone,
            session=session,
            seeds=run.seeds,
            keys=run.keys,
            rows=torch.arange(num_images, device=device),
            tokens=empty,
            trace=empty.clone(),
            layout=layout,
            noise=noise,
            forced=None,
            length=torch.zeros(num_images, dtype=torch.int64, device=device),
            errors=new_errors(num_images, device) if device.type == "cuda" else None,
            width=width,
            widths=widths,
            draft=Draft.none(num_images, width, device),
            level=0 if device.type == "cpu" else None,
        )

    def within_interval(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Logits ``[G, A, n, V]`` whose branches agree where codes at ``positions [A, n]`` are no longer guided."""
        if self.guidance_interval < 0 or logits.shape[0] == 1:
            return logits
        off = positions > self.guidance_interval + 1
        return torch.where(off[None, ..., None], logits[:1], logits)

    def _of_rows(self, state: WindowState, logits: Tensor) -> Tensor:
        """``within_interval`` of the rows of this iteration: slots of a window, or behind the nodes of a tree."""
        if self.guidance_interval < 0:
            return logits
        tree = getattr(state.draft, "tree", None) if state.num_forwards else None
        ahead = torch.arange(logits.shape[2], device=logits.device) if tree is None else tree.depth
        slots = (state.length[:, None] + ahead).clamp(max=state.layout.num_slots - 1)
        return self.within_interval(logits, state.layout.code_index[slots])

    def _decide(self, state: WindowState, logits: Tensor) -> None:
        """Draw or verify the rows ``logits [G, A, w, V]``, commit, and prepare the next iteration."""
        logits = self._of_rows(state, logits)
        if self.num_rows == 1:
            self._commit_one(state, logits)
            return
        if state.widths is not None and state.width == 1:
            commit_one(self, state, logits, NOISE_BLOCK)
            asked = state.num_forwards >= state.next_poll
            self._look(state)
            if asked and not state.done:
                self._propose(state, logits, None, state.length[:, None], state.length)
            return
        outcome, slots, num_rows = self._accept(state, logits)
        state.last = None
        keep = self._look(state)
        if keep is not None:
            logits, slots, num_rows = logits[:, keep], slots[keep], num_rows[keep]
            outcome = type(outcome)(*(value[keep] for value in vars(outcome).values()))
        if not state.done:
            self._propose(state, logits, outcome, slots, num_rows)

    def iterate(self, state: WindowState) -> None:
        """One iteration of a replayable sampler on a static session: tensors in, tensors of the same shapes out."""
        if self.num_rows == 1:
            logits = state.backbone.step(state.session, state.last_codes()).logits
            self._commit_next(state, self._of_rows(state, logits))
            return
        logits = self._of_rows(state, self._score(state))
        outcome, slots, num_rows = self._accept(state, logits)
        self._propose(state, logits, outcome, slots, num_rows)

    def _propose(self, state: WindowState, logits: Tensor, outcome: Any, slots: Tensor, num_rows: Tensor) -> None:
        draft = state.drafter.propose(state, logits, outcome, slots, num_rows)
        state.draft = narrow(draft, state.width) if isinstance(draft, Draft) else draft

    def _accept(self, state: WindowState, logits: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Run the rule and commit; return the outcome, the slots of its rows ``[A, w]`` and how many counted ``[A]``."""
        prefill = state.num_forwards == 0
        slots = state.length[:, None] + torch.arange(state.width, device=logits.device)  # a w
        num_rows = (state.layout.num_slots - state.length).clamp(max=1 if prefill else state.width)  # a
        outcome = self._verify(state, logits, slots, num_rows)
        committed = slots < (state.length + outcome.num_committed)[:, None]
        if state.widths is not None:
            state.widths.count(state, slots, outcome.tokens, committed)
        place = torch.where(committed, slots, state.layout.num_slots)
        state.tokens[state.rows[:, None], place] = outcome.tokens
        state.trace[state.rows[:, None], place] = state.iteration[:, None]
        state.length = state.length + outcome.num_committed
        if not prefill:  # which feeds no code
            self._keep(state, outcome)
        state.count()
        return outcome, slots, num_rows

    def _keep(self, state: WindowState, outcome: Any) -> None:
        """Make the committed entries permanent in the caches."""
        state.backbone.commit(state.session, outcome.num_committed)
        state.drafter.commit(outcome.num_committed)

    def _verify(self, state: WindowState, logits: Tensor, slots: Tensor, num_rows: Tensor) -> Any:
        """Run the acceptance rule on the rows of this iteration."""
        slots = slots.clamp(max=state.layout.num_slots - 1)  # rows past the end do not count
        rows = Rows(
            logits=logits,
            positions=state.layout.code_index[slots],
            num_rows=num_rows,
            forced=None if state.forced is None else state.forced.gather(1, slots),
            warp=self.warp,
            hidden=state.hidden,
        )
        return state.rule.decide(rows, state.draft, Noise(state.keys, state.iteration, state.noise, state.errors))

    def _look(self, state: WindowState) -> Tensor | None:
        """Learn the progress, drop complete images and set the next width; return the images kept if some left.

        On a GPU this waits for the device, hence only every few iterations, and the window keeps its shape. On a static
        session the batch keeps its shape as well.
        """
        if self.num_rows == 1:
            state.done = state.num_forwards == state.layout.num_slots
            if state.done and state.errors is not None:
                raise_errors(state.errors)
            return None
        free, static = looking_is_free(state.length.device), getattr(state.session, "static", False)
        alone = state.widths is not None and state.width == 1
        if (alone or not free) and state.num_forwards < state.next_poll:
            return None
        left = state.layout.num_slots - state.length
        most = int(left.max())
        state.done = most == 0
        if state.widths is not None:
            state.width = state.widths.next(state, most)
            least = int(left.where(left > 0, most).min())  # windows of one overshoot nothing
            state.level = state.layout.num_slots - most if free and least == most else None
            state.next_poll = state.num_forwards + min(state.widths.patience(free), least)
        else:
            state.width = min(self.reach, most) if free and not static else state.width
            state.next_poll = state.num_forwards + max(-(-most // self.reach), min(POLL_EVERY, most))
        if state.errors is not None:
            raise_errors(state.errors)
        if state.done or static or bool((left > 0).all()):
            return None
        keep = (left > 0).nonzero().flatten()
        state.backbone.select(state.session, keep)
        state.rows, state.keys, state.length = state.rows[keep], state.keys[keep], state.length[keep]
        state.forced = None if state.forced is None else state.forced[keep]
        state.errors = None if state.errors is None else state.errors[keep]
        state.counter = None if state.counter is None else state.counter[keep]
        if state.noise is not None:
            state.noise.select(keep)
        state.drafter.select(keep)
        state.last = None
        return keep

    def _commit_one(self, state: WindowState, logits: Tensor) -> None:
        """Next-token sampling: every image commits one code, so nothing is verified, gathered or polled."""
        now, noise = state.num_forwards, None
        if state.noise is not None:
            block = state.noise.capacity
            if now % block == 0:  # many positions at once: small calls would cost as much as a small model
                ahead = state.layout.code_index[now : now + block]
                state.ahead = state.noise.rows(ahead.expand(len(state.keys), -1))
            noise = state.ahead[:, now % block, None]
        position = state.layout.code_index[now].expand(len(state.keys), 1)
        fixed = None if state.forced is None else state.forced[:, now]  # b
        if fixed is not None:  # the law of a fixed slot is never read
            logits = torch.where((fixed >= 0)[:, None, None], 0.0, logits)
        tokens = draw(logits, seeds=state.keys, positions=position, noise=noise, errors=state.errors, **self.warp)[
            :, 0
        ]
        if fixed is not None:
            tokens = torch.where(fixed >= 0, fixed, tokens)
        state.tokens[:, now] = tokens
        state.trace[:, now] = now
        state.length += 1
        if now > 0:
            state.backbone.commit(state.session, 1)
        state.count()
        self._look(state)

    def _commit_next(self, state: WindowState, logits: Tensor) -> None:
        """The same as a function of tensors."""
        slots = state.length[:, None]  # b 1
        fixed = None if state.forced is None else state.forced.gather(1, slots)
        if fixed is not None:
            logits = torch.where((fixed >= 0)[..., None], 0.0, logits)
        positions = state.layout.code_index[slots]
        tokens = draw(logits, seeds=state.keys, positions=positions, errors=state.errors, **self.warp)
        if fixed is not None:
            tokens = torch.where(fixed >= 0, fixed, tokens)
        state.tokens.scatter_(1, slots, tokens)
        state.trace.scatter_(1, slots, state.iteration[:, None])
        state.length = state.length + 1
        state.backbone.commit(state.session, 1)
        state.count()


def looking_is_free(device: torch.device) -> bool:
    """Whether reading a number back costs nothing; where it does not, shapes stay fixed and looks are rare."""
    return device.type == "cpu"


def narrow(draft: Draft, width: int) -> Draft:
    """The first ``width`` proposals."""
    parts = {name: getattr(draft, name)[:, :width] for name in ("tokens", "kind", "prob", "row")}
    return replace(draft, **parts)
