"""Checkpoints that are folders: weights in one file or in shards with an index, and a config beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vargen.checkpoints.bounds import MAX_TENSORS, CheckpointError
from vargen.checkpoints.families import Family, get_family, guess_family
from vargen.checkpoints.files import read_checkpoint_file
from vargen.validation.folders import check_shards, read_settings

# what a folder's weights are called, the first one there is read: both forms are often published side by side
NAMES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
# model_type in the config.json of the authors -> family; keys alone cannot tell a Llama with codes from one without
TYPES = {
    "multi_modality": "janus-original",
    "Emu3": "emu3-original",
    "Emu3VisionVQ": "emu3-vision-tokenizer",
}


def read_checkpoint(path: Path) -> tuple[Mapping[str, Any], int]:
    """Read a file, the shards that an index lists, or what a folder holds of them.

    Returns:
        The content, mapped from the files, and their bytes together.

    Raises:
        CheckpointError: as ``read_checkpoint_file``; an index that does not fit its shards.
    """
    if path.is_dir():
        indexes = list(path.glob("*.index.json"))
        found = next((path / name for name in NAMES if (path / name).is_file()), None)
        path = found or (indexes[0] if len(indexes) == 1 else path)
    return _read_shards(path) if path.name.endswith(".index.json") else read_checkpoint_file(path)


def _read_shards(index: Path) -> tuple[dict[str, Tensor], int]:
    places = _places(index)
    state_dict: dict[str, Tensor] = {}
    size = 0
    for shard in sorted(set(places.values())):
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index.parent} lacks the shard {shard} that {index.name} lists; copy it there")
        content, bytes_read = read_checkpoint_file(index.parent / shard)
        named = {name for name, place in places.items() if place == shard}
        held = {name for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
        if held != named:
            odd = min(held ^ named)
            what = "lacks" if odd in named else "holds, beyond the index,"
            raise CheckpointError(f"{index.parent / shard} {what} {odd}; {index.name} and shards are of two versions")
        state_dict |= {name: content[name].detach() for name in named}
        size += bytes_read
    return state_dict, size


def _places(index: Path) -> dict[str, str]:
    """Name of every tensor -> name of the file that holds it."""
    try:
        stored = read_settings(index)
        check_shards(index, stored)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    places: dict[str, str] = stored["weight_map"]
    if len(places) > MAX_TENSORS:
        raise CheckpointError(f"{index} lists {len(places):,} tensors, more than the {MAX_TENSORS:,} allowed")
    return places


def read_config(path: str | Path) -> dict[str, Any]:
    """The ``config.json`` in a folder, or beside a file; empty where there is none.

    Raises:
        ValueError: it is no JSON object, or too large.
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    return read_settings(file) if file.is_file() else {}


def family_of(source: Any, state_dict: Iterable[str]) -> Family | None:
    """The family of a checkpoint, by the config beside it where that names one, else by its keys and shapes.

    Args:
        source: path of the checkpoint, or a mapping from memory.
        state_dict: its names, with tensors where they are at hand.
    """
    if isinstance(source, str | Path):
        stored = read_config(source).get("model_type")
        if isinstance(stored, str) and stored in TYPES:
            named, keys = get_family(TYPES[stored]), list(state_dict)
            if named.has_keys(keys):
                return named
    return guess_family(state_dict)
