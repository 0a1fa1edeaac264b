"""Training recipes: TOML files read into frozen dataclasses.

A recipe says everything that decides the weights. Unknown keys are refused, so that a misspelt setting cannot pass for a
default.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from vargen.validation.printable import printable, shown
from vargen.validation.reading import check_plain, local_path, parse_toml, read_toml

RECIPES_FOLDER = Path(__file__).parent / "recipes"
MAX_STEPS = 10**9
MAX_OPTION = 10**7  # whole numbers among a task's options count images, iterations and the like
ALIASES = {"law_weight": "distribution_weight"}  # older names of tasks' options -> today's
RESUMABLE = (  # sections and settings that a resumed run may change
    "schedule",
    "log",
    "compile",
    "optimizer.lr",
    "optimizer.muon_lr",
    "optimizer.weight_decay",
    "optimizer.max_grad_norm",
    "optimizer.non_finite",
    "optimizer.max_skipped",
    "data.batch_size",
    "data.num_eval_images",
)
_NAME = re.compile(r"\w[\w.+ -]{0,99}")  # of a folder in runs/: no separators, no control characters, no dots alone


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where examples come from."""

    name: str = "heroes"  # a key of vargen.datasets.base.DATASETS
    options: Mapping[str, Any] = field(default_factory=dict)  # constructor arguments of the data set
    batch_size: int = 32  # images a step over all processes
    attribute_dropout: float = 0.0  # share of examples that forget single attributes, each at a rate of its own
    null_dropout: float = 0.0  # share of examples that forget all of them: the unconditional branch of guidance
    num_eval_images: int = 256  # of the test split

    def __post_init__(self) -> None:
        _between(self, "data", 1, 2**16, "batch_size")
        _between(self, "data", 1, 10**6, "num_eval_images")
        _between(self, "data", 0, 1, "attribute_dropout", "null_dropout")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights move."""

    name: str = "adamw"  # or "muon": Muon for matrices inside the blocks, AdamW for the rest
    lr: float = 1e-3
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0 = no clipping
    non_finite: str = "skip"  # a step whose loss or gradient is NaN or infinite: "skip" it, or "stop"
    max_skipped: int = 20  # so many in a row; one more stops the run

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optimizer.name must be 'adamw' or 'muon', got {shown(self.name)}")
        for name in ("lr", "muon_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} must be > 0, got {shown(getattr(self, name))}")
        if self.non_finite not in ("skip", "stop"):
            raise ValueError(f"optimizer.non_finite must be 'skip' or 'stop', got {shown(self.non_finite)}")
        _between(self, "optimizer", 0, 1e6, "weight_decay", "max_grad_norm")
        _between(self, "optimizer", 0, MAX_STEPS, "max_skipped")
        if len(self.betas) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1), got {shown(self.betas)}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warm-up, a constant stretch, linear decay to zero: the end can be moved until the decay has begun."""

    num_steps: int = 10_000
    warmup_steps: int = 100
    decay_steps: int = 2_000

    def __post_init__(self) -> None:
        _between(self, "schedule", 1, MAX_STEPS, "num_steps")
        _between(self, "schedule", 0, MAX_STEPS, "warmup_steps", "decay_steps")

    def factor(self, step: int) -> float:
        """Multiplier of the learning rate at ``step``, counted from 0."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        decay = min(1.0, (self.num_steps - step) / (self.decay_steps + 1))
        return min(warmup, decay)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training runs; periods in steps, 0 = never."""

    log_every: int = 20
    eval_every: int = 500
    sample_every: int = 1000
    checkpoint_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        _between(self, "log", 1, MAX_STEPS, "log_every", "keep_checkpoints")
        _between(self, "log", 0, MAX_STEPS, "eval_every", "sample_every", "checkpoint_every")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run.

    ``model`` are the constructor arguments of the task's model and ``options`` the settings of the task itself; both are
    checked by the task.
    """

    name: str
    task: str  # a key of vargen.training.tasks.base.TASKS
    seed: int = 0
    mixed_precision: str = "no"  # "no", "fp16", "bf16": as accelerate names them
    compile: bool = False  # torch.compile the training forward
    ema_decay: float = 0.999
    model: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name must be the plain name of a folder (letters, digits, spaces, '.', '_', '-' and '+'; at most 100), "
                f"got {shown(self.name)}; choose the run folder with --output"
            )
        if self.mixed_precision not in ("no", "fp16", "bf16"):
            raise ValueError(f"mixed_precision must be 'no', 'fp16' or 'bf16', got {shown(self.mixed_precision)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {shown(self.ema_decay)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must lie in [0, 2^31), got {shown(self.seed)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, as ``parse_recipe`` reads them."""
        return asdict(self)


_SECTIONS = {"data": DataConfig, "optimizer": OptimizerConfig, "schedule": ScheduleConfig, "log": LogConfig}


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        recipe: TOML file, or the name of a shipped recipe such as ``"heroes32-llamagen"``.
        overrides: ``"section.key=value"`` strings, values in TOML syntax (bare words are taken as strings).

    Raises:
        ValueError: no such recipe, not TOML, unknown or unusable keys.
    """
    path = _find(recipe)
    try:
        table = read_toml(path)
    except ValueError as error:
        raise ValueError(f"cannot read the recipe {printable(path)}: {error}") from None
    for override in overrides:
        _override(table, override)
    return parse_recipe(table)


def parse_recipe(table: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain dictionaries; the inverse of ``Recipe.to_dict``.

    Raises:
        ValueError: not a table, nested too deeply, unknown or unusable keys, integers beyond all use.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"a recipe must be a table of keys, got {shown(table)}")
    check_plain(table, "the recipe")
    for required in ("name", "task"):
        if required not in table:
            raise ValueError(f"the recipe lacks {required!r}")
    values = dict(table)
    if isinstance(options := values.get("options"), Mapping):
        new = {key: ALIASES.get(key, key) for key in options}
        values["options"] = {key if new[key] in options else new[key]: value for key, value in options.items()}
    for section, kind in _SECTIONS.items():
        if section in values:
            values[section] = build(kind, values[section], section)
    return build(Recipe, values, "")


def build(kind: type[Any], values: Any, section: str) -> Any:
    """Make a dataclass from a table; unknown keys and wrong types are refused by name.

    Args:
        kind: dataclass.
        values: mapping of field names to values.
        section: prefix of the keys in error texts.

    Raises:
        ValueError: not a table, unknown key, wrong type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"[{section}] must be a table of keys, got {shown(values)}")
    hints = get_type_hints(kind)
    check_keys(values, [f.name for f in fields(kind)], section)
    return kind(**{key: _convert(value, hints[key], _join(section, key)) for key, value in values.items()})


def check_keys(values: Mapping[str, Any], allowed: Sequence[str], section: str) -> None:
    """Refuse keys outside ``allowed`` and name the nearest."""
    for key in values:
        if key not in allowed:
            near = difflib.get_close_matches(str(key)[:100], allowed, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
            raise ValueError(f"unknown key {shown(_join(section, str(key)))} in the recipe; {hint}")


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Settings in which two recipes differ: dotted name -> (old value, new value), None where there is none."""
    left, right = dict(_flatten(old.to_dict())), dict(_flatten(new.to_dict()))
    keys = [
        key for key in sorted(left.keys() | right.keys()) if json.dumps(left.get(key)) != json.dumps(right.get(key))
    ]
    return {key: (left.get(key), right.get(key)) for key in keys}


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value of a setting: one that says how training goes on, not what is trained."""
    return key in RESUMABLE or key.partition(".")[0] in RESUMABLE


def _flatten(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in table.items():
        name = _join(prefix, key)
        items += _flatten(value, name) if isinstance(value, Mapping) else [(name, value)]
    return items


def _find(recipe: str | Path) -> Path:
    path = local_path(recipe)
    if path.suffix == ".toml" or path.is_file():
        if not path.is_file():
            raise ValueError(f"recipe file {printable(path)} does not exist")
        return path
    shipped = {p.stem: p for p in sorted(RECIPES_FOLDER.glob("*.toml"))}
    if str(recipe) not in shipped:
        raise ValueError(f"no recipe {shown(str(recipe))}; give a .toml file or one of {', '.join(shipped)}")
    return shipped[str(recipe)]


def _override(table: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    names = key.strip().split(".")
    if not sign or not all(names):
        raise ValueError(f"an override must look like section.key=value, got {shown(override)}")
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ValueError(f"{shown(name)} in the override {shown(override)} is a value, not a section")
    table[names[-1]] = _override_value(text, override)


def _override_value(text: str, override: str) -> Any:
    try:
        found = parse_toml(f"value = {text}", f"the override {shown(override)}")
        return found["value"] if len(found) == 1 else text.strip()
    except ValueError as error:
        if isinstance(error.__cause__, tomllib.TOMLDecodeError):  # a bare word
            return text.strip()
        raise


def _convert(value: Any, hint: Any, key: str) -> Any:
    if hint is float and type(value) is int:
        return float(value)  # at most 128 bits: fits
    if hint in (int, float, str, bool):
        if type(value) is not hint:
            raise ValueError(f"{key} must be {hint.__name__}, got {shown(value)}")
        if hint is float and not math.isfinite(value):
            raise ValueError(f"{key} must be a finite number, got {value}")
        if hint is int and key.startswith("options.") and abs(value) > MAX_OPTION:
            raise ValueError(f"{key} must be at most {MAX_OPTION:,}, got {shown(value)}")
    elif str(hint).startswith("tuple"):
        inner = float if "float" in str(hint) else int
        if not isinstance(value, list | tuple) or not all(_is_number(v) and isinstance(v, int | inner) for v in value):
            raise ValueError(f"{key} must be a list of {inner.__name__}, got {shown(value)}")
        return tuple(inner(v) for v in value)
    elif str(hint).startswith("collections.abc.Mapping") and not isinstance(value, Mapping):
        raise ValueError(f"[{key}] must be a table of keys, got {shown(value)}")
    return value


def _join(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _between(config: Any, section: str, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:  # not of NaN either
            bound = f"> {low - 1}" if low == 1 and value < low else f"in {low}..{high}"
            raise ValueError(f"{section}.{name} must be {bound}, got {shown(value)}")
