"""The atlas of hero parts: 32x32 tiles, their names, and the attribute vocabulary.

The tiles are player layers of Dungeon Crawl Stone Soup (CC0; provenance in `atlas.json` and `cleared.json`). Alpha is
binary, so a picture is decided by which part is topmost at each pixel. Numpy and Pillow only; no torch.
"""

# a attribute ids · s slots · p pixels of a tile (32 * 32)

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vargen.validation.pictures import open_image
from vargen.validation.reading import read_json

ATLAS_FOLDER = Path(__file__).parents[2] / "assets" / "heroes"
UNSPECIFIED = 0  # attribute id that says nothing about a slot


@dataclass(frozen=True)
class Part:
    """One named layer."""

    name: str
    slot: str
    id: int  # attribute id, in [1, num_attributes)
    aliases: tuple[str, ...] = ()


class HeroAtlas:
    """Tiles and vocabulary. Use `HeroAtlas.load()`; the arrays are shared and read-only.

    Attribute ids are int64 and stored in `atlas.json`, so they never move: 0 is "unspecified"; then, slot by slot,
    one id for "nothing in this slot" followed by one id per part.

    Attributes:
        slots: slot names, back to front; the order of every attribute vector.
        parts: all parts, by id.
        num_attributes: size of the vocabulary; ids lie in [0, num_attributes).
        presence: per slot, the probability that a random hero has something there.
        pixels: (a, p) uint32, RGB in the three low bytes, 0 where nothing is drawn; row 0 is the background.
        masks: (a, p) bool, True where the part is drawn.
    """

    def __init__(self, folder: Path) -> None:
        record = read_json(folder / "atlas.json")
        sheet = np.asarray(open_image(folder / "atlas.png").convert("RGBA"))
        self.record: dict[str, Any] = record
        self.slots: tuple[str, ...] = tuple(slot["name"] for slot in record["slots"])
        self.presence: tuple[float, ...] = tuple(slot["presence"] for slot in record["slots"])
        self.parts: list[Part] = [Part(r["name"], r["slot"], r["id"], tuple(r["aliases"])) for r in record["parts"]]
        self.num_attributes: int = record["num_attributes"]
        self.tile_size: int = record["tile_size"]
        self.background: tuple[int, int, int] = tuple(record["background"])
        self._part_by_id = {part.id: part for part in self.parts}
        self._id_by_name = {part.name: part.id for part in self.parts}
        self._none_ids: dict[str, int] = record["none_ids"]
        self._counts = {slot: sum(part.slot == slot for part in self.parts) for slot in self.slots}
        self.slot_of = self._slot_of()
        self.masks, self.pixels = self._tables(sheet)
        self.layers = self._layers()

    @staticmethod
    @lru_cache(maxsize=1)
    def load() -> HeroAtlas:
        """Return the shipped atlas (read once per process)."""
        return HeroAtlas(ATLAS_FOLDER)

    def none_id(self, slot: str) -> int:
        """Return the id that means "nothing in this slot".

        Raises:
            ValueError: the slot does not exist.
        """
        if slot not in self._none_ids:
            raise ValueError(f"unknown slot {slot!r}; slots are {', '.join(self.slots)}")
        return self._none_ids[slot]

    def part(self, attribute: int) -> Part:
        """Return the part with this attribute id.

        Raises:
            ValueError: the id is unspecified, a none id or out of range.
        """
        part = self._part_by_id.get(int(attribute))
        if part is None:
            raise ValueError(f"attribute id {attribute} is not a part (0 and none ids are not)")
        return part

    def id(self, name: str) -> int:
        """Return the attribute id of a part by its exact name.

        Raises:
            ValueError: no part has this name.
        """
        if name not in self._id_by_name:
            raise ValueError(f"no hero part is called {name!r}")
        return self._id_by_name[name]

    def slot_ids(self, slot: str) -> range:
        """Return every id of a slot: its none id first, then its parts."""
        first = self.none_id(slot)
        return range(first, first + 1 + self._counts[slot])

    def check(self, attributes: ArrayLike) -> NDArray[np.int64]:
        """Validate attribute vectors.

        Args:
            attributes: (..., s) integers; entry k is 0 or an id of slot k.

        Returns:
            The same as int64.

        Raises:
            ValueError: wrong length, not integers, or an id that belongs to another slot.
        """
        array = np.asarray(attributes)
        if array.ndim == 0 or array.shape[-1] != len(self.slots):
            raise ValueError(f"attributes must be (..., {len(self.slots)}), got {array.shape}")
        if array.dtype.kind not in "iu":
            raise ValueError(f"attributes must be integers, got {array.dtype}")
        array = array.astype(np.int64)
        inside = (array >= 0) & (array < self.num_attributes)
        legal = inside & (
            (array == UNSPECIFIED) | (self.slot_of[np.where(inside, array, 0)] == range(len(self.slots)))
        )
        if not legal.all():
            slot = int(np.nonzero(~legal)[-1][0])
            bad = int(array[..., slot][~legal[..., slot]].flat[0])
            raise ValueError(f"{bad} is not an attribute id of slot {self.slots[slot]!r}")
        return array

    def _slot_of(self) -> NDArray[np.int64]:
        slot_of = np.full(self.num_attributes, -1)  # a; -1 for "unspecified"
        for index, slot in enumerate(self.slots):
            slot_of[list(self.slot_ids(slot))] = index
        return slot_of

    def _tables(self, sheet: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.uint32]]:
        size, columns = self.tile_size, self.record["columns"]
        masks = np.zeros((self.num_attributes, size * size), dtype=bool)
        pixels = np.zeros((self.num_attributes, size * size, 4), dtype=np.uint8)
        pixels[0, :, :3] = self.background
        for entry in self.record["parts"]:
            row, column = divmod(entry["tile"], columns)
            tile = sheet[row * size : (row + 1) * size, column * size : (column + 1) * size].reshape(-1, 4)
            masks[entry["id"]] = tile[:, 3] > 0
            pixels[entry["id"], :, :3] = np.where(tile[:, 3:] > 0, tile[:, :3], 0)
        packed = pixels.view("<u4")[..., 0]
        masks.setflags(write=False)
        packed.setflags(write=False)
        return masks, packed

    def _layers(self) -> list[tuple[int, int, NDArray[np.bool_]]]:
        """Return the drawing order: (slot drawn, slot that decides, per attribute id of the latter whether to draw)."""
        layer = np.zeros(self.num_attributes, dtype="U16")
        for entry in self.record["parts"]:
            layer[entry["id"]] = entry.get("layer", "")
        tucked = layer == "under boots"  # trousers go into the boots; skirts hang over them
        front = layer == "front"  # scarves lie over the clothes, cloaks hang behind the body
        rules = {
            "boots:under": ("legs", ~tucked),
            "boots:over": ("legs", tucked),
            "cloak:back": ("cloak", ~front),
            "cloak:front": ("cloak", front),
        }
        layers = []
        for step in self.record["draw_order"]:
            slot = step.partition(":")[0]
            decider, rule = rules.get(step, (slot, np.ones(self.num_attributes, dtype=bool)))
            layers.append((self.slots.index(slot), self.slots.index(decider), rule))
        return layers
