"""Reading of golden files. Large random weights are stored by how they were drawn, so that the repository stays small.

Besides plain ``<name>.safetensors`` there are two forms:

- ``<name>.drawn.json`` lists for each tensor the seed, the place in the stream of ``torch.rand`` or ``torch.randn``, scale and
  offset that give the recorded numbers (to the last bit or the one before it), and a few of these numbers, which are
  compared: should a release of torch draw others, reading fails and says so. What was not drawn stands beside it, packed.
- ``<name>.safetensors.xz``: float32 tensors packed as byte planes, one after the other, under xz. ``python -m
  tests.golden_files BITS FILE...`` packs files in place and rounds away that many of the 23 bits of the mantissa.
"""

from __future__ import annotations

import json
import lzma
import math
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor


def load_file(path: str | Path) -> dict[str, Tensor]:
    """Tensors of ``<name>.safetensors``, stored in any form."""
    return safetensors.torch.load_file(unpacked(path))


def unpacked(path: str | Path) -> Path:
    """A plain file: the path itself, or a temporary one made of what is stored."""
    path = Path(path)
    forms = [path.with_suffix(".drawn.json"), path.with_name(path.name + ".xz")]
    stored = [form for form in forms if form.is_file()]
    return path if path.is_file() or not stored else _plain(path)


def pack(tensors: Mapping[str, Tensor], bits: int = 0) -> bytes:
    """Bytes of a packed file, ``bits`` bits of each mantissa rounded away."""
    return lzma.compress(
        safetensors.torch.save({name: _split(value, bits) for name, value in tensors.items()}), preset=9
    )


def unpack(data: bytes) -> dict[str, Tensor]:
    """Undo ``pack``, up to the rounding."""
    return {name: _merge(value) for name, value in safetensors.torch.load(lzma.decompress(data)).items()}


def draw(recipe: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Draw tensors again.

    Args:
        recipe: a dict a tensor: "key", "kind" ("rand" or "randn"), "seed", "shape", "scale", "offset", "start" (the place in
            the stream of "rand"; "randn" draws stand in their order) and "ends" (first and last value); "divisor" of the
            scaled numbers and "half" for those that were rounded to float16. One without a key was drawn and not used.

    Raises:
        ValueError: torch draws other numbers than those that were recorded.
    """
    tensors = {}
    for kind, seed in sorted({(entry["kind"], entry["seed"]) for entry in recipe}):
        entries = [entry for entry in recipe if (entry["kind"], entry["seed"]) == (kind, seed)]
        generator = torch.Generator().manual_seed(seed)
        if kind == "rand":
            stream = torch.rand(max(e["start"] + math.prod(e["shape"]) for e in entries), generator=generator)
        for e in entries:
            if kind == "rand":
                raw = stream[e["start"] : e["start"] + math.prod(e["shape"])].view(e["shape"])
            else:
                raw = torch.randn(e["shape"], generator=generator)
            if e["key"] is None:
                continue
            value = raw * torch.tensor(e["scale"]) / e.get("divisor", 1.0)
            value = value + torch.tensor(e["offset"]) if e["offset"] else value
            value = value.half().float() if e.get("half") else value
            tensors[e["key"]] = value
            ends = torch.stack([value.flatten()[0], value.flatten()[-1]])
            if not torch.allclose(ends, torch.tensor(e["ends"]), rtol=1e-3 if e.get("half") else 1e-5, atol=1e-6):
                raise ValueError(f"torch {torch.__version__} draws other numbers for {e['key']} than were recorded")
    return tensors


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="golden-")


@cache
def _plain(path: Path) -> Path:
    recipe, packed = path.with_suffix(".drawn.json"), path.with_name(path.name + ".xz")
    tensors = draw(json.loads(recipe.read_text())) if recipe.is_file() else {}
    if packed.is_file():
        tensors |= unpack(packed.read_bytes())
    folder = Path(_folder().name, f"{abs(hash(path)):x}")
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / path.name)
    return folder / path.name


def _split(value: Tensor, bits: int) -> Tensor:
    step = 1 << bits
    whole = (value.reshape(-1).view(torch.int32) + step // 2) & -step  # the carry rounds to nearest
    return whole.view(torch.uint8).view(*value.shape, 4).movedim(-1, 0).contiguous()


def _merge(planes: Tensor) -> Tensor:
    return planes.movedim(0, -1).reshape(-1, 4).contiguous().view(torch.float32).view(planes.shape[1:])


if __name__ == "__main__":
    for name in sys.argv[2:]:
        file = Path(name)
        tensors = safetensors.torch.load_file(file)
        if any(value.dtype != torch.float32 for value in tensors.values()):
            raise SystemExit(f"{file} holds other types than float32")
        file.with_name(file.name + ".xz").write_bytes(pack(tensors, int(sys.argv[1])))
        file.unlink()
