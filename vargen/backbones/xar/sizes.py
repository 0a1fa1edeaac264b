"""Sizes of xAR (arXiv:2502.20388) and what the shapes of a checkpoint tell about its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vargen.checkpoints.bounds import count_layers, read_shape

# name -> width, depth of either half, heads
SIZES: dict[str, tuple[int, int, int]] = {"B": (768, 8, 12), "L": (1024, 16, 16), "H": (1280, 20, 16)}
RECOMPUTED = ("mask", "*.attn.rope.*")  # entries of official files that follow from the sizes


def xar_size_config(size: str) -> dict[str, int]:
    """Constructor arguments of a published size."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; published sizes are {', '.join(SIZES)}")
    dim, depth, heads = SIZES[size]
    return {"dim": dim, "encoder_depth": depth, "decoder_depth": depth, "num_heads": heads}


def infer_xar_config(state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read an xAR configuration off the shapes; ``given`` settles what shapes cannot tell.

    Raises:
        ValueError: ``num_heads`` is neither given nor that of a published width.
    """
    dim, channels = read_shape(state_dict, "z_proj.weight", 2)
    heads = {width: count for width, _, count in SIZES.values()}
    side = round(read_shape(state_dict, "encoder_pos_embed_learned", 3)[1] ** 0.5)
    if "num_heads" not in given and dim not in heads:
        raise ValueError(f"num_heads cannot be read off the shapes (width {dim}); pass num_heads=...")
    config: dict[str, Any] = {
        "grid_size": (side, side),
        "latent_channels": channels,
        "dim": dim,
        "encoder_depth": count_layers(state_dict, "encoder_blocks."),
        "decoder_depth": count_layers(state_dict, "decoder_blocks."),
        "num_heads": heads.get(dim),
        "num_classes": read_shape(state_dict, "class_emb.weight", 2)[0] - 1,
    }
    return {**config, **given}
