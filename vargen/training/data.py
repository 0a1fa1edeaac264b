"""The data set of a training run, opened as its recipe says."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from vargen.datasets.base import DATASETS, Dataset, Split
from vargen.training.recipe import Recipe, check_keys
from vargen.validation.printable import shown

_TEST_SEED = 1  # added to the recipe's seed: test examples differ in their seed as well as in their split
_STREAMING = {"start", "batch_size", "rank", "world_size"}  # of data sets that are iterated over too; training indexes


def open_dataset(recipe: Recipe, split: Split = "train", kind: str | None = None, **fixed: Any) -> Dataset:
    """Open the data set that a recipe names.

    Args:
        recipe: its ``data.name``, ``data.options``, seed and rates of dropping; test examples keep their conditions.
        split: which part.
        kind: "image" or "clip", if the caller needs one of them.
        fixed: arguments of the data set that the caller decides.

    Raises:
        ValueError: unknown data set or option, or not of this kind.
    """
    data = recipe.data
    if data.name not in DATASETS:
        raise ValueError(f"data.name must be one of {', '.join(DATASETS)}, got {shown(data.name)}")
    module, name = DATASETS[data.name]
    made = getattr(import_module(module), name)
    if kind not in (None, made.kind):
        got = f"{data.name!r} ({made.kind}s)"
        raise ValueError(f"data.name must be a set of {kind}s for task {recipe.task!r}, got {got}")
    rates = {"attribute_dropout": data.attribute_dropout, "null_dropout": data.null_dropout}
    refused = {"seed", "split", *rates, *fixed, *_STREAMING}
    named = [key for key, p in inspect.signature(made).parameters.items() if p.kind != p.VAR_KEYWORD]
    check_keys(data.options, [key for key in named if key not in refused], "data.options")
    if split == "test":
        rates = dict.fromkeys(rates, 0.0)
    seed = recipe.seed + (_TEST_SEED if split == "test" else 0)
    opened: Dataset = made(seed, split=split, **rates, **fixed, **data.options)
    return opened
