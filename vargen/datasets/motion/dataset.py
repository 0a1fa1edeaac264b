"""`MotionDataset`: an endless, resumable, shardable sequence of moving heroes for torch."""

# b clips · t frames · s slots

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vargen.datasets.heroes.dataset import HeroesDataset
from vargen.datasets.motion.compose import num_attributes, sample_clips
from vargen.datasets.motion.prompts import caption


class MotionDataset(HeroesDataset):
    """Endless clips; example i is a pure function of (seed, split, frames, i).

    Examples are dicts: "clip" (3, t, 32, 32) float32 in [-1, 1]; "attributes" (s,) int64, 0 where dropped; "labels" (s,),
    the same before dropping; "seed" int, with which `sample_clips` draws the same clip. Everything else is as in
    `HeroesDataset`; seeds of the two splits differ in their lowest bit, so no clip is in both.

    Args:
        seed: of the sequence, in [0, 2^63).
        frames: one of `vargen.datasets.motion.compose.FRAMES`.
        **options: of `HeroesDataset`; there are no held-out pairs.

    Raises:
        ValueError: an argument out of its range.
    """

    kind: ClassVar[Literal["image", "clip"]] = "clip"
    words = "motion"

    def __init__(self, seed: int = 0, *, frames: int = 17, **options: Any) -> None:
        super().__init__(seed, **options)
        if options.get("held_out"):
            raise ValueError("moving heroes have no held-out pairs; leave held_out away")
        self.frames = frames

    def examples(self, indices: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """Return the batch of examples with these indices of the sequence.

        Args:
            indices: (b,) integers >= 0.
        """
        seeds = self._hero_seeds(indices)
        batch = sample_clips(seeds, self.frames)
        attributes = np.where(self._forgotten(seeds, batch.attributes.shape[1]), 0, batch.attributes)
        clips = torch.from_numpy(batch.clips).permute(0, 4, 1, 2, 3).contiguous()
        return {
            "clip": clips.float().div_(127.5).sub_(1.0),
            "attributes": torch.from_numpy(attributes),
            "labels": torch.from_numpy(batch.attributes),
            "seed": torch.from_numpy(seeds.astype(np.int64)),
        }

    def condition_settings(self) -> dict[str, Any]:
        """Sizes of the vocabulary and of an attribute vector, the motion included."""
        hero = super().condition_settings()
        slots = hero["num_condition_tokens"] + 1
        return {**hero, "num_attributes": num_attributes(), "num_condition_tokens": slots}

    def captions(self, conditions: torch.Tensor) -> list[str]:
        """One text a clip."""
        return [caption(row) for row in conditions.cpu().numpy()]

    def variants(self, conditions: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same heroes without a word on how they move."""
        still = conditions.clone()
        still[:, -1] = 0
        return {"_no_motion": still}
