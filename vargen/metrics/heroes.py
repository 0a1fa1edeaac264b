"""Heroes as a reference: fresh real ones without end, and captions with the attributes behind them.

Three splits of the test heroes that share no image: ``reference`` and ``floor`` are two sets of real heroes, whose distance is what a
perfect model would score; ``prompts`` gives the captions that a model is asked to draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vargen.datasets.heroes.atlas import ATLAS_FOLDER, HeroAtlas
from vargen.datasets.heroes.compose import HeroesDataset, caption
from vargen.files import file_digest
from vargen.images import TensorImages

HeroSplit = Literal["reference", "floor", "prompts"]
_VERSION = 1  # raise it when heroes of equal seeds change: cached features are then made anew
_SEEDS: dict[str, int] = {"reference": 7001, "floor": 7002, "prompts": 7003}  # any three different ones


@dataclass(frozen=True)
class HeroLabels:
    """What fresh heroes of the test split are made of."""

    attributes: Tensor  # [N, S] int64, no zeros
    visible: Tensor  # [N, S] bool: a part is there and can be seen

    @property
    def captions(self) -> list[str]:
        """One text an image; empty slots are not mentioned."""
        return [caption(row) for row in self.attributes.numpy()]

    @property
    def full_captions(self) -> list[str]:
        """One text an image that also says what is empty: nothing is left open."""
        return [caption(row, empty=True) for row in self.attributes.numpy()]


@dataclass(frozen=True)
class Heroes(HeroLabels):
    """Fresh heroes of the test split."""

    images: Tensor  # [N, 3, 32, 32] uint8
    figure: Tensor  # [N, 32, 32] bool: pixels that are not background

    def image_set(self, name: str) -> TensorImages:
        """Return the pictures as an image set."""
        return TensorImages(self.images, name)


class HeroImages:
    """Pictures of the first heroes of a split as an image set; they are made when they are read."""

    shape = (32, 32)

    def __init__(self, num: int, split: HeroSplit) -> None:
        self.num_images, self.split, self.name = num, split, f"{split} heroes"

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield uint8 ``[b, 3, 32, 32]``."""
        data = HeroesDataset(seed=_SEEDS[self.split], split="test")
        for indices in _chunks(self.num_images, size):
            yield _pixels(data.examples(indices)["image"])

    def digest(self) -> str:
        """Return hex digits that change with the atlas, the split and the number."""
        files = "".join(file_digest(file) for file in sorted(ATLAS_FOLDER.iterdir()) if file.is_file())
        text = f"heroes {_VERSION} {self.split} {_SEEDS[self.split]} {self.num_images} {files}"
        return hashlib.sha256(text.encode()).hexdigest()


def hero_labels(num: int, split: HeroSplit, *, held_out: bool = False) -> HeroLabels:
    """Return the labels of ``draw_heroes`` without their pictures."""
    parts = [(b["attributes"], b["visible"]) for b in _batches(num, split, held_out)]
    return HeroLabels(*(torch.cat(column) for column in zip(*parts, strict=True)))


def draw_heroes(num: int, split: HeroSplit, *, held_out: bool = False) -> Heroes:
    """Draw the first ``num`` heroes of a split.

    Args:
        num: how many.
        split: which; see the module.
        held_out: only (base, weapon) pairs that the training split never shows.
    """
    masks = torch.tensor(HeroAtlas.load().masks)
    parts: list[tuple[Tensor, ...]] = []
    for batch in _batches(num, split, held_out):
        images = _pixels(batch["image"])
        figure = masks[batch["attributes"]].any(1).view(-1, *images.shape[2:])
        parts.append((batch["attributes"], batch["visible"], images, figure))
    return Heroes(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _batches(num: int, split: HeroSplit, held_out: bool) -> Iterator[dict[str, Tensor]]:
    if num < 1:
        raise ValueError(f"the number of heroes must be at least 1, got {num}")
    data = HeroesDataset(seed=_SEEDS[split], split="test", held_out=held_out)
    for indices in _chunks(num):
        yield data.examples(indices)


def _pixels(images: Tensor) -> Tensor:
    return (images * 127.5 + 127.5).round().to(torch.uint8)


def _chunks(num: int, size: int = 1000) -> Iterator[np.ndarray]:
    for start in range(0, num, size):
        yield np.arange(start, min(start + size, num))
