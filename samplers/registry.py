"""What there is in this room, by name, and what it was called before. Cheap to import: no torch.

A sampler and a drafter have one line here, a rule one word. The aliases let settings and configurations of earlier versions load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from vargen.validation.checks import check_choice

SAMPLERS = {  # short name: public class
    "next-token": "NextTokenSampler",
    "jacobi": "SpeculativeJacobiSampler",
    "grouped-speculative": "GroupedSpeculativeSampler",
    "speculative": "SpeculativeSampler",
    "draft-model": "DraftModelSampler",
    "drafted-jacobi": "DraftedJacobiSampler",
    "lantern": "LanternSampler",
    "next-scale": "NextScaleSampler",
    "next-cell": "NextCellSampler",
    "continuous-masked": "ContinuousMaskedSampler",
    "continuous-speculative": "ContinuousSpeculativeSampler",
    "continuous-jacobi": "ContinuousJacobiSampler",
    "zipar": "ZipARSampler",
    "neighboring": "NeighboringSampler",
    "next-block": "NextBlockSampler",
    "parallel-group": "ParallelGroupSampler",
    "masked": "MaskedSampler",
}

DRAFTERS = {  # drafters without a model, for ``drafter=``
    "row-above": "samplers.drafters.row_above.RowAboveDrafter",
    "token-recycling": "samplers.drafters.token_recycling.TokenRecyclingDrafter",
    "ngram": "samplers.drafters.ngram.NgramDrafter",
}

RULES = (
    "shared-noise",
    "rejection",
    "recursive",
    "k-seq",
    "typical",
)  # of ``SpeculativeSampler``; files in acceptance/

CLASSES = {"DraftModelSampler": "SpeculativeSampler"}  # old name: today's class
OWN_WORDS = ("rule", "carry", "acceptance")  # a sampler does not take these over from another sampler's configuration


@dataclass(frozen=True)
class Alias:
    """Old settings of a sampler."""

    keys: Mapping[str, str] = field(default_factory=dict)  # old name: new name
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)  # new name: {old value: new value}
    gone: tuple[str, ...] = ()  # settings that another sampler has today
    dropped: tuple[str, ...] = ()  # settings that nothing reads any more


RAMP = {"guidance_ramp": "guidance_schedule"}


ALIASES = {
    "SpeculativeJacobiSampler": Alias({"carry": "rule"}, {"rule": {"gumbel": "shared-noise"}}),
    "GroupedSpeculativeSampler": Alias({"carry": "rule"}),
    "DraftModelSampler": Alias(
        {"carry": "rule", "num_drafts": "num_draft_tokens"},
        {"rule": {"gumbel": "shared-noise", "independent": "rejection"}},
    ),
    "LanternSampler": Alias(gone=("acceptance", "typical_epsilon", "typical_alpha")),
    "ScheduleSampler": Alias(RAMP),
    "ParallelGroupSampler": Alias(RAMP | {"num_groups": "num_steps"}),
    "NextScaleSampler": Alias(RAMP),
    "ContinuousMaskedSampler": Alias({"num_iter": "num_steps"}),
    "ContinuousSpeculativeSampler": Alias(
        {"gamma": "num_draft_tokens"}, dropped=("num_iter", "prefill", "inner_temperature")
    ),
}


def alias_of(cls: type) -> Alias:
    """The old settings of a class, or of the nearest class that it extends."""
    return next((ALIASES[base.__name__] for base in cls.__mro__ if base.__name__ in ALIASES), Alias())


def old_names(cls: type) -> tuple[str, ...]:
    """Names of settings that are accepted though the class has none of that name."""
    alias = alias_of(cls)
    return (*alias.keys, *alias.gone, *alias.dropped)


def same_sampler(one: str, other: str) -> bool:
    """Whether two class names mean one sampler."""
    return CLASSES.get(one, one) == CLASSES.get(other, other)


def renamed(cls: type, settings: dict[str, Any], whole: bool = True) -> tuple[str, dict[str, Any]]:
    """Return the class that has these settings today, and the settings under their names of today.

    Args:
        cls: class that they were written for.
        settings: under old or new names.
        whole: all settings of an object are given, so that it can be decided which class has them.

    Raises:
        ValueError: one setting under two names, or old settings that do not go together.
    """
    alias = alias_of(cls)
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name in alias.dropped:
            continue
        new = alias.keys.get(name, name)
        if new in found:
            raise ValueError(
                f"give {new} only once: {' and '.join(n for n in settings if alias.keys.get(n, n) == new)}"
            )
        words = alias.values.get(new, {})
        found[new] = words.get(value, value) if isinstance(value, str) else value
    if not whole or not alias.gone:
        return cls.__name__, found
    if found.get("relaxation") == "none":
        return "SpeculativeSampler", _exact(found)
    if found.get("acceptance", "recursive") != "recursive":
        raise ValueError(f"acceptance {found['acceptance']!r} cannot be relaxed; take SpeculativeSampler(rule=...)")
    return cls.__name__, {name: value for name, value in found.items() if name not in alias.gone}


def _exact(settings: dict[str, Any]) -> dict[str, Any]:
    """``LanternSampler(relaxation="none", ...)`` as ``SpeculativeSampler``."""
    lantern = {"relaxation", "k", "delta", "lam", "residual", "acceptance", "num_nodes"}
    found = {name: value for name, value in settings.items() if name not in lantern}
    found["rule"] = settings.get("acceptance", "recursive")
    tree = settings.get("tree", "chain")
    if tree == "dynamic":
        found["num_draft_tokens"] = settings.get("num_nodes", 59) - 1
    elif tree == "siblings":
        found["num_draft_tokens"] = settings.get("branching", 10)
    else:
        found["num_draft_tokens"] = settings.get("depth", 8)
    return found


def find_drafter(drafter: Any) -> Any:
    """Return a drafter without a model by its name; anything else as it is.

    Raises:
        ValueError: unknown name; the nearest is shown.
    """
    if not isinstance(drafter, str):
        return drafter
    module, _, name = DRAFTERS[check_choice("drafter", drafter, list(DRAFTERS))].rpartition(".")
    return getattr(import_module(f"vargen.{module}"), name)()
