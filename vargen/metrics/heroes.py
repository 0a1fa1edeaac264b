"""Heroes as a reference: fresh real ones without end, and captions with the attributes behind them.

Three streams that share no image: ``reference`` and ``floor`` are two sets of real heroes, whose distance is what a
perfect model would score; ``prompts`` gives the captions that a model is asked to draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vargen.data.atlas import HeroAtlas
from vargen.data.heroes import HeroesDataset, caption
from vargen.metrics.images import TensorImages

Stream = Literal["reference", "floor", "prompts"]
_SEEDS: dict[str, int] = {"reference": 7001, "floor": 7002, "prompts": 7003}  # any three different ones


@dataclass(frozen=True)
class Heroes:
    """Fresh heroes of the test split."""

    images: Tensor  # [N, 3, 32, 32] uint8
    attributes: Tensor  # [N, S] int64, no zeros
    visible: Tensor  # [N, S] bool: a part is there and can be seen
    figure: Tensor  # [N, 32, 32] bool: pixels that are not background

    @property
    def captions(self) -> list[str]:
        """One text an image; empty slots are not mentioned."""
        return [caption(row) for row in self.attributes.numpy()]

    def image_set(self, name: str) -> TensorImages:
        """Return the pictures as an image set."""
        return TensorImages(self.images, name)


def draw_heroes(num: int, stream: Stream, *, held_out: bool = False) -> Heroes:
    """Draw the first ``num`` heroes of a stream of the test split.

    Args:
        num: how many.
        stream: which; see the module.
        held_out: only (base, weapon) pairs that the training split never shows.
    """
    if num < 1:
        raise ValueError(f"the number of heroes must be at least 1, got {num}")
    data = HeroesDataset(seed=_SEEDS[stream], split="test", held_out=held_out)
    masks = torch.tensor(HeroAtlas.load().masks)
    parts: list[tuple[Tensor, ...]] = []
    for indices in _chunks(num):
        batch = data.examples(indices)
        images = (batch["image"] * 127.5 + 127.5).round().to(torch.uint8)
        figure = masks[batch["attributes"]].any(1).view(-1, *images.shape[2:])
        parts.append((images, batch["attributes"], batch["visible"], figure))
    return Heroes(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _chunks(num: int, size: int = 1000) -> Iterator[np.ndarray]:
    for start in range(0, num, size):
        yield np.arange(start, min(start + size, num))
