"""What a model is asked to draw for an evaluation: one prompt or class label an image, balanced and reproducible."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vargen.metrics.heroes import HeroLabels, hero_labels
from vargen.validation.printable import printable, shown
from vargen.validation.reading import read_text

MAX_IMAGES = 1_000_000  # of one evaluation: its prompts and labels are kept in memory
MAX_PROMPT_FILE = 2**28  # bytes


@dataclass(frozen=True)
class Conditions:
    """Prompts or class labels, one an image, and where they come from; ``heroes`` where their attributes are known."""

    source: str
    prompts: list[str] | None = None
    class_labels: list[int] | None = None
    heroes: HeroLabels | None = None

    def __len__(self) -> int:
        return len(self.values())

    def values(self) -> list[Any]:
        """Return the prompts or the labels."""
        return list(self.prompts if self.prompts is not None else self.class_labels or [])

    def arguments(self, start: int, stop: int) -> dict[str, Any]:
        """Return the keyword of a pipeline call for some of the images."""
        if self.prompts is not None:
            return {"prompt": self.prompts[start:stop]}
        return {"class_labels": (self.class_labels or [])[start:stop]}

    def first(self, num: int) -> Conditions:
        """Return the first ``num`` of them."""
        heroes = self.heroes
        if heroes is not None:
            heroes = HeroLabels(heroes.attributes[:num], heroes.visible[:num])
        prompts = None if self.prompts is None else self.prompts[:num]
        labels = None if self.class_labels is None else self.class_labels[:num]
        return Conditions(self.source, prompts=prompts, class_labels=labels, heroes=heroes)

    def digest(self) -> str:
        """Return hex digits that change with any prompt or label."""
        return hashlib.sha256(json.dumps(self.values()).encode()).hexdigest()[:16]


def hero_conditions(num: int, *, held_out: bool = False, full: bool = False) -> Conditions:
    """Return captions of fresh test heroes, drawn with the heroes' own distribution.

    Args:
        num: how many.
        held_out: only (base, weapon) pairs that the training split never shows.
        full: captions also say which slots are empty. Without it these are left to the model, which may fill them: a
            model that follows the heroes' distribution then wears more than the heroes of the reference do.
    """
    check_num(num)
    heroes = hero_labels(num, "prompts", held_out=held_out)
    kind = "held-out pairs" if held_out else "any pair"
    prompts, what = (heroes.full_captions, "full captions") if full else (heroes.captions, "captions")
    return Conditions(f"{what} of fresh test heroes ({kind})", prompts=prompts, heroes=heroes)


def check_num(num: int) -> None:
    """Raise ``ValueError`` for more images than an evaluation can hold the prompts of."""
    if num > MAX_IMAGES:
        raise ValueError(f"an evaluation draws at most {MAX_IMAGES:,} images, got {shown(num)}")


def prompt_file(path: str | Path, num: int) -> Conditions:
    """Read one prompt a line and repeat the list until there are ``num``: equally often, give or take one."""
    try:
        lines = [line.strip() for line in read_text(path, limit=MAX_PROMPT_FILE).splitlines()]
    except ValueError as error:
        raise ValueError(f"cannot read prompts from {printable(path)}: {error}") from error
    check_num(num)
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"no prompts in {printable(path)}: write one a line")
    return Conditions(
        f"{len(prompts)} prompts of a file, in turn", prompts=[prompts[i % len(prompts)] for i in range(num)]
    )


def class_conditions(num_classes: int, num: int) -> Conditions:
    """Return class labels in turn: equally often, give or take one."""
    if num_classes < 1:
        raise ValueError(f"the number of classes must be at least 1, got {shown(num_classes)}")
    check_num(num)
    return Conditions(f"{num_classes} classes, balanced", class_labels=[i % num_classes for i in range(num)])
