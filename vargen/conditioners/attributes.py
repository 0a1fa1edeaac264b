"""Free text to attribute ids, through a vocabulary that knows the words.

Letters: P prompts, T attribute slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from os import PathLike
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from numpy.typing import ArrayLike
from torch import Tensor

from vargen.conditioners.base import Conditioner, one_of
from vargen.validation.checks import Settings, check_choice, check_flag, checked, shown

# name -> module with a function ``parse_prompt``
VOCABULARIES = {"heroes": "vargen.datasets.heroes.compose", "motion": "vargen.datasets.motion.prompts"}


@runtime_checkable
class Vocabulary(Protocol):
    """Anything that reads prompts: a module or an object."""

    parse_prompt: Callable[[str], ArrayLike]  # text -> [T] ids, 0 = unspecified; ValueError names unknown words


def check_vocabulary(name: str, value: Any) -> Any:
    """Return the name of a vocabulary, or an object that is one."""
    if isinstance(value, str):
        return check_choice(name, value, tuple(VOCABULARIES))
    if not isinstance(value, Vocabulary):
        raise ValueError(f"{name} must be a name or have parse_prompt(text), got {shown(value)}")
    return value


class AttributeConditioner(Conditioner):
    """Turn prompts into attribute ids ``[P, T]`` int64; 0 leaves a slot to the model.

    Args:
        vocabulary: name of a shipped vocabulary ("heroes", "motion"), or an object with ``parse_prompt(text) -> [T] ids``. An
            object cannot be saved; give its name to ``VOCABULARIES`` for that.
        fill: whether ``complete`` fills what a prompt leaves open, from the vocabulary's own distribution and by the seed of the
            picture: codes that are drawn in parallel cannot agree on what nobody has decided, and at a low temperature
            a model decides for the same every time.

    Raises:
        ValueError: unknown vocabulary, or ``fill`` with one that has no distribution.

    Example:
        >>> AttributeConditioner()("deep elf with a red cloak").shape[0]
        1
    """

    @checked(Settings({"vocabulary": check_vocabulary, "fill": check_flag}))
    @register_to_config
    def __init__(self, vocabulary: str | Vocabulary = "heroes", fill: bool = False) -> None:
        self._vocabulary, self.fill = vocabulary, fill
        if fill and not hasattr(self.vocabulary, "complete"):
            raise ValueError("fill=True needs a vocabulary with complete(attributes, seeds); leave fill out")

    @property
    def vocabulary(self) -> Vocabulary:
        """What reads the prompts. A module is looked up by its name, for no module can be copied or pickled."""
        named = self._vocabulary
        return import_module(VOCABULARIES[named]) if isinstance(named, str) else named  # type: ignore[return-value]

    def encode(self, prompts: Sequence[str] | None = None, class_labels: Sequence[int | str] | None = None) -> Tensor:
        """Read the prompts.

        Returns:
            [P, T] int64 ids.

        Raises:
            ValueError: an empty or too long prompt, unknown words (the nearest are shown), class labels instead of
                prompts.
        """
        if class_labels is not None:
            raise ValueError("this model is described in words, not by class labels; give prompt='...'")
        rows = [self.vocabulary.parse_prompt(prompt) for prompt in one_of(prompts, None)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def check(self, prompts: Sequence[str] | None = None, class_labels: Sequence[int | str] | None = None) -> None:
        """Read the prompts, which takes no network."""
        self.encode(prompts, class_labels)

    def complete(self, condition: Tensor, seeds: Sequence[int]) -> Tensor:
        """Fill the zeros of ``[B, T]`` ids, row i by ``seeds[i]``; without ``fill`` nothing changes."""
        if not self.fill:
            return condition
        filled = self.vocabulary.complete(condition.cpu().numpy(), np.array(seeds, dtype=np.uint64))  # type: ignore[attr-defined]
        return torch.from_numpy(filled).to(condition)

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Write the configuration to a folder.

        Raises:
            ValueError: the vocabulary is an object without a name.
        """
        if not isinstance(self.config.vocabulary, str):
            raise ValueError(
                "a vocabulary given as an object cannot be saved; add it to VOCABULARIES and pass its name"
            )
        super().save_pretrained(save_directory, **kwargs)
