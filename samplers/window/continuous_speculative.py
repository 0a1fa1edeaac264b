"""Speculative decoding of continuous tokens: a small model drafts chains, one pass of the target judges them all.

Causal continuous backbones only need one forward for the states of a whole window, and the distributions of all S steps of
all drafts are one call of the head on rows that do not wait for each other. ``mode="exact"`` accepts whole paths,
``"stepwise"`` couples the chains step by step; both sample the distribution of the target's own chains with noise in the last
step (``final_noise``).

It has a loop of its own: the window loop holds codes that replace one another in fixed columns of slots, rules there read
logits, and the rules here draw further rows of the head while they decide.

p is the target, q the draft. Letters: B images, A images still decoded, N tokens, D numbers of a token, S steps of a chain,
G guidance branches, W = num_draft_tokens + 1 window, g tokens an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.outputs import Guarantee, SamplerOutput
from vargen.random import Stream
from vargen.samplers.acceptance.gaussian_chains import ContinuousState, Drafts, judge_paths, judge_steps
from vargen.samplers.base import MAX_DRAFTS, Inputs, Run
from vargen.samplers.heads.diffusion import ChainHead, ContinuousSampler, path_noise, work_dtype
from vargen.validation.checks import check_choice, check_integer

MODES = ("exact", "stepwise")


@dataclass(frozen=True, kw_only=True)
class ContinuousSpeculativeSampler(ContinuousSampler):
    """Draft tokens with a small model, keep those that the target confirms, add one of the target's own.

    Give the small model as ``drafter=`` of ``sample`` (``pipe.drafter``); it needs the same tokens and as many diffusion
    steps. ``num_draft_tokens=0`` needs none and is next-token decoding.

    Args:
        guidance_scale, temperature, guidance_schedule, num_diffusion_steps: as in ``ContinuousSampler``, for both models.
        mode: ``"exact"`` (whole paths) or ``"stepwise"`` (S passes of the target's head one after the other, but a draft need
            not be right at every step: chains that part can meet again).
        num_draft_tokens: drafts a pass of the target.
        final_noise: the last step of a chain adds its noise (spread 0.006). Official chains do not; then two different
            heads never agree and every draft is refused.

    Example:
        >>> ContinuousSpeculativeSampler(mode="exact", num_draft_tokens=4).guarantee
        'exact'
    """

    guarantee: ClassVar[Guarantee] = "exact"
    weakened: ClassVar[Guarantee] = "relaxed"
    required_features: ClassVar[frozenset[str]] = frozenset({Feature.CONTINUOUS, Feature.CONTINUOUS_WINDOW})

    mode: str = "exact"
    num_draft_tokens: int = 4
    final_noise: bool = True

    def check(self) -> None:
        """Raise ``ValueError`` for a setting out of range."""
        super().check()
        if self.mode == "official":
            raise ValueError(
                'mode="official", the released code of CSpD, is not offered any more, since it does not sample the model\'s '
                'distribution; take mode="exact" or "stepwise"'
            )
        check_choice("mode", self.mode, MODES)
        check_integer("num_draft_tokens", self.num_draft_tokens, low=0, high=MAX_DRAFTS, hint="0 drafts nothing")
        if self.num_draft_tokens > 0 and (self.temperature == 0 or not self.final_noise):
            raise ValueError(
                "speculation needs noise in every step: temperature above 0 and final_noise=True, got "
                f"temperature={self.temperature}, final_noise={self.final_noise} (num_draft_tokens=0 works without)"
            )

    @torch.no_grad()
    def begin(self, run: Run, inputs: Inputs) -> ContinuousState:
        """Run the condition and draw the first token with the target; the drafter is not needed without drafts."""
        backbone, keys, width = run.backbone, run.keys, self.num_draft_tokens + 1
        session, out = backbone.open(run.condition, max_window=width)
        draft_session = draft_head = None
        head = self._head(backbone, backbone)
        if self.num_draft_tokens:
            self._check_drafter(backbone, run.drafter)
            small = run.drafter.prepare(run.given, guidance_scale=self.guidance_scale)
            draft_session, _ = run.drafter.open(small, max_window=width)
            draft_head = self._head(run.drafter, backbone)
        shape = (len(run.seeds), backbone.num_codes)
        state = ContinuousState(
            backbone=backbone,
            session=session,
            seeds=run.seeds,
            keys=keys,
            rows=torch.arange(shape[0], device=keys.device),
            tokens=torch.full((*shape, backbone.token_dim), math.nan, dtype=head.dtype, device=keys.device),
            trace=torch.full(shape, -1, device=keys.device),
            drafter=run.drafter,
            draft_session=draft_session,
            head=head,
            draft_head=draft_head,
            length=torch.zeros_like(keys),
            num_drafter_forwards=int(draft_head is not None),
        )
        return self._emit(state, self._draw(state, out.logits[:, :, -1:]), torch.ones_like(keys))

    @torch.no_grad()
    def step(self, state: ContinuousState) -> ContinuousState:
        """Spend one forward pass of the target: draft, judge, emit. Advances the state in place."""
        places = state.length  # A
        last = state.tokens[state.rows, places - 1][:, None]
        if state.draft_head is None:
            z = state.backbone.step(state.session, last).logits  # G A 1 Z
            state.backbone.commit(state.session, 1)
            return self._emit(state, self._draw(state, z), torch.ones_like(places))
        drafts = self._draft(state, last, state.draft_head)
        z = state.backbone.step(state.session, torch.cat([last, drafts.tokens], dim=1)).logits  # G A W Z
        room = state.tokens.shape[1] - places
        judge = judge_paths if self.mode == "exact" else judge_steps
        extra, count = judge(self, state, z, drafts, places, room)
        tokens = torch.cat([drafts.tokens, torch.zeros_like(last)], dim=1)
        tokens[torch.arange(len(places), device=places.device), count] = extra
        tested = count + (count < room.clamp(max=self.num_draft_tokens))
        state.count(num_tested=int(tested.sum()), num_accepted=int(count.sum()))
        for model, session in ((state.backbone, state.session), (state.drafter, state.draft_session)):
            model.commit(session, count + 1)
        return self._emit(state, tokens, torch.minimum(count + 1, room))

    def finish(self, state: ContinuousState) -> SamplerOutput:
        """Return the tokens ``[B, N, D]`` and statistics.

        ``stats.extra``: ``num_tested`` and ``num_accepted`` drafts, ``num_draft_head_rows``, ``num_target_chains`` run for
        refused and added tokens, ``num_capped`` residuals that met their cap.
        """
        state.num_head_rows = state.head.num_rows
        if state.draft_head is not None:
            state.counts["num_draft_head_rows"] = state.draft_head.num_rows
        return super().finish(state)

    def departures(self, state: ContinuousState) -> list[str]:
        """Residuals that met their cap."""
        capped = state.counts.get("num_capped", 0)
        note = f"{capped} residuals met their cap and hold a draw of the target's distribution instead"
        return [note] if capped else []

    def _draft(self, state: ContinuousState, last: Tensor, head: ChainHead) -> Drafts:
        """Draft token after token. Each pass feeds the chain so far: a session forgets what was not committed."""
        window, contexts, paths = last, [], []
        for j in range(self.num_draft_tokens):
            z = state.drafter.step(state.draft_session, window).logits[:, :, -1:]
            where = (state.length + j)[:, None]
            path = head.paths(z, self.noise_at(state, state.keys, where), self.scale_at(state, where))
            contexts.append(z)
            paths.append(path)
            window = torch.cat([window, path.states[:, :, -1].to(window.dtype)], dim=1)
        state.drafter.step(state.draft_session, window)  # the whole window in one piece, to be committed from
        state.num_drafter_forwards += self.num_draft_tokens + 1
        fields = (torch.cat(parts, dim=1) for parts in zip(*paths, strict=True))
        return Drafts(torch.cat(contexts, dim=2), window[:, 1:], *fields)

    def _draw(self, state: ContinuousState, z: Tensor) -> Tensor:
        """Draw the next token ``[A, 1, D]`` freely with the target's head."""
        where = state.length[:, None]
        return state.head.draw(z, state.keys, where, self.scale_at(state, where))

    def _emit(self, state: ContinuousState, tokens: Tensor, count: Tensor) -> ContinuousState:
        """Write the first ``count [A]`` of ``tokens [A, w, D]`` behind what is drawn, and drop images that are complete."""
        offset = torch.arange(tokens.shape[1], device=count.device)
        image, item = (offset < count[:, None]).nonzero().unbind(1)
        rows, places = state.rows[image], state.length[image] + item
        state.tokens[rows, places] = tokens[image, item]
        state.trace[rows, places] = state.num_forwards
        state.length = state.length + count
        state.num_forwards += 1
        left = state.length < state.tokens.shape[1]
        if not bool(left.all()):
            keep = left.nonzero().flatten()
            state.rows, state.keys, state.length = state.rows[keep], state.keys[keep], state.length[keep]
            state.done = len(keep) == 0
            if not state.done:
                state.backbone.select(state.session, keep)
                if state.draft_session is not None:
                    state.drafter.select(state.draft_session, keep)
        return state

    def noise_at(
        self,
        state: ContinuousState,
        keys: Tensor,
        positions: Tensor,
        stream: Stream = Stream.NORMAL,
        iteration: Tensor | None = None,
    ) -> Tensor:
        """Noise of chains ``[A, g, S + 1, D]`` at ``positions [A, g]``."""
        size = state.head.chain.num_steps, state.tokens.shape[2], state.tokens.dtype
        return path_noise(keys, self.inside(state, positions), *size, stream, iteration)

    @staticmethod
    def inside(state: ContinuousState, positions: Tensor) -> Tensor:
        """Windows of one width overshoot the end; what is drawn there is thrown away."""
        return positions.clamp(max=state.tokens.shape[1] - 1)

    def scale_at(self, state: ContinuousState, positions: Tensor) -> float | Tensor:
        """The guidance scale of tokens at ``positions [A, g]``: a number, or one each."""
        scale: float | Tensor = self.guidance_at(positions + 1, state.tokens.shape[1])
        return scale

    def _head(self, model: Any, target: Any) -> ChainHead:
        """The head of one of the two models, with as many steps as the target's."""
        steps = target.head.num_sampling_steps if self.num_diffusion_steps is None else self.num_diffusion_steps
        return ChainHead(
            net=model.head,
            chain=model.head.diffusion(steps),
            dtype=work_dtype(target),
            temperature=self.temperature,
            final_noise=self.final_noise,
        )

    def _check_drafter(self, backbone: Any, drafter: Any) -> None:
        if drafter is None:
            raise ValueError(f"{type(self).__name__} needs drafter=, a small backbone over the same tokens")
        if Feature.CONTINUOUS_WINDOW not in Feature.of(drafter):
            raise ValueError(f"{type(self).__name__} needs a causal drafter, got {type(drafter).__name__}")
        if (drafter.token_dim, drafter.num_codes) != (backbone.token_dim, backbone.num_codes):
            got = f"{drafter.num_codes} tokens of {drafter.token_dim} and {backbone.num_codes} of {backbone.token_dim}"
            raise ValueError(f"drafter and backbone need the same tokens, got {got}")
