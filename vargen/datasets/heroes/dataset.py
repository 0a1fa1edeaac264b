"""`HeroesDataset`: an endless, resumable, shardable sequence of pixel heroes for torch."""

# b heroes · s slots

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from vargen.datasets.base import Dataset, Split
from vargen.datasets.heroes.atlas import HeroAtlas
from vargen.datasets.heroes.compose import Pairs, sample_heroes
from vargen.datasets.heroes.prompts import caption
from vargen.datasets.philox import philox_words

_STREAM_SEEDS = 0x53454544  # "SEED"
_STREAM_DROPOUT = 0x44524F50  # "DROP"
_UNBATCHED_CHUNK = 64  # examples composed at once when they are handed out one by one


class HeroesDataset(IterableDataset[dict[str, Any]], Dataset):
    """Endless heroes; example i is a pure function of (seed, split, held_out, i).

    Examples are dicts: "image" (3, 32, 32) float32 in [-1, 1]; "attributes" (s,) int64, 0 where dropped; "visible"
    (s,) bool, before dropping; "seed" int, with which `sample_hero(seed, pairs=dataset.pairs)` draws the same hero.
    With `batch_size` every entry has a leading axis b (use `DataLoader(dataset, batch_size=None)`).

    The training split never shows a held-out (base, hand1) pair (see `vargen.datasets.heroes.compose`). The test split draws
    fresh heroes of any kind, with `held_out=True` only held-out pairs. Hero seeds of the two splits differ in their
    lowest bit, so no seed is in both.

    Rank r of `world_size` sees the examples start + r, start + r + world_size, ... in that order; the workers of a
    DataLoader take its batches in turn, so with `batch_size` the sequence does not depend on the number of workers.
    To resume after n batches a rank, pass `start = start + n * batch_size * world_size`.

    Args:
        seed: of the sequence, in [0, 2^63).
        start: index of the first example over all ranks, >= 0.
        batch_size: examples per item; None yields single examples.
        split: "train" or "test".
        held_out: only held-out pairs; needs split="test".
        attribute_dropout: in [0, 1], share of examples of which each attribute is forgotten (set to 0) with a rate
            drawn uniformly from [0, 1) for the example. It teaches a model short prompts.
        null_dropout: in [0, 1], share of examples of which all attributes are forgotten, for guidance.
        rank: of this process, in [0, world_size).
        world_size: number of processes.

    Raises:
        ValueError: an argument out of its range.
    """

    kind: ClassVar[Literal["image", "clip"]] = "image"
    condition_type: ClassVar[Literal["class", "attributes"]] = "attributes"
    image_size = (32, 32)
    words: str = "heroes"

    def __init__(
        self,
        seed: int = 0,
        start: int = 0,
        batch_size: int | None = None,
        split: Split = "train",
        *,
        held_out: bool = False,
        attribute_dropout: float = 0.0,
        null_dropout: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {seed}")
        if start < 0:
            raise ValueError(f"start must be >= 0, got {start}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be None or >= 1, got {batch_size}")
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if held_out and split != "test":
            raise ValueError("held_out=True needs split='test'; held-out pairs are never trained on")
        for name, value in (("attribute_dropout", attribute_dropout), ("null_dropout", null_dropout)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank {rank} of {world_size}")
        self.seed, self.start, self.batch_size, self.split = seed, start, batch_size, split
        self.held_out, self.rank, self.world_size = held_out, rank, world_size
        self.attribute_dropout, self.null_dropout = attribute_dropout, null_dropout
        self.pairs: Pairs = "train" if split == "train" else "held_out" if held_out else "all"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        size = self.batch_size or _UNBATCHED_CHUNK
        number = worker_id
        while True:
            within_rank = np.arange(number * size, (number + 1) * size)
            batch = self.examples(self.start + self.rank + self.world_size * within_rank)
            if self.batch_size is None:
                for i in range(size):
                    yield {key: int(value[i]) if key == "seed" else value[i] for key, value in batch.items()}
            else:
                yield batch
            number += workers

    def examples(self, indices: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """Return the batch of examples with these indices of the sequence.

        Args:
            indices: (b,) integers >= 0.
        """
        seeds = self._hero_seeds(indices)
        heroes = sample_heroes(seeds, pairs=self.pairs)
        attributes = np.where(self._forgotten(seeds, heroes.attributes.shape[1]), 0, heroes.attributes)
        images = torch.from_numpy(heroes.images).permute(0, 3, 1, 2).contiguous()
        return {
            "image": images.float().div_(127.5).sub_(1.0),
            "attributes": torch.from_numpy(attributes),
            "visible": torch.from_numpy(heroes.visible),
            "seed": torch.from_numpy(seeds.astype(np.int64)),
        }

    def condition_settings(self) -> dict[str, Any]:
        """Sizes of the vocabulary and of an attribute vector."""
        atlas = HeroAtlas.load()
        return {
            "condition_type": "attributes",
            "num_attributes": atlas.num_attributes,
            "num_condition_tokens": len(atlas.slots),
        }

    def captions(self, conditions: torch.Tensor) -> list[str]:
        """One text a hero; empty and unspecified slots are not mentioned."""
        return [caption(row) for row in conditions.cpu().numpy()]

    def foreground(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels of the heroes: those that differ from the top left one, which is background."""
        return (images != images[:, :, :1, :1]).any(1, keepdim=True)

    def _hero_seeds(self, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
        keys = np.full(len(indices), self.seed, dtype=np.uint64)
        words = philox_words(keys, indices.astype(np.uint64), _STREAM_SEEDS, 4)
        pick = 2 * (self.split == "test")  # the splits read different words
        joined = (words[:, pick] << np.uint64(32)) | words[:, pick + 1]
        # 63 bits, so that the seed fits int64; the lowest bit names the split
        return (joined >> np.uint64(2) << np.uint64(1)) | np.uint64(self.split == "test")

    def _forgotten(self, seeds: NDArray[np.uint64], slots: int) -> NDArray[np.bool_]:
        words = philox_words(seeds, np.full_like(seeds, self.seed), _STREAM_DROPOUT, 3 + slots)
        uniform = words / 2.0**32  # b, in [0, 1)
        everything = uniform[:, 0] < self.null_dropout
        some = uniform[:, 1] < self.attribute_dropout
        return everything[:, None] | (some[:, None] & (uniform[:, 3:] < uniform[:, 2:3]))
