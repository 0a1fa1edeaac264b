"""Next-scale sampling: all codes of a scale at once, coarse to fine (VAR, Tian et al., 2024, arXiv:2404.02905).

One step is one forward pass and one scale: score it, draw it, add its vectors to the picture so far, shrink the picture to
the next scale. How codes become vectors, are enlarged and shrunk is the tokenizer's; how logits come about is the
backbone's. Collaborative decoding with two models (CoDe, arXiv:2411.17787) is a setting. The loop stays apart from that of
schedules: a pass reads the picture drawn so far, not codes at positions.

Letters: B images, K scales, n_k codes of scale k, L all codes, V codebook, C channels, h w the last scale, G branches.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.kernels.warp import warp_logits
from vargen.outputs import Guarantee, SamplerOutput
from vargen.random import Stream, gumbel
from vargen.samplers.base import GUIDANCE_SCHEDULES, Inputs, Run, Sampler, WithNegative, plain_number
from vargen.samplers.heads.bits import BitsHead
from vargen.samplers.heads.categorical import CategoricalHead
from vargen.samplers.scale.editing import check_forced_codes
from vargen.samplers.scale.state import NextScaleState, ScaleNoise, ScaleTokenizer, token_shape
from vargen.validation.checks import MAX_BLOCKS, check_choice, check_integer, check_number
from vargen.validation.printable import shown

HEADS = (CategoricalHead, BitsHead)  # by the axes of a token: codes have none, bits one
LISTS = ("guidance_scale", "temperature", "top_k", "top_p")  # settings that may be one value a scale
SCALE_NUMBERS = ("guidance_start_scale", "guidance_stop_scale", "smooth_start_scale", "stop_scale", "refine_scale")
UNFILTERED = "unfiltered"
MAX_SCALES = 64  # published models have 10 to 14
SMOOTH_TEMPERATURE = (0.27, 0.95, 0.005)  # start, share that is lost by the last scale, floor: the official constants


@dataclass(frozen=True, kw_only=True, eq=False)
class NextScaleInputs(Inputs):
    """What a call may give.

    Args:
        forced_codes: K tensors ``[n_k]`` or ``[B, n_k]`` of codes fixed beforehand, -1 where free, see
            ``vargen.samplers.scale.editing.keep_codes``; bits have an axis of d behind.
        noise: replaces the counter-based noise: ``noise(k, stream, shape)`` returns Gumbel numbers, one a logit (``shape`` is
            ``[B, n_k, V]``, for bits ``[B, n_k, 2 d]``), first for ``Stream.GUMBEL``, then with ``smooth`` for ``Stream.FRESH``.
    """

    forced_codes: Sequence[Tensor] | None = None
    noise: ScaleNoise | None = None


@dataclass(frozen=True, kw_only=True)
class NextScaleSampler(Sampler):
    """Draw scale after scale, every code of a scale from its own distribution given the coarser scales.

    Noise is keyed by the place of a code among all L codes, so an image depends on its seed only. The official models
    are sampled with ``guidance_scale=2.5, top_k=900, top_p=0.96`` (their "cfg 1.5"; the demo uses 5 and 0.95). Infinity draws
    bits, each from two values: ``guidance_scale=4, guidance_schedule="constant", temperature=0.5, top_p=0.97``. Switti:
    ``guidance_scale=7, top_k=400, top_p=0.95``, and for 1024 pixels ``smooth="unfiltered", smooth_start_scale=2,
    guidance_stop_scale=11, unguided_temperature=0.1`` beside it.

    Args:
        guidance_scale, temperature, top_k, top_p: as in ``Sampler``; the guidance is that of the last scale. Each may be a list
            of one value a scale, which is taken as it is.
        guidance_schedule: ``"linear"`` from none at the first scale to all at the last (official), or ``"constant"``.
        final_temperature: temperature of the last scale, reached linearly from ``temperature`` at the first; ``None`` =
            the same for all. Codes of one scale are drawn without knowledge of each other: coarse scales can afford
            variety, in the finest it is noise.
        guidance_start_scale: scales before it are drawn unguided, although both branches run; ``None`` = from the first on.
        guidance_stop_scale: from this scale on only the conditional branch runs, unguided; ``None`` = never.
        guidance_layer: guide hidden states behind this block (negative from the last) in place of logits, for backbones that do
            so; ``None`` = logits.
        unguided_temperature: temperature of the scales from ``guidance_stop_scale`` on; ``None`` = as without.
        stop_scale: draw only so many scales and decode what is there; ``None`` = all.
        smooth: mix code vectors by a sharpened soft draw ("more_smooth" of the official code); the codes returned are
            hard draws of the same distributions and do not decode to the very image. ``"unfiltered"`` leaves top-k and top-p
            out of the soft draws and ends them where guidance ends (Switti).
        smooth_start_scale: scales before it are not mixed; ``None`` = all are.
        refine_scale: collaborative decoding: the first scales, up to this one, are drawn by the drafter (the larger
            model), the others by the backbone; ``None`` = the backbone draws all.

    Example:
        >>> NextScaleSampler(guidance_scale=2.5, top_k=900, top_p=0.96).guidance_at(9, 10)
        2.5

        In a pipeline: a preview after every scale, a hole filled in, an edit, two models (CoDe).

        >>> pipe = ImagePipeline.from_pretrained("heroes32-var")  # doctest: +SKIP
        >>> def watch(pipe, step, num_forwards, tensors):
        ...     previews.append(pipe.decode_codes(tensors["codes"]))
        >>> pipe("minotaur", callback_on_step_end=watch)  # doctest: +SKIP
        >>> pipe(image=picture, mask_image=mask)  # doctest: +SKIP
        >>> pipe("a great sword", image=picture, mask_image=mask)  # doctest: +SKIP
        >>> pipe.drafter = larger_model  # doctest: +SKIP
        >>> pipe("minotaur", refine_scale=3)  # doctest: +SKIP
    """

    guarantee: ClassVar[Guarantee] = "exact"
    required_features: ClassVar[frozenset[str]] = frozenset({Feature.SCALES})
    inputs_type: ClassVar[type[Inputs]] = NextScaleInputs

    guidance_schedule: str = "linear"
    final_temperature: float | None = None
    guidance_start_scale: int | None = None
    guidance_stop_scale: int | None = None
    guidance_layer: int | None = None
    unguided_temperature: float | None = None
    stop_scale: int | None = None
    smooth: bool | str = False
    smooth_start_scale: int | None = None
    refine_scale: int | None = None

    def __post_init__(self) -> None:
        for name in LISTS:
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(map(plain_number, value)))
        super().__post_init__()

    def check(self) -> None:
        """Raise ``ValueError`` for a setting out of range."""
        super().check()
        if self.smooth not in (False, True, UNFILTERED):
            raise ValueError(f"smooth must be False, True or {UNFILTERED!r}, got {shown(self.smooth)}")
        if self.unguided_temperature is not None:
            check_number("unguided_temperature", self.unguided_temperature, low=0.0, hint="None is temperature")
        if self.final_temperature is not None and isinstance(self.temperature, tuple):
            raise ValueError("final_temperature has no place beside a list of temperatures; leave it None")
        if self.guidance_layer is not None:
            check_integer("guidance_layer", self.guidance_layer, low=-MAX_BLOCKS, high=MAX_BLOCKS, hint="None is off")
        check_choice("guidance_schedule", self.guidance_schedule, GUIDANCE_SCHEDULES)
        if self.final_temperature is not None:
            check_number("final_temperature", self.final_temperature, low=0.0, hint="0 is greedy, None is temperature")
        for name in SCALE_NUMBERS:
            low = int(name == "stop_scale")
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), low=low, high=MAX_SCALES, hint="None is off")

    def _each(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        if isinstance(value, tuple) and not value:
            raise ValueError(f"{name} must be a number or one number a scale, got an empty list")
        return value if isinstance(value, tuple) else (value,)

    def _at(self, name: str, k: int) -> Any:
        """A setting at scale k."""
        value = getattr(self, name)
        return value[k] if isinstance(value, tuple) else value

    def ratio(self, k: int, num_scales: int) -> float:
        """How far scale k is: 0 at the first, 1 at the last."""
        return k / (num_scales - 1) if num_scales > 1 else 1.0

    def guidance_at(self, k: int, num_scales: int) -> float:
        """The guidance scale of scale k of K."""
        if self.guidance_stop_scale is not None and k >= self.guidance_stop_scale:
            return 1.0
        if self.guidance_start_scale is not None and k < self.guidance_start_scale:
            return 1.0
        if isinstance(self.guidance_scale, tuple):
            return float(self.guidance_scale[k])
        ramp = self.ratio(k, num_scales) if self.guidance_schedule == "linear" else 1.0
        return 1.0 + (self.guidance_scale - 1.0) * ramp

    def temperature_at(self, k: int, num_scales: int) -> float:
        """The temperature of scale k of K."""
        if self.unguided_temperature is not None and self._after_guidance(k):
            return self.unguided_temperature
        if isinstance(self.temperature, tuple):
            return float(self.temperature[k])
        last = self.temperature if self.final_temperature is None else self.final_temperature
        return self.temperature + (last - self.temperature) * self.ratio(k, num_scales)

    def _after_guidance(self, k: int) -> bool:
        return self.guidance_stop_scale is not None and k >= self.guidance_stop_scale

    def smooth_at(self, k: int) -> bool:
        """Whether code vectors of scale k are mixed."""
        if not self.smooth or k < (self.smooth_start_scale or 0):
            return False
        return not (self.smooth == UNFILTERED and self._after_guidance(k))

    def prepare_condition(self, backbone: Any, condition: Any, drafter: Any) -> Any:
        """The condition of the model of the first scales."""
        if self.refine_scale:
            if isinstance(backbone, WithNegative):
                raise ValueError("negative is for one model; leave it out, or set refine_scale=None")
            if drafter is None:
                raise ValueError(f"refine_scale={self.refine_scale} needs a drafter that draws the scales before it")
            self._check_model("drafter", drafter, backbone)
        first = drafter if self.refine_scale else backbone
        return self._prepare(first, condition)

    def _prepare(self, model: Any, condition: Any) -> Any:
        """A condition as a model reads it, of one branch where no scale is guided."""
        if self.guidance_layer is None:
            return model.prepare(condition, guidance_scale=self._widest_guidance(model))
        if "guidance_layer" not in inspect.signature(getattr(model, "backbone", model).prepare).parameters:
            raise ValueError(f"{type(model).__name__} does not guide hidden states; leave guidance_layer=None")
        count = len(model.scales)
        scales = torch.tensor([self.guidance_at(k, count) for k in range(count)])
        return model.prepare(condition, guidance_scale=scales, guidance_layer=self.guidance_layer)

    def begin(self, run: Run, inputs: NextScaleInputs) -> NextScaleState:
        """Run the condition and draw the first scale; the tokenizer has the backbone's scales."""
        if not hasattr(run.tokenizer, "accumulate"):
            raise ValueError(
                "NextScaleSampler adds up scales with the tokenizer; pass tokenizer=MultiScaleVQTokenizer or, for bits, "
                "MultiScaleBSQTokenizer"
            )
        tokenizer, num_images = cast(ScaleTokenizer, run.tokenizer), len(run.seeds)
        self._check_model("tokenizer", tokenizer, run.backbone)
        forced = inputs.forced_codes
        forced = None if forced is None else check_forced_codes(forced, tokenizer, num_images)
        drafter = run.drafter if self.refine_scale else None
        session, out = (drafter or run.backbone).open(run.condition)
        empty = torch.full((num_images, sum(h * w for h, w in tokenizer.scales)), -1, device=run.keys.device)
        one = token_shape(tokenizer)
        tokens = empty.view(*empty.shape, *[1] * len(one)).repeat(1, 1, *one).to(torch.int8 if one else torch.int64)
        state = NextScaleState(
            backbone=run.backbone,
            tokenizer=tokenizer,
            condition=run.given,
            session=session,
            seeds=run.seeds,
            keys=run.keys,
            rows=torch.arange(num_images, device=run.keys.device),
            tokens=tokens,
            trace=empty,
            total=tokenizer.blank(num_images).to(out.logits.device),
            forced=forced,
            noise=inputs.noise,
            drafter=drafter,
        )
        return self._finish_step(state, out.logits)

    @torch.no_grad()
    def step(self, state: NextScaleState) -> NextScaleState:
        """Spend one forward pass: score and draw the next scale. Advances the state in place."""
        k = len(state.scales)
        state.inputs.append(state.tokenizer.shrink(state.total, state.tokenizer.scales[k]))
        if state.drafter is not None and k == self.refine_scale:
            prepared = self._prepare(state.backbone, state.condition)
            state.session, out = state.backbone.open(prepared, features=torch.cat(state.inputs, dim=1))
            state.drafter = None
            return self._finish_step(state, out.logits[:, :, -state.sizes[k] :])
        model = state.backbone if state.drafter is None else state.drafter
        if k == self.guidance_stop_scale:
            model.drop_guidance(state.session)
        return self._finish_step(state, model.step(state.session, state.inputs[-1]).logits)

    def finish(self, state: NextScaleState) -> SamplerOutput:
        """Return codes by scale, the summed latents ``[B, C, h, w]`` and statistics."""
        out = super().finish(state)
        out.codes, out.latents = state.scales, state.total
        out.stats.num_forwards -= state.num_drafter_forwards
        out.stats.commit_trace = state.trace[:, : sum(part.shape[1] for part in state.scales)].clone()
        return out

    def draw_scale(self, state: NextScaleState, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the next scale from its logits ``[G, B, n_k, V]``: codes ``[B, n_k]`` and their vectors ``[B, n_k, C]``.

        For bits the logits are ``[G, B, n_k, 2 d]`` and the codes ``[B, n_k, d]``: the head knows. The one place that knows what a
        backbone says about a position; override it for anything else.
        """
        k = len(state.scales)
        start = sum(state.sizes[:k])
        positions = torch.arange(start, start + state.sizes[k], device=logits.device).expand(len(state.seeds), -1)
        shape = (len(state.seeds), state.sizes[k], logits.shape[-1])
        scale = self.guidance_at(k, len(state.sizes))
        head = HEADS[len(token_shape(state.tokenizer))](
            temperature=self.temperature_at(k, len(state.sizes)),
            top_k=self._at("top_k", k),
            top_p=self._at("top_p", k),
            noise=None if state.noise is None else state.noise(k, Stream.GUMBEL, shape),
        )
        codes = head.draw(logits, state.keys, positions, scale)
        fixed = None if state.forced is None else state.forced[k].to(codes.device)
        if fixed is not None:
            codes = torch.where(fixed >= 0, fixed.to(codes.dtype), codes)
        vectors = state.tokenizer.lookup(codes)
        if self.smooth_at(k):
            assert isinstance(head, CategoricalHead)  # checked: there is a codebook
            warp = head.warp(scale) | ({"top_k": 0, "top_p": 1.0} if self.smooth == UNFILTERED else {})
            soft = self._soft_vectors(state, warp_logits(logits, **warp), positions, k)
            vectors = soft if fixed is None else torch.where((fixed >= 0)[..., None], vectors, soft)
        return codes, vectors

    def _finish_step(self, state: NextScaleState, logits: Tensor) -> NextScaleState:
        """Draw the scale that ``logits`` predict and add it to the picture."""
        codes, vectors = self.draw_scale(state, logits)
        state.total = state.tokenizer.accumulate(state.total, vectors, len(state.scales))
        place = slice(start := sum(state.sizes[: len(state.scales)]), start + codes.shape[1])
        state.tokens[:, place], state.trace[:, place] = codes, len(state.scales)
        state.scales.append(codes)
        state.num_forwards += 1
        state.num_drafter_forwards += state.drafter is not None
        num_scales = len(state.sizes)
        state.done = len(state.scales) == min(num_scales, self.stop_scale or num_scales)
        return state

    def _soft_vectors(self, state: NextScaleState, logits: Tensor, positions: Tensor, k: int) -> Tensor:
        """A Gumbel-softmax mixture of code vectors ``[B, n_k, C]``, sharper at finer scales."""
        ratio = self.ratio(k, len(state.sizes))
        start, share, floor = SMOOTH_TEMPERATURE
        if state.noise is None:
            noise = gumbel(state.keys, positions, logits.shape[-1], Stream.FRESH)
        else:
            noise = state.noise(k, Stream.FRESH, tuple(logits.shape))  # type: ignore[arg-type]
        weights = ((logits * (1 + ratio) + noise) / max(start * (1 - share * ratio), floor)).softmax(-1)
        return weights @ state.tokenizer.codebook.float()

    def _widest_guidance(self, model: Any) -> float:
        """1 where no scale is guided, so that the unconditional branch is not run at all."""
        num_scales = len(model.scales)
        guided = any(self.guidance_at(k, num_scales) != 1.0 for k in range(num_scales))
        if isinstance(self.guidance_scale, tuple):
            return max(self.guidance_scale, key=lambda scale: abs(scale - 1)) if guided else 1.0
        return self.guidance_scale if guided else 1.0

    def departures(self, state: NextScaleState) -> list[str]:
        """One line for each setting with which the distribution is no longer the backbone's."""
        notes = []
        if self.smooth:
            notes.append("smooth: code vectors are soft mixtures, the codes are not what was decoded")
        if len(state.scales) < len(state.sizes):
            notes.append(f"stopped after {len(state.scales)} of {len(state.sizes)} scales")
        if state.forced is not None:
            notes.append("some codes were fixed beforehand: coarse codes do not know of finer ones that are kept")
        if state.num_drafter_forwards:
            notes.append(f"the first {state.num_drafter_forwards} scales were drawn by the drafter")
        return notes

    def _check_model(self, name: str, model: Any, backbone: Any) -> None:
        """Raise ``ValueError`` unless tokenizer or drafter fit the backbone, and the settings its scales."""
        if tuple(model.scales) != tuple(backbone.scales):
            raise ValueError(
                f"{name} and backbone must have the same scales, got {list(model.scales)} and {list(backbone.scales)}"
            )
        bits = [getattr(part, "num_bits", None) for part in (model, backbone)]
        if bits[0] != bits[1]:
            got = " and ".join("codes" if count is None else f"{count} bits" for count in bits)
            raise ValueError(f"{name} and backbone must have the same tokens, got {got} a position")
        if self.smooth and bits[0] is not None:
            raise ValueError("smooth mixes vectors of a codebook, and this model draws bits; leave it False")
        if model.codebook_size != backbone.codebook_size:
            sizes = f"{model.codebook_size} and {backbone.codebook_size}"
            raise ValueError(f"{name} and backbone must have the same codebook size, got {sizes}")
        count = len(backbone.scales)
        for setting in LISTS:
            if len(given := self._each(setting)) not in (1, count):
                raise ValueError(f"{setting} must be a number or a list of {count}, one a scale, got {len(given)}")
        for setting in SCALE_NUMBERS:
            if getattr(self, setting) is not None:
                check_integer(setting, getattr(self, setting), low=0, high=count, hint=f"the model has {count} scales")
