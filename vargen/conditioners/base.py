"""What every conditioner does: texts or labels in, the condition of a backbone out.

Letters: P prompts or labels, T condition positions, C width of text features.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

from diffusers import ConfigMixin
from diffusers.utils import PushToHubMixin
from torch import Tensor

from vargen.protocols import ConditionInput
from vargen.validation.folders import Stored, check_component, one_line
from vargen.validation.printable import shown
from vargen.validation.reading import local_path

MAX_ROWS = 2**16  # prompts or labels at once
MAX_CHARACTERS = 10_000  # of a prompt; conditioners that read less allow less


class Conditioner(Stored, ConfigMixin, PushToHubMixin):
    """Base of the conditioners: calling convention, and saving inside a pipeline folder.

    ``encode(prompts=None, class_labels=None)`` takes one of the two as a list and returns what the backbone's
    ``prepare`` takes, one row for each entry, on the CPU or on the conditioner's own device.
    """

    config_name: ClassVar[str] = "conditioner_config.json"

    def encode(
        self, prompts: Sequence[str] | None = None, class_labels: Sequence[int | str] | None = None
    ) -> ConditionInput:
        """Turn prompts or class labels into a condition."""
        raise NotImplementedError

    def encode_negative(self, prompts: Sequence[str]) -> ConditionInput:
        """What guidance leads away from; the empty text where a model has no empty condition of its own."""
        return self.encode(prompts=prompts)

    def check(self, prompts: Sequence[str] | None = None, class_labels: Sequence[int | str] | None = None) -> None:
        """Raise ``ValueError`` for what ``encode`` refuses, without the work of a network."""
        one_of(prompts, class_labels)

    def __call__(self, items: Any) -> Any:
        """Turn one prompt or label, or a list of them, into a condition; numbers are labels, texts are prompts."""
        if isinstance(items, Tensor):
            if items.is_meta or items.ndim > 1 or items.numel() > MAX_ROWS:
                raise ValueError(f"labels must be a tensor [P] of at most {MAX_ROWS}, got {list(items.shape)}")
            items = items.tolist()
        if not isinstance(items, str | Integral | list | tuple | range):
            raise ValueError(f"a conditioner takes a prompt, a label or a list of them, got {type(items).__name__}")
        listed: list[Any] = [items] if isinstance(items, str | Integral) else list(items[: MAX_ROWS + 1])
        if listed and all(isinstance(item, Integral) for item in listed):
            return self.encode(class_labels=listed)
        return self.encode(prompts=listed)

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Write the configuration to a folder; ``push_to_hub=True`` and its options as in diffusers."""
        hub = ("push_to_hub", "repo_id", "commit_message", "private", "create_pr", "token")
        given = {name: value for name, value in kwargs.items() if name in hub}
        self.save_config(str(local_path(save_directory)), **given)

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], **kwargs: Any) -> Self:  # type: ignore[override]
        """Read a conditioner from a folder, or from that of a pipeline with its name as ``subfolder``.

        Raises:
            ValueError: the folder holds code, or settings that are missing, damaged or do not fit.
        """
        place, kwargs = cls.find_component(folder, **kwargs)
        with one_line(place):
            if isinstance(place, Path):
                check_component(place, cls)
                kwargs = {}
            return cls.from_config(cls.load_config(place, **kwargs))


def one_of(prompts: Sequence[Any] | None, class_labels: Sequence[Any] | None) -> Sequence[Any]:
    """Return whichever was given and is not empty.

    Raises:
        ValueError: both, neither, an empty list, or one of more than 65,536 entries; a prompt that is no text or too long.
    """
    if (prompts is None) == (class_labels is None):
        raise ValueError(f"give either prompts or class_labels, got {'both' if prompts is not None else 'neither'}")
    given = prompts if prompts is not None else class_labels
    assert given is not None
    if not isinstance(given, list | tuple | range):
        raise ValueError(f"a conditioner takes a list with at least one entry, got {type(given).__name__}")
    if not given:
        raise ValueError("a conditioner takes a list with at least one entry, got an empty one")
    if len(given[: MAX_ROWS + 1]) > MAX_ROWS:  # the length of a range may be beyond len()
        raise ValueError(
            f"a conditioner takes a list of at most {MAX_ROWS} entries, got a longer one; cut it in parts"
        )
    if prompts is not None:
        for prompt in prompts:
            check_prompt(prompt)
    return given


def warn_of_cut(tokenizer: Any, captions: Sequence[str], mask: Tensor) -> None:
    """Say which captions are longer than the text model takes: they were cut. Only rows without padding are counted again.

    Args:
        tokenizer: called with texts as those of transformers.
        captions: P texts.
        mask: [P, T], True = a token that is read.
    """
    full = mask.bool().all(1).tolist()
    for caption, whole in zip(captions, full, strict=True):
        if whole and (count := len(tokenizer(caption, truncation=False)["input_ids"])) > mask.shape[1]:
            warnings.warn(
                f"a caption has {count} tokens and the text model takes {mask.shape[1]}: the rest is cut, after "
                f"{shown(caption[:40])}...; shorten it",
                stacklevel=3,
            )


def check_prompt(text: Any, name: str = "a prompt", longest: int = MAX_CHARACTERS) -> None:
    """Raise ``ValueError`` for a prompt that is no text that can be written down, or too long."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, got {type(text).__name__}")
    if len(text) > longest:
        raise ValueError(f"{name} may have {longest} characters, got {len(text)}; shorten it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds half a character (a lone surrogate) at place {error.start}; remove it"
        ) from None
