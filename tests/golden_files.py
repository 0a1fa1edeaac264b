"""Reading of golden files. Large random weights are stored packed, so that the repository stays small.

A packed file ``<name>.safetensors.xz`` holds the byte planes of float32 tensors, one after the other, in a safetensors file
under xz. ``python -m tests.golden_files BITS FILE...`` packs files in place and rounds away that many of the 23 bits of the
mantissa: 0, or 4 (relative error 2**-21) where the outputs are compared to 1e-4.
"""

from __future__ import annotations

import lzma
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor


def load_file(path: str | Path) -> dict[str, Tensor]:
    """Tensors of ``<name>.safetensors``, stored plainly or packed."""
    return safetensors.torch.load_file(unpacked(path))


def unpacked(path: str | Path) -> Path:
    """A plain file: the path itself, or a temporary copy of what is stored packed."""
    path = Path(path)
    packed = path.with_name(path.name + ".xz")
    return _unpack(packed) if packed.is_file() and not path.is_file() else path


def pack(tensors: Mapping[str, Tensor], bits: int = 0) -> bytes:
    """Bytes of a packed file, ``bits`` bits of each mantissa rounded away."""
    return lzma.compress(safetensors.torch.save({name: _split(value, bits) for name, value in tensors.items()}), preset=9)


def unpack(data: bytes) -> dict[str, Tensor]:
    """Undo ``pack``, up to the rounding."""
    return {name: _merge(value) for name, value in safetensors.torch.load(lzma.decompress(data)).items()}


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="golden-")


@cache
def _unpack(packed: Path) -> Path:
    folder = Path(_folder().name, f"{abs(hash(packed)):x}")
    folder.mkdir()
    safetensors.torch.save_file(unpack(packed.read_bytes()), folder / packed.stem)
    return folder / packed.stem


def _split(value: Tensor, bits: int) -> Tensor:
    step = 1 << bits
    whole = (value.reshape(-1).view(torch.int32) + step // 2) & -step  # the carry rounds to nearest
    return whole.view(torch.uint8).view(*value.shape, 4).movedim(-1, 0).contiguous()


def _merge(planes: Tensor) -> Tensor:
    # a clone: an empty tensor counts as contiguous whatever its strides
    return planes.movedim(0, -1).clone(memory_format=torch.contiguous_format).view(torch.float32)[..., 0]


if __name__ == "__main__":
    for name in sys.argv[2:]:
        file = Path(name)
        tensors = safetensors.torch.load_file(file)
        if any(value.dtype != torch.float32 for value in tensors.values()):
            raise SystemExit(f"{file} holds other types than float32")
        file.with_name(file.name + ".xz").write_bytes(pack(tensors, int(sys.argv[1])))
        file.unlink()
