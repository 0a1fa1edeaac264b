"""Sizes of the Infinity family: models, grids of all aspect ratios, and what the shapes of a checkpoint tell.

Letters: D width, d bits of a position, h w a grid of positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vargen.backbones.layers.rope import spread
from vargen.checkpoints.bounds import CheckpointError, count_layers, read_shape
from vargen.validation.checks import check_choice, check_integer

Grid = tuple[int, int]
STRIDE = 16  # pixels of a position along a side
PIECES = {"0.06M": 7, "0.25M": 10, "0.6M": 12, "1M": 13}  # pixels of a picture: so many scales of its table
TALL = {  # height : width, and the grids of a picture of about a million pixels
    "1:1": (
        (1, 1),
        (2, 2),
        (4, 4),
        (6, 6),
        (8, 8),
        (12, 12),
        (16, 16),
        (20, 20),
        (24, 24),
        (32, 32),
        (40, 40),
        (48, 48),
        (64, 64),
    ),
    "5:4": (
        (1, 1),
        (2, 2),
        (3, 3),
        (5, 4),
        (10, 8),
        (15, 12),
        (20, 16),
        (25, 20),
        (30, 24),
        (35, 28),
        (45, 36),
        (55, 44),
        (70, 56),
    ),
    "4:3": (
        (1, 1),
        (2, 2),
        (4, 3),
        (8, 6),
        (12, 9),
        (16, 12),
        (20, 15),
        (24, 18),
        (28, 21),
        (36, 27),
        (48, 36),
        (60, 45),
        (72, 54),
    ),
    "3:2": (
        (1, 1),
        (2, 2),
        (3, 2),
        (6, 4),
        (9, 6),
        (15, 10),
        (21, 14),
        (27, 18),
        (33, 22),
        (39, 26),
        (48, 32),
        (63, 42),
        (78, 52),
    ),
    "7:4": (
        (1, 1),
        (2, 2),
        (3, 3),
        (7, 4),
        (11, 6),
        (14, 8),
        (21, 12),
        (28, 16),
        (35, 20),
        (42, 24),
        (56, 32),
        (70, 40),
        (84, 48),
    ),
    "2:1": (
        (1, 1),
        (2, 2),
        (4, 2),
        (6, 3),
        (10, 5),
        (16, 8),
        (22, 11),
        (30, 15),
        (38, 19),
        (46, 23),
        (60, 30),
        (74, 37),
        (90, 45),
    ),
    "5:2": (
        (1, 1),
        (2, 2),
        (5, 2),
        (10, 4),
        (15, 6),
        (20, 8),
        (25, 10),
        (30, 12),
        (40, 16),
        (50, 20),
        (65, 26),
        (80, 32),
        (100, 40),
    ),
    "3:1": (
        (1, 1),
        (2, 2),
        (6, 2),
        (9, 3),
        (15, 5),
        (21, 7),
        (27, 9),
        (36, 12),
        (45, 15),
        (54, 18),
        (72, 24),
        (90, 30),
        (111, 37),
    ),
}
# the official tables, height : width; a wide picture has the grids of the tall one turned
GRIDS: dict[str, tuple[Grid, ...]] = {
    **TALL,
    **{":".join(reversed(name.split(":"))): tuple((w, h) for h, w in grids) for name, grids in TALL.items()},
}
SIZES: dict[
    str, tuple[int, int, int, int]
] = {  # blocks, D, heads, d; without weights: the layer* of the paper's ablations
    "2b": (32, 2048, 16, 32),
    "8b": (40, 3584, 28, 56),
    "layer12": (12, 768, 8, 16),
    "layer16": (16, 1152, 12, 16),
    "layer24": (24, 1536, 16, 16),
    "layer32": (32, 2080, 20, 16),
    "layer40": (40, 2688, 24, 16),
    "layer48": (48, 3360, 28, 16),
}
POOLED = 128  # width of the heads that pool the text, in text features


def infinity_size_config(size: str) -> dict[str, Any]:
    """Constructor arguments of a published size."""
    check_choice("size", size, tuple(SIZES))
    depth, dim, heads, bits = SIZES[size]
    return {"dim": dim, "num_layers": depth, "num_heads": heads, "num_bits": bits}


def ffn_width(dim: int) -> int:
    """Hidden width of the feed-forward: 4 D to the nearest multiple of 256, which is at least that."""
    return max(1, round(4 * dim / 256)) * 256


def scales_of(aspect_ratio: str = "1:1", pixels: str = "1M") -> tuple[Grid, ...]:
    """The grids of an official picture size, coarse to fine.

    Args:
        aspect_ratio: height to width, such as ``"3:2"``.
        pixels: about how many the picture has: ``"0.06M"``, ``"0.25M"``, ``"0.6M"`` or ``"1M"``.

    Raises:
        ValueError: none of the tables; the known ones are shown.

    Example:
        >>> scales_of("2:1", "0.06M")[-1]
        (22, 11)
    """
    check_choice("aspect_ratio (height:width)", aspect_ratio, tuple(GRIDS))
    check_choice("pixels", pixels, tuple(PIECES))
    return GRIDS[aspect_ratio][: PIECES[pixels]]


def scales_for(height: int, width: int) -> tuple[Grid, ...]:
    """The grids of a picture of so many pixels, which must be a size of the official tables.

    Raises:
        ValueError: it is not; the nearest shape is shown with its sizes.

    Example:
        >>> scales_for(1024, 1024)[-1]
        (64, 64)
    """
    check_integer("height", height, low=1)
    check_integer("width", width, low=1)
    for name in GRIDS:
        for pixels in PIECES:
            grids = scales_of(name, pixels)
            if (grids[-1][0] * STRIDE, grids[-1][1] * STRIDE) == (height, width):
                return grids
    near = nearest_ratio(height, width)
    sizes = ", ".join(f"{h * STRIDE}x{w * STRIDE}" for h, w in (scales_of(near, p)[-1] for p in PIECES))
    raise ValueError(
        f"no table has {height}x{width} pixels (height x width); the nearest aspect ratio is {near}, with {sizes}; known "
        f"ratios (height:width): {', '.join(GRIDS)}"
    )


def nearest_ratio(height: int, width: int) -> str:
    """The aspect ratio of the tables that is nearest, by the absolute difference of height / width, as officially."""
    return min(GRIDS, key=lambda name: abs(_quotient(name) - height / width))


def _quotient(name: str) -> float:
    tall, wide = map(int, name.split(":"))
    return tall / wide


def reference_of(scales: tuple[Grid, ...]) -> Grid:
    """The grid in which positions of all scales are counted: the last of the table that the scales begin, or their own."""
    return next((grids[-1] for grids in GRIDS.values() if grids[: len(scales)] == scales), scales[-1])


def places(count: int, reference: int) -> Tensor:
    """``[count]`` where rows (or columns) of a scale lie among those of the reference: float32, rounded half to even."""
    return torch.round(torch.arange(count, dtype=torch.float32) * (reference / count))


def rope_rows(scales: tuple[Grid, ...], reference: Grid, head_dim: int, base: float = 10000.0) -> Tensor:
    """Rotations of all positions as ``layers.rope.rotate`` takes them: ``[L, 2, head_dim]`` float32 on the CPU."""
    width = head_dim // 2
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    found = []
    for height, columns in scales:
        cells = torch.cartesian_prod(places(height, reference[0]), places(columns, reference[1])).view(-1, 2, 1)
        found.append((cells * frequencies).flatten(1))
    angles = torch.cat(found)
    return spread(torch.stack([angles.cos(), angles.sin()], dim=-1))


# files


def to_native(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an official state dict: blocks lie in chunks there, and text parts beside them.

    Raises:
        CheckpointError: chunks of different lengths, or a number missing.
    """
    renamed: dict[str, Tensor] = {}
    num_chunks = count_layers(state_dict, "block_chunks.", least=0)
    chunks = [count_layers(state_dict, f"block_chunks.{i}.module.") for i in range(num_chunks)]
    if len(set(chunks)) > 1:
        raise CheckpointError(f"block_chunks must be equally long, got {chunks} blocks; the file is not complete")
    for name, value in state_dict.items():
        if name.startswith("block_chunks."):
            _, chunk, _, block, rest = name.split(".", 4)
            name = f"blocks.{int(chunk) * chunks[0] + int(block)}.{rest}"
        elif name.startswith(("text_norm.", "text_proj_for_", "cfg_uncond")):
            name = f"text.{name}"
        renamed[name] = value
    return renamed


def to_official(state_dict: Mapping[str, Tensor], num_chunks: int = 1) -> dict[str, Tensor]:
    """Undo ``to_native``, with so many chunks; one chunk stands for ``blocks.*``."""
    per_chunk = count_layers(state_dict, "blocks.") // num_chunks
    renamed = {}
    for name, value in state_dict.items():
        if name.startswith("blocks.") and num_chunks > 1:
            _, block, rest = name.split(".", 2)
            name = f"block_chunks.{int(block) // per_chunk}.module.{int(block) % per_chunk}.{rest}"
        renamed[name.removeprefix("text.")] = value
    return renamed


def infer_infinity_config(state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the settings off the shapes of a state dict in native names; ``given`` overrides them.

    Raises:
        CheckpointError: keys of Infinity are missing.
    """
    dim, num_bits = read_shape(state_dict, "word_embed.weight", 2)
    text_length, text_dim = read_shape(state_dict, "text.cfg_uncond", 2)
    return {
        "dim": dim,
        "num_layers": count_layers(state_dict, "blocks."),
        "num_heads": read_shape(state_dict, "blocks.0.sa.scale_mul_1H11", 4)[1],
        "num_bits": num_bits,
        "text_dim": text_dim,
        "text_length": text_length,
        "text_pool_heads": read_shape(state_dict, "text.text_proj_for_sos.ca.mat_q", 3)[1],
        "ffn_dim": read_shape(state_dict, "blocks.0.ffn.fc1.weight", 2)[0],
        "max_scales": read_shape(state_dict, "lvl_embed.weight", 2)[0],
        **given,
    }
