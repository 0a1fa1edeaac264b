"""Class labels by number or by name; ImageNet's names are in the order of all published ImageNet models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, lru_cache
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from vargen.conditioners.base import Conditioner, check_prompt, one_of
from vargen.datasets.nearest_words import NearestPhrases
from vargen.validation.checks import MAX_ROWS, Settings, check_list, check_text, checked, shown
from vargen.validation.reading import read_text

MAX_CHARACTERS = 200  # of a class name that is looked up; those of ImageNet have at most 30

_IMAGENET = Path(__file__).parents[1] / "assets" / "imagenet" / "classes.txt"


def check_class_names(name: str, value: Any) -> str | tuple[str, ...]:
    """Return "imagenet", or a list of names, no two alike."""
    words = "'imagenet' or a list of names"
    if isinstance(value, str):
        if value != "imagenet":
            raise ValueError(f"{name} must be {words}, got {shown(value)}")
        return value
    names = check_list(name, value, item=check_text, lengths=range(1, MAX_ROWS), words=words)
    if twice := [one for one, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{name} must differ, got {shown(twice[0])} twice")
    return names


class ClassConditioner(Conditioner):
    """Turn class ids and class names into labels ``[P]`` int64.

    Names match whatever their case, hyphens or underscores, as long as that is unambiguous; a prompt is a class name.

    Args:
        class_names: the names in the order of the ids, or "imagenet" for its 1000 (sorted WordNet ids, the order of
            torchvision).

    Raises:
        ValueError: two classes share a name.

    Example:
        >>> ClassConditioner()(["golden retriever", "macaw", "387"])
        tensor([207,  88, 387])
    """

    @checked(Settings({"class_names": check_class_names}))
    @register_to_config
    def __init__(self, class_names: str | Sequence[str] = "imagenet") -> None:
        if isinstance(class_names, str):
            class_names = imagenet_names()
        self.class_names = tuple(class_names)
        self._exact = {name: index for index, name in enumerate(self.class_names)}
        self._ids: dict[str, list[int]] = {}  # several where only case tells: Cardigan the dog, cardigan the garment
        for index, name in enumerate(self.class_names):
            self._ids.setdefault(_plain(name), []).append(index)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def encode(self, prompts: Sequence[str] | None = None, class_labels: Sequence[int | str] | None = None) -> Tensor:
        """Look the labels up.

        Args:
            prompts: class names.
            class_labels: ids, names, or ids written as text.

        Returns:
            [P] int64 labels.

        Raises:
            ValueError: a label out of range or not an integer, an unknown name (the nearest are shown).
        """
        return torch.tensor([self._id(label) for label in one_of(prompts, class_labels)], dtype=torch.int64)

    def check(self, prompts: Sequence[str] | None = None, class_labels: Sequence[int | str] | None = None) -> None:
        """Look the labels up, which takes no network."""
        self.encode(prompts, class_labels)

    def _id(self, label: int | str) -> int:
        if isinstance(label, str):
            if label in self._exact:
                return self._exact[label]
            check_prompt(label, "a class name", MAX_CHARACTERS)
            if found := self._ids.get(_plain(label)):
                if len(found) > 1:
                    choices = " or ".join(f"{self.class_names[index]} ({index})" for index in found)
                    raise ValueError(f"class name {shown(label)} may mean {choices}; write it exactly or give the id")
                return found[0]
            if not re.fullmatch(r"\s*-?\d+\s*", label):
                raise ValueError(self._unknown(label))
            label = int(label)
        if isinstance(label, bool) or not isinstance(label, Integral):
            raise ValueError(f"class label must be an integer or a class name, got {shown(label)}")
        if not 0 <= label < self.num_classes:
            raise ValueError(f"class label must be in 0..{self.num_classes - 1}, got {shown(label)}")
        return int(label)

    def _unknown(self, name: str) -> str:
        plain = _plain(name)
        if not plain:
            return "the class name is empty; give a name or an id"
        near = [known for known in self._ids if plain in known.split()]  # "retriever": all of them
        near += self._nearest.search([plain])[0]
        names = [self.class_names[index] for known in dict.fromkeys(near) for index in self._ids[known]][:5]
        hint = f"; nearest known: {', '.join(map(repr, names))}" if names else ""
        return f"unknown class name {shown(name)}{hint}; ids 0..{self.num_classes - 1} work too"

    @cached_property
    def _nearest(self) -> NearestPhrases:
        return NearestPhrases(self._ids)


@lru_cache(maxsize=1)
def imagenet_names() -> tuple[str, ...]:
    """The 1000 class names of ImageNet-1k, by id, as torchvision (BSD-3-Clause) writes them."""
    return tuple(read_text(_IMAGENET).splitlines())


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[-_\s]+", " ", name.casefold()).split())
