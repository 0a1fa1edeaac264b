"""What every sampler is: a small frozen object that holds settings, and the loop that runs it.

A sampler keeps no state, so one object serves many threads. Everything that changes while codes are drawn lives in an
explicit state: ``start`` makes it, ``step`` spends one forward pass of the backbone on it, ``stream`` yields it after
every step and ``sample`` runs to the end. Settings round-trip through diffusers' configuration format, so samplers
are stored in pipeline folders and swapped like schedulers.

Letters: B images, N code positions, V codes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

import vargen
from vargen.features import Feature
from vargen.outputs import DecodeStats, Guarantee, SamplerOutput, peak_memory
from vargen.protocols import Condition, ConditionInput, Model, Tokenizer
from vargen.random import seed_tensor
from vargen.samplers.registry import OWN_WORDS, SAMPLERS, old_names, renamed, same_sampler
from vargen.samplers.state import DecodeState
from vargen.samplers.window.controller import is_controller
from vargen.validation.checks import (
    check_choice,
    check_integer,
    check_names,
    check_number,
    check_seeds,
    nearest,
    shown,
)
from vargen.validation.folders import Stored
from vargen.validation.other_words import INSTEAD

GUIDANCE_SCHEDULES = ("constant", "linear")
MAX_DRAFTS = (
    256  # what one iteration may draft, in passes of a drafter one after the other; published methods stay below 30
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What a call may give beside condition, seeds, tokenizer and drafter; samplers that take more extend it."""


@dataclass(frozen=True)
class Run:
    """One call of a sampler, checked."""

    backbone: Any
    condition: Condition  # as ``prepare_condition`` returned it
    given: ConditionInput  # as the caller gave it, for a second model
    seeds: list[int]
    keys: Tensor  # [B] int64 the seeds on the backbone's device
    tokenizer: Tokenizer | None
    drafter: Any

    def with_drafter(self, drafter: Any) -> Run:
        """The same call with another drafter."""
        return dataclasses.replace(self, drafter=drafter)


Callback = Callable[[int, Any], None]  # step, state (a DecodeState)


class SamplerConfig(FrozenDict):
    """Settings of a sampler, to be read and copied: changing them would change nothing that the sampler reads.

    Raises:
        ValueError: an attempt to change one.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(settings or {})
        object.__setattr__(self, "_closed", True)

    def _refuse(self, name: Any = None, value: Any = ..., /, *_: Any, **__: Any) -> Any:
        change = f"{name}={shown(value)}" if isinstance(name, str) and value is not ... else "name=value"
        raise ValueError(
            f"a sampler's config cannot be changed; use pipe.sampler = pipe.sampler.replace({change}), or pass {change} to "
            "the call of the pipeline"
        )

    def __setitem__(self, name: str, value: Any) -> None:
        if getattr(self, "_closed", False) and not name.startswith(
            "_"
        ):  # diffusers adds its version when it writes a file
            self._refuse(name, value)
        super().__setitem__(name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_closed", False):
            self._refuse(name, value)
        object.__setattr__(self, name, value)

    __delitem__ = pop = popitem = setdefault = update = clear = move_to_end = __ior__ = _refuse  # type: ignore[assignment]

    def __or__(self, other: Any) -> dict[str, Any]:  # type: ignore[override]
        return dict(self) | dict(other)

    def __ror__(self, other: Any) -> dict[str, Any]:  # type: ignore[override]
        return dict(other) | dict(self)

    def copy(self) -> SamplerConfig:
        """The same settings once more."""
        return type(self)(dict(self))

    def __reduce__(self) -> Any:
        return type(self), (dict(self),)


class _Renaming(type):
    """Lets classes be built with the settings of earlier versions, see ``registry.renamed``."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        name, settings = renamed(cls, settings)
        if name != cls.__name__:  # these settings are another sampler's today
            return find_sampler(name)(*args, **settings)
        return super().__call__(*args, **settings)


@dataclass(frozen=True, kw_only=True)
class Sampler(Stored, SchedulerMixin, ConfigMixin, metaclass=_Renaming):
    """Base of all samplers: shared settings, configuration format, checks and the common loop.

    Args:
        guidance_scale: classifier-free guidance ``u + guidance_scale * (c - u)``; 1 is off and skips the
            unconditional branch.
        temperature: divides the guided logits; 0 is greedy.
        top_k: keep the ``top_k`` most likely codes, ties with the last one kept; 0 is off.
        top_p: keep the most likely codes up to this mass, the one that crosses it included; 1 is off.

    Raises:
        ValueError: a setting out of its range, or an unknown one (the nearest known name is shown).
    """

    config_name: ClassVar[str] = "sampler_config.json"
    guarantee: ClassVar[Guarantee] = "exact"
    weakened: ClassVar[Guarantee] = "heuristic"  # what a run keeps that has ``departures``
    required_features: ClassVar[frozenset[str]] = frozenset()  # of the backbone's session, see vargen.protocols
    inputs_type: ClassVar[type[Inputs]] = Inputs

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __new__(cls, *_args: Any, **settings: Any) -> Self:  # noqa: D102
        check_names(
            settings, cls.setting_names(), cls.__name__, INSTEAD
        )  # before the constructor, which names no neighbour
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.check()
        settings = {name: plain_number(getattr(self, name)) for name in self.setting_names()}
        for name, value in settings.items():
            object.__setattr__(self, name, value)
        # an object that chooses widths is not for a file, which asks for the library's own in its place
        settings = {name: "auto" if is_controller(value) else value for name, value in settings.items()}
        object.__setattr__(self, "_internal_dict", SamplerConfig({"_class_name": type(self).__name__, **settings}))

    def check(self) -> None:
        """Raise ``ValueError`` for a setting out of range; subclasses add their own settings."""
        for value in self._each("guidance_scale"):
            check_number("guidance_scale", value, low=0.0, hint="1 is off")
        for value in self._each("temperature"):
            check_number("temperature", value, low=0.0, hint="0 is greedy")
        for value in self._each("top_k"):
            check_integer("top_k", value, low=0, hint="0 is off")
        for value in self._each("top_p"):
            check_number("top_p", value, low=0.0, high=1.0, open_low=True, hint="1 is off")

    def _each(self, name: str) -> tuple[Any, ...]:
        """The values of a setting: one, where a sampler does not take several."""
        return (getattr(self, name),)

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        """Names of all settings, shared ones first."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """What ``sampler.compatibles`` lists: the samplers for backbones of the same kind; diffusers asks for this name."""
        needs = cls.required_features
        found: list[type] = [
            c for c in known_samplers() if c.required_features <= needs or needs <= c.required_features
        ]
        return found if cls in found else [*found, cls]

    def replace(self, **overrides: Any) -> Self:
        """Return a copy with some settings changed.

        Example:
            >>> from vargen.samplers.window.next_token import NextTokenSampler
            >>> NextTokenSampler(top_k=64).replace(temperature=0.9).top_k
            64
        """
        check_names(overrides, (*self.setting_names(), *old_names(type(self))), type(self).__name__, INSTEAD)
        own = {name: getattr(self, name) for name in self.setting_names()}
        again: Self = type(self)(**(own | renamed(type(self), overrides, whole=False)[1]))
        return again

    @classmethod
    def from_config(cls, config: Any, return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """Build the sampler from a configuration, with some settings overridden.

        A configuration of another sampler gives its shared settings, so that samplers swap like schedulers:
        ``pipe.sampler = SpeculativeJacobiSampler.from_config(pipe.sampler.config, window=32)``. Called on
        ``Sampler`` itself it builds the class that the configuration names.

        Raises:
            ValueError: unknown setting; the nearest known one is shown.
        """
        if not isinstance(config, dict):
            raise ValueError(f"config must be a dictionary such as sampler.config, got {type(config).__name__}")
        named = config.get("_class_name", cls.__name__)
        if cls is Sampler:
            return find_sampler(named).from_config(config, return_unused_kwargs, **overrides)
        known = (*cls.setting_names(), *old_names(cls))
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        ours = same_sampler(named, cls.__name__)
        if ours:  # settings of another sampler may be unknown here, our own may not
            check_names(settings, known, cls.__name__)
        check_names(overrides, known, cls.__name__, INSTEAD)
        given = {name: value for name, value in settings.items() if name in known and (ours or _shared(name, value))}
        unused = {name: value for name, value in settings.items() if name not in given}
        sampler = cls(**(renamed(cls, given, whole=False)[1] | renamed(cls, overrides, whole=False)[1]))
        return (sampler, unused) if return_unused_kwargs else sampler

    def sample(
        self,
        backbone: Model,
        condition: ConditionInput,
        *,
        seeds: Sequence[int] | Tensor | int,
        tokenizer: Tokenizer | None = None,
        drafter: Any = None,
        negative: ConditionInput | None = None,
        callback: Callback | None = None,
        **inputs: Any,
    ) -> SamplerOutput:
        """Draw the codes of B images.

        Args:
            backbone: a model that opens sessions with the features in ``required_features``.
            condition: what the backbone's ``prepare`` takes: class ids ``[B]``, attribute ids, caption features.
            seeds: B 64-bit integers, one an image; an image depends on its own seed only.
            tokenizer: only for samplers that read the codebook.
            drafter: a small backbone, only for samplers that draft with one.
            negative: what guidance leads away from instead of the model's empty condition, in the form of ``condition``;
                needs guidance. A drafter keeps the empty one, which exact rules bear.
            callback: called as ``callback(step, state)`` after every forward pass, prefill included.
            inputs: fields of ``inputs_type``, such as ``forced_codes``.

        Returns:
            ``codes [B, N]`` int64 in the backbone's order, the seeds, and statistics of the run.
        """
        given = {"tokenizer": tokenizer, "drafter": drafter, "negative": negative, "callback": callback}
        *_, last = self.stream(backbone, condition, seeds=seeds, **given, **inputs)
        return self.finish(last)

    def stream(
        self,
        backbone: Model,
        condition: ConditionInput,
        *,
        seeds: Any,
        callback: Callback | None = None,
        **options: Any,
    ) -> Iterator[Any]:
        """Yield the state after every forward pass; the arguments are those of ``sample``."""
        state = self.start(backbone, condition, seeds=seeds, **options)
        while True:
            if callback is not None:
                callback(state.num_forwards - 1, state)
            yield state
            if state.done:
                return
            state = self.step(state)

    def start(
        self,
        backbone: Model,
        condition: ConditionInput,
        *,
        seeds: Sequence[int] | Tensor | int,
        tokenizer: Tokenizer | None = None,
        drafter: Any = None,
        negative: ConditionInput | None = None,
        **inputs: Any,
    ) -> Any:
        """Check the arguments (those of ``sample``), run the prefill and return the first state.

        Raises:
            ValueError: an argument that does not fit, or an unknown input (the nearest known one is shown).
        """
        self.check_backbone(backbone)
        check_inputs(inputs, self.inputs_type, type(self).__name__)
        reader: Any = backbone if negative is None else WithNegative(backbone, negative)
        prepared = self.prepare_condition(reader, condition, drafter)
        listed = check_seeds(seeds, prepared.batch)
        keys = seed_tensor(listed, backbone.device)
        run = Run(backbone, prepared, condition, listed, keys, tokenizer, drafter)
        return self.begin(run, self.inputs_type(**inputs))

    def prepare_condition(self, backbone: Any, condition: ConditionInput, drafter: Any) -> Any:
        """Return the condition as the model of the first step reads it; it says how many images there are (``batch``)."""
        return backbone.prepare(condition, guidance_scale=self.guidance_scale)

    def begin(self, run: Run, inputs: Any) -> DecodeState:
        """Run the prefill and return the first state; ``inputs`` is of ``inputs_type``."""
        raise NotImplementedError

    def step(self, state: Any) -> Any:
        """Spend one forward pass of the backbone; at least one more code of every unfinished image is permanent."""
        raise NotImplementedError

    def finish(self, state: Any) -> SamplerOutput:
        """Collect tokens and statistics of a ``DecodeState``."""
        trace, tokens, departures = state.commit_trace.clone(), state.codes.clone(), self.departures(state)
        stats = DecodeStats(
            num_forwards=state.num_forwards,
            num_drafter_forwards=state.num_drafter_forwards,
            num_head_rows=state.num_head_rows,
            forwards_per_image=trace.amax(-1) + 1,
            commit_trace=trace,
            guarantee=self.weakened if departures else self.guarantee,
            notes=[*state.notes, *departures],
            peak_memory=peak_memory(torch.device(state.backbone.device)),
            extra=dict(state.counts),
        )
        continuous = tokens.is_floating_point()
        codes, latents = (None, tokens) if continuous else (tokens, None)
        return SamplerOutput(codes=codes, seeds=state.seeds, stats=stats, latents=latents)

    def departures(self, state: Any) -> list[str]:
        """One line for each way in which this run left the sampler's guarantee."""
        return []

    def check_backbone(self, backbone: Any) -> None:
        """Raise ``ValueError`` unless the backbone offers what this sampler needs; fitting samplers are named."""
        offered = Feature.of(backbone)
        missing = self.required_features - offered
        if missing:
            fitting = [c.__name__ for c in known_samplers() if c.required_features and c.required_features <= offered]
            raise ValueError(
                f"{type(self).__name__} needs a backbone with {', '.join(sorted(missing))}; {type(backbone).__name__} "
                f"offers {', '.join(sorted(offered)) or 'none of it'}. Samplers that fit: {', '.join(fitting) or 'none'}"
            )
        largest = max(self._each("top_k"))
        if largest and largest > (num_codes := int(backbone.codebook_size)):  # continuous tokens have no codebook
            raise ValueError(f"top_k must be in 0..{num_codes}, the codebook size, got {shown(largest)} (0 is off)")


class WithNegative:
    """A backbone whose second branch reads a condition of the caller's instead of the model's empty one.

    Raises:
        ValueError: a model that has one empty condition and takes no other.
    """

    def __init__(self, backbone: Any, negative: ConditionInput) -> None:
        if "negative" not in inspect.signature(getattr(backbone, "prepare", object)).parameters:
            raise ValueError(f"{type(backbone).__name__} takes no negative condition; leave it out")
        self.backbone, self.negative = backbone, negative

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)

    def prepare(self, condition: Any, *, guidance_scale: Any = 1.0, **options: Any) -> Any:
        """As the backbone's own."""
        return self.backbone.prepare(condition, guidance_scale=guidance_scale, negative=self.negative, **options)


def check_inputs(given: Iterable[str], kind: type[Inputs], owner: str) -> None:
    """Raise ``ValueError`` for the first input of a call that is no field of ``kind``, naming the nearest one."""
    known = [field.name for field in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            if name in INSTEAD:
                raise ValueError(f"{owner} takes no input {name!r}: {INSTEAD[name]}")
            near = f"; did you mean {found!r}?" if (found := nearest(name, known)) else ";" if known else ""
            inputs = f" Inputs: {', '.join(known)}" if known else ""
            raise ValueError(f"{owner} takes no input {shown(name)}{near}{inputs}")


def _shared(name: str, value: Any) -> bool:
    """Whether a setting means the same to all samplers: their own words do not, nor do windows that are no number."""
    if name in ("guidance_scale", "temperature", "top_k", "top_p") and isinstance(value, list | tuple):  # one a scale
        return False
    return name not in OWN_WORDS and not (name in ("window", "num_draft_tokens") and not isinstance(value, Integral))


def plain_number(value: Any) -> Any:
    """A fraction or a number of numpy as Python's own: tensors do not multiply with every kind, JSON does not hold them."""
    if type(value) in (bool, int, float):
        return value
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value


def known_samplers() -> list[type[Sampler]]:
    """All public samplers, by name."""
    return [getattr(vargen, name) for name in sorted(SAMPLERS.values())]


def find_sampler(name: str) -> type[Sampler]:
    """Return the public sampler class of that name; an unknown name raises and shows the nearest."""
    check_choice("sampler", name, sorted(SAMPLERS.values()))
    found: type[Sampler] = getattr(vargen, name)
    return found
