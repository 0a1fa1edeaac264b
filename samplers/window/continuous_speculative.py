"""Speculative decoding of continuous tokens: a small model drafts chains, one pass of the target judges them all.

Causal continuous backbones only need one forward for the states of a whole window, and the laws of all S steps of all drafts
are one call of the head on rows that do not wait for each other. ``mode="exact"`` accepts whole paths, ``"stepwise"``
couples the chains step by step; both sample the law of the target's own chains with noise in the last step
(``final_noise``). ``"official"`` is the released code of CSpD (Wang et al., 2024, arXiv:2411.11925), for comparison: it
implements neither its paper nor the target's law.

p is the target, q the draft. Letters: B images, A images still decoded, N tokens, D numbers of a token, S steps of a chain,
G guidance branches, W = gamma + 1 window.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.outputs import DecodeStats, Guarantee, SamplerOutput
from vargen.random import Stream, seed_tensor
from vargen.samplers.acceptance.gaussian_chains import ContinuousState, Drafts, judge_paths, judge_steps
from vargen.samplers.base import MAX_DRAFTS
from vargen.samplers.heads.diffusion import ContinuousSampler, path_noise, work_dtype
from vargen.samplers.window.continuous_official import OFFICIAL_WARNING, OfficialState, official_start, official_step
from vargen.validation.checks import check_choice, check_integer, check_number, check_seeds

MODES = ("exact", "stepwise", "official")


@dataclass(frozen=True, kw_only=True)
class ContinuousSpeculativeSampler(ContinuousSampler):
    """Draft ``gamma`` tokens with a small model, keep those that the target confirms, add one of the target's own.

    Give the small model as ``drafter=`` of ``sample`` (``pipe.drafter``); it needs the same tokens and as many diffusion
    steps. ``gamma=0`` needs none and is next-token decoding.

    Args:
        guidance_scale, temperature, guidance_schedule, num_diffusion_steps: as in ``ContinuousSampler``, for both models.
        mode: ``"exact"`` (whole paths), ``"stepwise"`` (S passes of the target's head one after the other, but a draft need
            not be right at every step: chains that part can meet again) or ``"official"``.
        gamma: drafts a pass of the target.
        final_noise: the last step of a chain adds its noise (spread 0.006). Official chains do not; then two different
            heads never agree and every draft is refused.
        num_iter, prefill, inner_temperature: of ``"official"`` alone: passes (None = N), share of passes that the target
            makes at first, and the factor on the last spread in the acceptance test.

    Example:
        >>> ContinuousSpeculativeSampler(mode="exact", gamma=4).guarantee
        'exact'
    """

    guarantee: ClassVar[Guarantee] = "exact"

    mode: str = "exact"
    gamma: int = 4
    final_noise: bool = True
    num_iter: int | None = None
    prefill: float = 0.05
    inner_temperature: float = 42.0

    def check(self) -> None:
        """Raise ``ValueError`` for a setting out of range."""
        super().check()
        check_choice("mode", self.mode, MODES)
        check_integer("gamma", self.gamma, low=0, high=MAX_DRAFTS, hint="0 drafts nothing")
        check_number("prefill", self.prefill, low=0.0, high=1.0)
        check_number("inner_temperature", self.inner_temperature, low=0.0, open_low=True)
        if self.gamma > 0 and self.mode != "official" and (self.temperature == 0 or not self.final_noise):
            raise ValueError(
                "speculation needs noise in every step: temperature above 0 and final_noise=True, got "
                f"temperature={self.temperature}, final_noise={self.final_noise} (gamma=0 works without)"
            )

    def start(
        self,
        backbone: Any,
        condition: Any,
        *,
        seeds: Sequence[int] | Tensor | int,
        tokenizer: Any = None,
        drafter: Any = None,
        **official: Any,
    ) -> Any:
        """Check the arguments, run the condition and draw the first token with the target.

        Args:
            backbone, condition, seeds: as in ``sample``.
            tokenizer: not read.
            drafter: the small model; not needed with ``gamma=0``.
            official: recorded numbers of an official run, see ``continuous_official``.
        """
        self.check_backbone(backbone)
        self._check_models(backbone, drafter)
        if self.mode == "official":
            warnings.warn(OFFICIAL_WARNING, stacklevel=3)
            return official_start(self, backbone, drafter, condition, seeds, **official)
        prepared = backbone.prepare(condition, guidance_scale=self.guidance_scale)
        listed = check_seeds(seeds, prepared.batch)
        keys = seed_tensor(listed, backbone.device)
        width = self.gamma + 1
        session, out = backbone.open(prepared, max_window=width)
        draft_session = draft_chain = None
        if self.gamma:
            small = drafter.prepare(condition, guidance_scale=self.guidance_scale)
            draft_session, _ = drafter.open(small, max_window=width)
            draft_chain = drafter.head.diffusion(self._num_steps(backbone))
        shape = (len(listed), backbone.num_codes)
        state = ContinuousState(
            backbone=backbone,
            session=session,
            drafter=drafter,
            draft_session=draft_session,
            chain=backbone.head.diffusion(self._num_steps(backbone)),
            draft_chain=draft_chain,
            seeds=listed,
            keys=keys,
            latents=torch.zeros(*shape, backbone.token_dim, dtype=work_dtype(backbone), device=keys.device),
            length=torch.zeros_like(keys),
            rows=torch.arange(shape[0], device=keys.device),
            trace=torch.full(shape, -1, device=keys.device),
            forwards_per_image=torch.zeros_like(keys),
            num_drafter_forwards=int(self.gamma > 0),
        )
        first = self.draw_chain(state, out.logits[:, :, -1], torch.zeros_like(keys))
        return self._emit(state, first[:, None], torch.ones_like(keys))

    @torch.no_grad()
    def step(self, state: Any) -> Any:
        """Spend one forward pass of the target: draft, judge, emit. Advances the state in place."""
        if isinstance(state, OfficialState):
            return official_step(self, state)
        places = state.length[state.rows]  # A
        last = state.latents[state.rows, places - 1][:, None]
        drafts = self._draft(state, last, places)
        window = last if drafts is None else torch.cat([last, drafts.tokens], dim=1)
        z = state.backbone.step(state.session, window).logits  # G A W Z
        room = state.latents.shape[1] - places
        if drafts is None:
            token = self.draw_chain(state, z[:, :, 0], places)
            return self._emit(state, token[:, None], torch.ones_like(places))
        if self.mode == "exact":
            extra, count = judge_paths(self, state, z, drafts, places, room)
        else:
            extra, count = judge_steps(self, state, z, drafts, places, room)
        tokens = torch.cat([drafts.tokens, torch.zeros_like(last)], dim=1)
        tokens[torch.arange(len(places), device=places.device), count] = extra
        state.count(
            num_tested=int((count + (count < room.clamp(max=self.gamma))).sum()), num_accepted=int(count.sum())
        )
        for model, session in ((state.backbone, state.session), (state.drafter, state.draft_session)):
            model.commit(session, count + 1)
        return self._emit(state, tokens, torch.minimum(count + 1, room), committed=True)

    def finish(self, state: Any) -> SamplerOutput:
        """Return the tokens ``[B, N, D]`` and statistics.

        ``stats.extra``: ``num_tested`` and ``num_accepted`` drafts, ``num_draft_head_rows``, ``num_target_chains`` run for
        refused and added tokens, ``num_capped`` residuals that met their cap.
        """
        official = isinstance(state, OfficialState)
        capped = state.counts.get("num_capped", 0)
        notes = [OFFICIAL_WARNING] if official else []
        if capped:
            notes.append(f"{capped} residuals met their cap and hold a draw of the target's law instead")
        weaker: Guarantee = "heuristic" if official else "relaxed"
        stats = DecodeStats(
            num_forwards=state.num_forwards,
            num_drafter_forwards=state.num_drafter_forwards,
            num_head_rows=state.num_head_rows,
            forwards_per_image=state.forwards_per_image,
            commit_trace=state.trace,
            guarantee=weaker if notes else self.guarantee,
            notes=notes,
            extra=dict(state.counts),
        )
        return SamplerOutput(None, state.seeds, stats, latents=state.latents)

    def _draft(self, state: ContinuousState, last: Tensor, places: Tensor) -> Drafts | None:
        """Draft token after token. Each pass feeds the chain so far: a session forgets what was not committed."""
        if self.gamma == 0:
            return None
        window, states, paths = last, [], []
        for j in range(self.gamma):
            z = state.drafter.step(state.draft_session, window).logits[:, :, -1]
            path = state.drafter.head.sample(
                z, self.path_noise_at(state, places + j), state.draft_chain, **self.chain_settings(state, places + j)
            )
            state.count(num_draft_head_rows=z.shape[0] * z.shape[1] * state.draft_chain.num_steps)
            states.append(z)
            paths.append(path)
            window = torch.cat([window, path.states[:, -1:].to(window.dtype)], dim=1)
        state.drafter.step(state.draft_session, window)  # the whole window in one piece, to be committed from
        state.num_drafter_forwards += self.gamma + 1
        fields = (torch.stack(parts, dim=1) for parts in zip(*paths, strict=True))
        return Drafts(torch.stack(states, dim=2), window[:, 1:], *fields)

    def draw_chain(self, state: ContinuousState, z: Tensor, places: Tensor, rows: Tensor | None = None) -> Tensor:
        """Draw tokens ``[n, D]`` freely with the target's head."""
        path = state.backbone.head.sample(
            z, self.path_noise_at(state, places, rows), state.chain, **self.chain_settings(state, places)
        )
        state.num_head_rows += z.shape[0] * z.shape[1] * state.chain.num_steps
        return path.states[:, -1].to(state.latents.dtype)

    def _emit(self, state: ContinuousState, tokens: Tensor, count: Tensor, committed: bool = False) -> ContinuousState:
        """Write the first ``count [A]`` of ``tokens [A, w, D]`` behind what is drawn, and drop images that are complete."""
        offset = torch.arange(tokens.shape[1], device=count.device)
        image, item = (offset < count[:, None]).nonzero().unbind(1)
        rows = state.rows[image]
        places = state.length[rows] + item
        state.latents[rows, places] = tokens[image, item]
        state.trace[rows, places] = state.num_forwards
        if not committed and state.num_forwards > 0:
            state.backbone.commit(state.session, 1)
        state.length[state.rows] += count
        state.num_forwards += 1
        state.forwards_per_image[state.rows] += 1
        left = state.length[state.rows] < state.latents.shape[1]
        if not bool(left.all()):
            keep = left.nonzero().flatten()
            state.rows = state.rows[left]
            state.done = len(keep) == 0
            if not state.done:
                state.backbone.select(state.session, keep)
                if state.draft_session is not None:
                    state.drafter.select(state.draft_session, keep)
        return state

    def path_noise_at(
        self,
        state: ContinuousState,
        places: Tensor,
        rows: Tensor | None = None,
        stream: Stream = Stream.NORMAL,
        iteration: Tensor | None = None,
    ) -> Tensor:
        """Noise of chains ``[n, S + 1, D]`` at ``places [n]`` of active images (``rows [n]`` of them)."""
        keys = state.keys[state.rows if rows is None else state.rows[rows]]
        size = state.latents.shape[2], state.latents.dtype
        return path_noise(keys, self.inside(state, places), state.chain.num_steps, *size, stream, iteration)

    @staticmethod
    def inside(state: ContinuousState, places: Tensor) -> Tensor:
        """Windows of one width overshoot the end; what is drawn there is thrown away."""
        return places.clamp(max=state.latents.shape[1] - 1)

    def chain_settings(self, state: ContinuousState, places: Tensor) -> dict[str, Any]:
        """Guidance (by place), temperature and noise of the last step, as the head's ``sample`` takes them."""
        scale = self.guidance_at(places + 1, state.latents.shape[1])
        if isinstance(scale, Tensor):
            scale = scale.to(state.latents.dtype)[:, None]
        return {"guidance_scale": scale, "temperature": self.temperature, "final_noise": self.final_noise}

    def _num_steps(self, backbone: Any) -> str | int:
        return backbone.head.num_sampling_steps if self.num_diffusion_steps is None else self.num_diffusion_steps

    def _check_models(self, backbone: Any, drafter: Any) -> None:
        needed = "masked_continuous" if self.mode == "official" else "continuous_window"
        models = {"backbone": backbone} | ({"drafter": drafter} if self.gamma or self.mode == "official" else {})
        for name, model in models.items():
            if model is None:
                raise ValueError(f"{type(self).__name__} needs drafter=, a small backbone over the same tokens")
            if needed not in Feature.of(model):
                kind = "a bidirectional" if self.mode == "official" else "a causal"
                raise ValueError(f"mode={self.mode!r} needs {kind} {name}, got {type(model).__name__}")
            if (model.token_dim, model.num_codes) != (backbone.token_dim, backbone.num_codes):
                got = f"{model.num_codes} tokens of {model.token_dim} and {backbone.num_codes} of {backbone.token_dim}"
                raise ValueError(f"drafter and backbone need the same tokens, got {got}")
