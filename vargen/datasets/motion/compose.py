"""Moving heroes: clips of composed pixel heroes with a named motion and exact labels.

A clip is a hero of `vargen.datasets.heroes.compose` from a curated subset of the atlas (27 parts: a small model learns them on a
CPU), its motion, and nothing else: plain background, no cuts. The distribution: base and motion are uniform; every other slot is
filled with its probability, by a uniform part, independently of the others.

Positions move by whole pixels, and after every four frames by a multiple of four pixels (or back to where they were):
for a tokenizer that shrinks space and time by four, a moving hero is the same patches, one cell on.

A clip is a pure function of its seed; one of fewer frames is its beginning. Numpy only: torch is imported when `MotionDataset` is asked for.
"""

# b clips · t frames · s slots (11 of a hero, then the motion) · p pixels of a tile (32 * 32)

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vargen.datasets.heroes.atlas import UNSPECIFIED, HeroAtlas
from vargen.datasets.heroes.compose import compose, seed_array
from vargen.datasets.motion.prompts import MOTIONS, PARTS, caption, motion_id, parse_prompt
from vargen.datasets.philox import philox_words

if TYPE_CHECKING:
    from vargen.datasets.motion.dataset import MotionDataset

__all__ = [
    "FRAMES",
    "MOTIONS",
    "PARTS",
    "ClipBatch",
    "MotionDataset",
    "caption",
    "compose_clips",
    "motion_id",
    "num_attributes",
    "parse_prompt",
    "sample_clip_attributes",
    "sample_clips",
]

FRAMES = (1, 5, 9, 13, 17)
PRESENCE = {"cloak": 0.4, "body": 0.9, "head": 0.7, "hand1": 0.75, "hand2": 0.4}
_STREAM_CLIPS = 0x4D4F5645  # "MOVE"; the heroes' own streams are others
_RANGE = np.uint64(32)


@dataclass(frozen=True)
class ClipBatch:
    """A batch of clips; captions are left to `caption(attributes)`."""

    clips: NDArray[np.uint8]  # b t 32 32 3
    attributes: NDArray[np.int64]  # b s; none ids where nothing was drawn, never 0


def num_attributes() -> int:
    """Size of the vocabulary: the atlas's ids, then one id a motion."""
    return HeroAtlas.load().num_attributes + len(MOTIONS)


def sample_clips(seeds: ArrayLike, frames: int = 17) -> ClipBatch:
    """Draw clips; row i depends on seeds[i] alone.

    Args:
        seeds: (b,) integers in [0, 2^64).
        frames: one of `FRAMES`.

    Raises:
        ValueError: seeds are not a vector of non-negative integers, unusable number of frames.

    Example:
        >>> sample_clips([7]).clips.shape
        (1, 17, 32, 32, 3)
    """
    attributes = sample_clip_attributes(seeds)
    return ClipBatch(compose_clips(attributes, frames), attributes)


def sample_clip_attributes(seeds: ArrayLike) -> NDArray[np.int64]:
    """Draw the attributes of `sample_clips` without the pictures: (b, s), no zeros."""
    keys = seed_array(seeds)
    choices, presence = _distribution()
    words = philox_words(keys, np.zeros_like(keys), _STREAM_CLIPS, 2 * len(choices))
    columns = []
    for slot, (none, ids) in enumerate(choices):
        pick = (words[:, 2 * slot + 1] * np.uint64(len(ids)) >> _RANGE).astype(np.int64) if len(ids) else 0
        chosen = ids[pick] if len(ids) else np.full(len(keys), none)
        columns.append(np.where(words[:, 2 * slot] < presence[slot], chosen, none))
    return np.stack(columns, axis=1)


def compose_clips(attributes: ArrayLike, frames: int = 17) -> NDArray[np.uint8]:
    """Draw given attributes.

    Args:
        attributes: (s,) or (b, s) integers; 0 (unspecified) and none ids draw nothing, motion 0 stands still.
        frames: one of `FRAMES`.

    Returns:
        (t, 32, 32, 3) or (b, t, 32, 32, 3) pictures.

    Raises:
        ValueError: wrong shape, an id that does not belong to its slot, unusable number of frames.
    """
    rows = np.atleast_2d(np.asarray(attributes))
    slots = len(HeroAtlas.load().slots) + 1
    if rows.ndim != 2 or rows.shape[1] != slots:
        raise ValueError(f"attributes of a clip must be (..., {slots}), got {np.shape(attributes)}")
    first = HeroAtlas.load().num_attributes
    motions = np.where(rows[:, -1] == UNSPECIFIED, len(MOTIONS) - 1, rows[:, -1] - first)
    if ((motions < 0) | (motions >= len(MOTIONS))).any():
        raise ValueError(
            f"a motion id must be 0 or in {first}..{first + len(MOTIONS) - 1}, got {rows[:, -1].tolist()}"
        )
    clips = _move(compose(rows[:, :-1]), motions, frames)
    return clips if np.ndim(attributes) == 2 else clips[0]


def _move(heroes: NDArray[np.uint8], motions: NDArray[np.int64], frames: int) -> NDArray[np.uint8]:
    sources, strengths = _paths(frames)
    batch, size = heroes.shape[:2]
    background = np.broadcast_to(np.array(HeroAtlas.load().background, np.uint8), (batch, 1, 3))
    flat = np.concatenate([heroes.reshape(batch, size * size, 3), background], axis=1)  # the last: nothing there
    packed = np.zeros((batch, size * size + 1, 4), np.uint8)
    packed[..., :3] = flat
    pixels = packed.view("<u4")[..., 0]
    clips = np.empty((batch, frames, size * size, 3), np.uint8)
    for motion in np.unique(motions):
        rows = np.flatnonzero(motions == motion)
        moved = np.take(pixels[rows], sources[motion], axis=1)  # b t p
        colours = np.ascontiguousarray(moved)[..., None].view(np.uint8)[..., :3]
        strength = strengths[motion]
        if (strength < 1).any():
            towards = np.array(HeroAtlas.load().background, np.float32)
            blended = towards + (colours - towards) * strength[:, None, None]
            colours = np.rint(blended).astype(np.uint8)
        clips[rows] = colours
    return clips.reshape(batch, frames, size, size, 3)


@lru_cache(maxsize=len(FRAMES))
def _paths(frames: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Where every pixel of every frame comes from (motions t p; p = nothing) and how strong it is (motions t)."""
    if frames not in FRAMES:
        raise ValueError(f"frames must be one of {', '.join(map(str, FRAMES))}, got {frames!r}")
    size = HeroAtlas.load().tile_size
    sources = np.empty((len(MOTIONS), frames, size * size), np.int64)
    strengths = np.ones((len(MOTIONS), frames), np.float32)
    for m, motion in enumerate(MOTIONS):
        for t in range(frames):
            shift_x, shift_y = _pose(motion, t)
            sources[m, t] = _source(size, shift_x, shift_y)
            if motion == "fading away":
                strengths[m, t] = 1 - t / (FRAMES[-1] - 1)
    return sources, strengths


def _pose(motion: str, t: int) -> tuple[int, int]:
    """Shift to the right and shift down of the hero in frame t."""
    if motion == "walking left":
        return 8 - t, 0
    if motion == "walking right":
        return t - 8, 0
    if motion == "jumping":
        return 0, -(0, 3, 5, 6, 6, 6, 5, 3)[t % 8]
    if motion == "shivering":
        return (0, 2, 0, -2)[t % 4], 0
    if motion == "rising from the ground":
        return 0, 16 - t
    return 0, 0


def _source(size: int, shift_x: int, shift_y: int) -> NDArray[np.int64]:
    rows = np.arange(size) - shift_y
    columns = np.arange(size) - shift_x
    inside = ((rows >= 0) & (rows < size))[:, None] & ((columns >= 0) & (columns < size))
    return np.where(inside, rows[:, None] * size + columns, size * size).reshape(-1)


@lru_cache(maxsize=1)
def _distribution() -> tuple[list[tuple[int, NDArray[np.int64]]], list[float]]:
    """Per slot its none id and the ids of its parts; the probability (times 2^32) that it is filled."""
    atlas = HeroAtlas.load()
    choices = [(atlas.none_id(slot), np.array([atlas.id(n) for n in PARTS.get(slot, ())])) for slot in atlas.slots]
    choices.append((UNSPECIFIED, np.array([motion_id(motion) for motion in MOTIONS])))
    presence = [1.0 if slot == "base" else PRESENCE.get(slot, 0.0) for slot in atlas.slots] + [1.0]
    return choices, [p * 2.0**32 for p in presence]


def __getattr__(name: str) -> Any:
    if name == "MotionDataset":  # the only name here that needs torch
        from importlib import import_module

        return import_module("vargen.datasets.motion.dataset").MotionDataset
    raise AttributeError(f"module 'vargen.datasets.motion.compose' has no attribute {name!r}")
