"""Pixel heroes: 32x32 pictures composed at random from named parts, without end and with exact labels.

The distribution of heroes: the base is uniform; every other slot is filled with its probability (`HeroAtlas.presence`), by a
uniform part, independently of the others. One exception makes compositional generalisation measurable: about 5 % of
the (base, hand1) pairs, chosen by a hash of the two names, are *held out*. `pairs="train"` never draws them (the
weapon is then uniform over the other weapons), `pairs="all"` draws everything, `pairs="held_out"` draws only them
(uniformly; everybody carries a weapon).

A hero is a pure function of (seed, pairs). Numpy only: torch is imported when `HeroesDataset` is first asked for.
"""

# b heroes · s slots · a attribute ids · p pixels of a tile (32 * 32)

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vargen.datasets.heroes.atlas import UNSPECIFIED, HeroAtlas, Part
from vargen.datasets.heroes.prompts import caption, parse_prompt
from vargen.datasets.philox import philox_words

if TYPE_CHECKING:
    from vargen.datasets.heroes.dataset import HeroesDataset

__all__ = [
    "MIN_VISIBLE_PIXELS",
    "Hero",
    "HeroAtlas",
    "HeroBatch",
    "HeroesDataset",
    "Part",
    "caption",
    "complete",
    "compose",
    "is_held_out",
    "parse_prompt",
    "sample_attributes",
    "sample_hero",
    "sample_heroes",
]

Pairs = Literal["train", "all", "held_out"]
MIN_VISIBLE_PIXELS = 8  # a part with fewer pixels left after occlusion cannot be recognised and is not counted
_HELD_OUT_ONE_IN = 20  # 5 % of the (base, hand1) pairs
_HELD_OUT_SALT = 5  # the first with which every base of the atlas is in a held-out pair
_CHUNK = 64  # heroes drawn together: the owner map (2 bytes a pixel) stays in the L2 cache
_STREAM_PARTS = 0x48455230  # "HER0"; other streams of the same key serve other purposes
_RANGE = np.uint64(32)


@dataclass(frozen=True)
class Hero:
    """One hero."""

    image: NDArray[np.uint8]  # 32 32 3
    attributes: NDArray[np.int64]  # s; none ids where nothing was drawn, never 0
    visible: NDArray[np.bool_]  # s; a part is there and shows at least MIN_VISIBLE_PIXELS pixels
    caption: str


@dataclass(frozen=True)
class HeroBatch:
    """A batch of heroes; captions are left to `caption(attributes)`."""

    images: NDArray[np.uint8]  # b 32 32 3
    attributes: NDArray[np.int64]  # b s
    visible: NDArray[np.bool_]  # b s


def sample_hero(seed: int, *, pairs: Pairs = "all") -> Hero:
    """Draw one hero.

    Args:
        seed: in [0, 2^64); equal seeds give equal heroes.
        pairs: which (base, hand1) pairs may appear, see the module's description.

    Raises:
        ValueError: seed out of range, unknown `pairs`.

    Example:
        >>> sample_hero(7).image.shape
        (32, 32, 3)
    """
    batch = sample_heroes([seed], pairs=pairs)
    attributes = batch.attributes[0]
    return Hero(batch.images[0], attributes, batch.visible[0], caption(attributes))


def sample_heroes(seeds: ArrayLike, *, pairs: Pairs = "all") -> HeroBatch:
    """Draw a batch of heroes; row i is `sample_hero(seeds[i])` whatever the other seeds are.

    Args:
        seeds: (b,) integers in [0, 2^64).
        pairs: which (base, hand1) pairs may appear.

    Raises:
        ValueError: seeds are not a vector of non-negative integers, unknown `pairs`.
    """
    attributes = sample_attributes(seeds, pairs=pairs)
    images, visible = _draw(attributes)
    return HeroBatch(images, attributes, visible)


def sample_attributes(seeds: ArrayLike, *, pairs: Pairs = "all") -> NDArray[np.int64]:
    """Draw the attributes of `sample_heroes` without the pictures: (b, s), no zeros."""
    tables = _tables()
    if pairs not in get_args(Pairs):
        raise ValueError(f"pairs must be one of {', '.join(map(repr, get_args(Pairs)))}, got {pairs!r}")
    keys = seed_array(seeds)
    words = philox_words(keys, np.zeros_like(keys), _STREAM_PARTS, 2 * len(tables.first))
    present = words[:, 0::2] < tables.presence  # b s
    choice = (words[:, 1::2] * tables.count >> _RANGE).astype(np.int64)  # uniform up to 2^-24
    attributes = np.where(present, tables.first + 1 + choice, tables.first)
    base, hand1 = tables.base, tables.hand1
    if pairs == "held_out":
        pair = (words[:, 2 * hand1 + 1] * np.uint64(len(tables.held_out_pairs)) >> _RANGE).astype(np.int64)
        attributes[:, [base, hand1]] = tables.held_out_pairs[pair]
    elif pairs == "train":
        row = attributes[:, base] - tables.first[base] - 1
        pick = (words[:, 2 * hand1 + 1] * tables.num_weapons[row] >> _RANGE).astype(np.int64)
        attributes[:, hand1] = np.where(present[:, hand1], tables.weapons[row, pick], tables.first[hand1])
    return attributes


def compose(attributes: ArrayLike, *, background: tuple[int, int, int] | None = None) -> NDArray[np.uint8]:
    """Draw given attributes.

    Args:
        attributes: (s,) or (b, s) integers; 0 (unspecified) and none ids draw nothing. To fill unspecified slots at
            random use `complete` first.
        background: RGB in [0, 255]; default (70, 74, 86).

    Returns:
        (32, 32, 3) or (b, 32, 32, 3) pictures.

    Raises:
        ValueError: wrong shape, or an id that does not belong to its slot.
    """
    checked = HeroAtlas.load().check(attributes)
    images, _ = _draw(np.atleast_2d(checked), background)
    return images if checked.ndim == 2 else images[0]


def complete(attributes: ArrayLike, seeds: ArrayLike, *, pairs: Pairs = "all") -> NDArray[np.int64]:
    """Fill the unspecified slots at random, slot by slot from the distribution of `sample_heroes`.

    Args:
        attributes: (b, s) or (s,) integers; (s,) is used for every seed.
        seeds: (b,) integers.
        pairs: which pairs the filling may draw. A pair of which one half is given can still be a held-out one.

    Returns:
        (b, s) ids without zeros.
    """
    given = HeroAtlas.load().check(attributes)
    return np.where(given == UNSPECIFIED, sample_attributes(seeds, pairs=pairs), given)


def is_held_out(attributes: ArrayLike) -> NDArray[np.bool_]:
    """Tell which heroes carry a held-out (base, hand1) pair.

    Args:
        attributes: (..., s) integers.

    Returns:
        (...) bool.
    """
    tables = _tables()
    checked = HeroAtlas.load().check(attributes)
    return tables.held_out[checked[..., tables.base], checked[..., tables.hand1]]


def _draw(
    attributes: NDArray[np.int64], background: tuple[int, int, int] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    atlas = HeroAtlas.load()
    size, batch = atlas.tile_size, attributes.shape[0]
    pixels = atlas.pixels
    if background is not None:
        pixels = pixels.copy()
        pixels[0] = np.array([*background, 0], dtype=np.uint8).view("<u4")
    flat = pixels.reshape(-1)
    column = np.arange(size * size)
    images = np.empty((batch, size * size, 3), dtype=np.uint8)
    visible = np.empty(attributes.shape, dtype=bool)
    for start in range(0, batch, _CHUNK):
        ids = attributes[start : start + _CHUNK]
        owner = np.zeros((len(ids), size * size), dtype=np.int16)  # b p: attribute id of the topmost part
        for slot, decider, rule in atlas.layers:
            part = np.where(rule[ids[:, decider]], ids[:, slot], UNSPECIFIED)
            np.copyto(owner, part[:, None].astype(np.int16), where=atlas.masks[part])
        # widened first: a product with a small scalar would stay 16 bits wide in NumPy 1
        colours = flat[owner.astype(np.int32) * (size * size) + column]
        images[start : start + _CHUNK] = colours[..., None].view(np.uint8)[..., :3]
        counts = (owner[:, None, :] == ids[:, :, None].astype(np.int16)).sum(-1, dtype=np.int32)
        visible[start : start + _CHUNK] = (counts >= MIN_VISIBLE_PIXELS) & (ids != UNSPECIFIED)
    return images.reshape(batch, size, size, 3), visible


def seed_array(seeds: ArrayLike) -> NDArray[np.uint64]:
    """Return seeds as Philox keys, or say what is wrong with them."""
    values = np.asarray(seeds)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise ValueError(f"seeds must be a vector of integers in [0, 2^64), got shape {values.shape} {values.dtype}")
    if values.dtype.kind == "i" and (values < 0).any():
        raise ValueError(f"seeds must be in [0, 2^64), got {int(values.min())}")
    return values.astype(np.uint64)


@dataclass(frozen=True)
class _Tables:
    first: NDArray[np.int64]  # s: none id of the slot; its parts follow
    count: NDArray[np.uint64]  # s: parts in the slot
    presence: NDArray[np.uint64]  # s: probability times 2^32
    base: int
    hand1: int
    held_out: NDArray[np.bool_]  # a a
    held_out_pairs: NDArray[np.int64]  # pairs 2: base id, hand1 id
    weapons: NDArray[np.int64]  # bases weapons: hand1 ids that a base meets in training, padded with 0
    num_weapons: NDArray[np.uint64]  # bases: how many of them


@lru_cache(maxsize=1)
def _tables() -> _Tables:
    atlas = HeroAtlas.load()
    base, hand1 = atlas.slots.index("base"), atlas.slots.index("hand1")
    bases, weapons = atlas.slot_ids("base")[1:], atlas.slot_ids("hand1")[1:]
    held_out = np.zeros((atlas.num_attributes, atlas.num_attributes), dtype=bool)
    for b in bases:
        for w in weapons:
            held_out[b, w] = _pair_is_held_out(atlas.part(b).name, atlas.part(w).name)
    allowed = np.zeros((len(bases), len(weapons)), dtype=np.int64)
    num_weapons = np.zeros(len(bases), dtype=np.uint64)
    for row, b in enumerate(bases):
        ids = [w for w in weapons if not held_out[b, w]]
        allowed[row, : len(ids)], num_weapons[row] = ids, len(ids)
    return _Tables(
        first=np.array([atlas.none_id(slot) for slot in atlas.slots]),
        count=np.array([len(atlas.slot_ids(slot)) - 1 for slot in atlas.slots], dtype=np.uint64),
        presence=np.array([round(p * 2**32) for p in atlas.presence], dtype=np.uint64),
        base=base,
        hand1=hand1,
        held_out=held_out,
        held_out_pairs=np.argwhere(held_out),
        weapons=allowed,
        num_weapons=num_weapons,
    )


def _pair_is_held_out(base: str, weapon: str) -> bool:
    # a hash of the names, not of the ids: the split survives additions to the atlas
    digest = blake2b(f"{_HELD_OUT_SALT}|{base}|{weapon}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _HELD_OUT_ONE_IN == 0


def __getattr__(name: str) -> Any:
    if name == "HeroesDataset":  # the only name here that needs torch
        from importlib import import_module

        return import_module("vargen.datasets.heroes.dataset").HeroesDataset
    raise AttributeError(f"module 'vargen.datasets.heroes.compose' has no attribute {name!r}")
