"""Sizes of the VAR family and what the shapes of a checkpoint tell about its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vargen.checkpoints.bounds import count_layers, read_shape
from vargen.validation.checks import MAX_POSITIONS

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
DEPTHS = (12, 16, 20, 24, 30, 36)  # width 64 and one head for each block of depth
HEAD_DIM = 64
# entries that checkpoints may hold and that are recomputed
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "blocks.*.attn.zero_k_bias")


def var_size_config(size: str) -> dict[str, Any]:
    """Constructor arguments of a published size."""
    names = {f"d{depth}": depth for depth in DEPTHS}
    if size not in names:
        raise ValueError(f"unknown size {size!r}; published sizes are {', '.join(names)}")
    depth = names[size]
    return {
        "dim": HEAD_DIM * depth,
        "num_layers": depth,
        "num_heads": depth,
        "scales": SCALES_512 if depth == 36 else SCALES_256,
        "shared_aln": depth == 36,
        "drop_path_rate": 0.1 * depth / 24,
    }


def infer_var_config(state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read a VAR configuration off the shapes; ``given`` settles what shapes cannot tell.

    Raises:
        ValueError: keys of VAR are missing, or ``scales`` or ``num_heads`` are neither given nor readable.
    """
    needed = ("pos_1LC", "lvl_embed.weight", "word_embed.weight", "head.weight", "blocks.0.ffn.fc1.weight")
    if missing := [k for k in needed if k not in state_dict]:
        raise ValueError(
            f"not a VAR checkpoint: it lacks {', '.join(missing)}; pass a state dict in the official layout"
        )
    dim, codebook_dim = read_shape(state_dict, "word_embed.weight", 2)
    config: dict[str, Any] = {
        "dim": dim,
        "num_layers": count_layers(state_dict, "blocks."),
        "codebook_size": read_shape(state_dict, "head.weight", 2)[0],
        "codebook_dim": codebook_dim,
        "mlp_ratio": read_shape(state_dict, "blocks.0.ffn.fc1.weight", 2)[0] / dim,
        "shared_aln": "shared_ada_lin.1.weight" in state_dict,
        "attn_l2_norm": "blocks.0.attn.scale_mul_1H11" in state_dict,
    }
    if "class_emb.weight" in state_dict:
        config["num_classes"] = read_shape(state_dict, "class_emb.weight", 2)[0] - 1
    elif "attribute_emb.slot_embedding.weight" in state_dict:
        config["condition_type"] = "attributes"
        config["num_attributes"] = read_shape(state_dict, "attribute_emb.embedding_table.weight", 2)[0]
        config["num_condition_tokens"] = read_shape(state_dict, "attribute_emb.slot_embedding.weight", 2)[0]
    config["num_heads"] = given.get("num_heads") or _num_heads(state_dict, config)
    config["scales"] = given.get("scales") or _scales(state_dict)
    return {**config, **given}


def _num_heads(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> int:
    if config["attn_l2_norm"]:
        return read_shape(state_dict, "blocks.0.attn.scale_mul_1H11", 4)[1]
    if config["dim"] == HEAD_DIM * config["num_layers"]:
        return config["num_layers"]
    raise ValueError(f"num_heads cannot be read off the shapes (width {config['dim']}); pass num_heads=...")


def _scales(state_dict: Mapping[str, Tensor]) -> list[int]:
    length, count = read_shape(state_dict, "pos_1LC", 3)[1], read_shape(state_dict, "lvl_embed.weight", 2)[0]
    levels = state_dict.get("lvl_1L")
    if levels is not None and _are_levels(levels, length, count):
        sides = [round(n**0.5) for n in levels.flatten().bincount().tolist()]
        if sum(side**2 for side in sides) == length:
            return sides
    for scales in (SCALES_256, SCALES_512):
        if (length, count) == (sum(s * s for s in scales), len(scales)):
            return list(scales)
    raise ValueError(
        f"scales cannot be read off the shapes ({length} positions in {count} scales); pass scales=(1, 2, ...)"
    )


def _are_levels(levels: Tensor, length: int, count: int) -> bool:
    """Whether the buffer holds the number of a scale for each position, so that it may be counted."""
    if levels.is_meta or levels.dtype != torch.int64 or levels.numel() != length or length > MAX_POSITIONS:
        return False
    low, high = (int(level) for level in levels.aminmax())
    return 0 <= low and high < count
