"""What a checkpoint must contain, and what a comparison with it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint of one family and size contains."""

    shapes: dict[str, Shape]
    size: str | None = None  # published name, or None when the sizes were only inferred
    num_parameters: int | None = None  # published count, buffers left out
    buffers: tuple[str, ...] = ()  # patterns of entries that are no parameters
    optional: tuple[str, ...] = ()  # patterns of keys that may be there and are ignored


@dataclass(frozen=True)
class VerifyReport:
    """Result of ``verify_checkpoint``; ``ok`` means that keys, shapes and parameter count are the expected ones."""

    path: str
    family: str | None
    size: str | None
    num_entries: int
    num_parameters: int
    expected_parameters: int | None
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    wrong_shapes: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)  # key -> (in the file, expected)
    not_finite: list[str] = field(default_factory=list)
    wrong_dtypes: list[str] = field(
        default_factory=list
    )  # keys whose numbers no layer can hold: integers, float8, ...
    dtypes: dict[str, int] = field(default_factory=dict)  # dtype -> number of entries
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the file is what its family and size promise."""
        differences = (self.missing, self.extra, self.wrong_shapes, self.wrong_dtypes, self.not_finite, self.note)
        return not any(differences) and self.expected_parameters in (None, self.num_parameters)


Builder = Callable[[Mapping[str, Tensor]], Manifest]


def shapes_on_meta(
    make: Callable[[], nn.Module], rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
) -> dict[str, Shape]:
    """Keys and shapes of a model that is built without memory; ``rename`` gives them their official names."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in rename(make().state_dict()).items()}
