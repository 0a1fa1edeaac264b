"""Sizes of the Switti family, and what the shapes of a checkpoint tell.

Letters: D width, L all positions, n side of a scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vargen.backbones.layers.rope import spread
from vargen.backbones.var.sizes import HEAD_DIM, SCALES_256, SCALES_512
from vargen.checkpoints.bounds import CheckpointError, count_layers, read_shape
from vargen.validation.checks import check_choice

SCALES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
SCALES = {10: SCALES_512, 14: SCALES_1024}  # by their number; those of 256 pixels are ten as well
SIZES: dict[str, tuple[tuple[int, ...], bool]] = {  # scales, whether a scale sees coarser ones
    "512": (SCALES_512, False),
    "512-ar": (SCALES_512, True),
    "1024": (SCALES_1024, False),
    "1024-ar": (SCALES_1024, True),
}
DEPTH = 30
BUFFERS = ("lvl_1L", "attn_bias_for_masking")  # entries that files may hold and that are recomputed

__all__ = ["BUFFERS", "DEPTH", "SCALES", "SCALES_256", "SCALES_1024", "SIZES", "infer_switti_config", "rope_rows"]


def switti_size_config(size: str) -> dict[str, Any]:
    """Constructor arguments of a published size."""
    check_choice("size", size, tuple(SIZES))
    scales, autoregressive = SIZES[size]
    return {"scales": scales, "autoregressive": autoregressive}


def rope_rows(
    scales: tuple[tuple[int, int], ...], head_dim: int, extent: float = 128.0, base: float = 10000.0
) -> Tensor:
    """Rotations of all positions as ``layers.rope.rotate`` takes them: ``[L, 2, head_dim]`` float32 on the CPU.

    Coordinates run from 0 to ``extent`` at every scale; the first half of a head turns with the column.
    """
    width = head_dim // 2
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    found = []
    for height, columns in scales:
        rows, across = (torch.arange(n, dtype=torch.float32) * (extent / max(n - 1, 1)) for n in (height, columns))
        cells = torch.cartesian_prod(rows, across).view(-1, 2).flip(1)[..., None]  # column, row
        found.append((cells * frequencies).flatten(1))
    angles = torch.cat(found)
    return spread(torch.stack([angles.cos(), angles.sin()], dim=-1))


def to_native(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an official state dict: what reads captions is a part of its own here."""
    return {f"text.{k}" if k.startswith("text_pooler.") else k: v for k, v in state_dict.items()}


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``to_native``."""
    return {name.removeprefix("text."): value for name, value in state_dict.items()}


def infer_switti_config(state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the settings off the shapes of a state dict in native names; ``given`` overrides them.

    Raises:
        CheckpointError: keys of Switti are missing, or scales, heads or ``autoregressive`` can be read nowhere.
    """
    dim, codebook_dim = read_shape(state_dict, "word_embed.weight", 2)
    depth = count_layers(state_dict, "blocks.")
    swiglu = "blocks.0.ffn.gate_proj.weight" in state_dict
    hidden = "blocks.0.ffn.gate_proj.weight" if swiglu else "blocks.0.ffn.fc1.weight"
    found: dict[str, Any] = {
        "dim": dim,
        "num_layers": depth,
        "codebook_size": read_shape(state_dict, "head.weight", 2)[0],
        "codebook_dim": codebook_dim,
        "text_dim": read_shape(state_dict, "blocks.0.cross_attn.to_kv.weight", 2)[1],
        "pooled_dim": read_shape(state_dict, "text.text_pooler.weight", 2)[1],
        "ffn_dim": read_shape(state_dict, hidden, 2)[0],
        "swiglu": swiglu,
        "rope": "pos_1LC" not in state_dict,
        "crop_condition": "crop_proj.weight" in state_dict,
    }
    if "num_heads" not in given:
        if dim != HEAD_DIM * depth:
            raise CheckpointError(f"num_heads cannot be read off the shapes (width {dim}); pass num_heads=...")
        found["num_heads"] = depth
    if "scales" not in given:
        found["scales"] = _scales(state_dict)
    if "autoregressive" not in given:
        found["autoregressive"] = _sees_coarser(state_dict)
    return {**found, **given}


def from_hub_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in the words of the library; those of the authors' ``config.json`` are translated."""
    words = {
        "use_ar": "autoregressive",
        "use_swiglu_ffn": "swiglu",
        "use_crop_cond": "crop_condition",
        "rope_size": "rope_extent",
        "rope_theta": "rope_base",
        "depth": "num_layers",
    }
    settings = {words.get(name, name): value for name, value in given.items()}
    side = settings.pop("reso", None)
    if side is not None:
        by_side = {256: SCALES_256, 512: SCALES_512, 1024: SCALES_1024}
        check_choice("reso", side, tuple(by_side))
        settings.setdefault("scales", by_side[side])
    return settings


def _scales(state_dict: Mapping[str, Tensor]) -> tuple[int, ...]:
    count = read_shape(state_dict, "lvl_embed.weight", 2)[0]
    if count not in SCALES:
        raise CheckpointError(
            f"Switti was published with 10 scales (512 pixels) or 14 (1024), the file has {count}; pass scales=(1, 2, ...)"
        )
    return SCALES[count]


def _sees_coarser(state_dict: Mapping[str, Tensor]) -> bool:
    """What the stored mask says: 0 where the last position sees the first, -inf where it does not."""
    mask = state_dict.get("attn_bias_for_masking")
    if mask is None or mask.is_meta or mask.ndim != 4 or not mask.numel():
        raise CheckpointError(
            "the file does not tell whether scales see coarser ones; pass autoregressive=True (Switti-AR) or False (Switti)"
        )
    return float(mask[0, 0, -1, 0]) == 0.0
