"""Sizes of MAR (arXiv:2406.11838) and what the shapes of a checkpoint tell about its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vargen.checkpoints.bounds import CheckpointError, count_layers, read_shape
from vargen.checkpoints.reader import load_original

# name -> width, depth of either transformer, heads, blocks and width of the head
SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "base": (768, 12, 12, 6, 1024),
    "large": (1024, 16, 16, 8, 1280),
    "huge": (1280, 20, 16, 12, 1536),
}


def mar_size_config(size: str) -> dict[str, Any]:
    """Constructor arguments of a published size: "base", "large" or "huge"."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; published sizes are {', '.join(SIZES)}")
    dim, depth, heads, head_depth, head_width = SIZES[size]
    return {
        "encoder_dim": dim,
        "encoder_depth": depth,
        "encoder_num_heads": heads,
        "decoder_dim": dim,
        "decoder_depth": depth,
        "decoder_num_heads": heads,
        "head_depth": head_depth,
        "head_width": head_width,
    }


def infer_mar_config(state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read a MAR configuration off the shapes; ``given`` settles what shapes cannot tell.

    Raises:
        ValueError: keys of MAR are missing, or ``grid_size`` or heads are neither given nor readable.
    """
    needed = ("z_proj.weight", "encoder_pos_embed_learned", "diffusion_pos_embed_learned", "decoder_embed.weight")
    if missing := [key for key in needed if key not in state_dict]:
        raise ValueError(
            f"not a MAR checkpoint: it lacks {', '.join(missing)}; pass a state dict in the official layout"
        )
    encoder_dim, token_dim = read_shape(state_dict, "z_proj.weight", 2)
    decoder_dim = read_shape(state_dict, "decoder_embed.weight", 2)[0]
    num_tokens = read_shape(state_dict, "diffusion_pos_embed_learned", 3)[1]
    buffer_size = read_shape(state_dict, "encoder_pos_embed_learned", 3)[1] - num_tokens
    if buffer_size < 1:
        raise CheckpointError(f"encoder_pos_embed_learned holds no condition in front of its {num_tokens} tokens")
    patch_size = given.get("patch_size", 1)
    config: dict[str, Any] = {
        "grid_size": _grid(num_tokens, given),
        "latent_channels": token_dim // patch_size**2,
        "encoder_dim": encoder_dim,
        "encoder_depth": count_layers(state_dict, "encoder_blocks."),
        "decoder_dim": decoder_dim,
        "decoder_depth": count_layers(state_dict, "decoder_blocks."),
        "mlp_ratio": read_shape(state_dict, "encoder_blocks.0.mlp.fc1.weight", 2)[0] / encoder_dim,
        "buffer_size": buffer_size,
        "head_depth": count_layers(state_dict, "diffloss.net.res_blocks."),
        "head_width": read_shape(state_dict, "diffloss.net.input_proj.weight", 2)[0],
    }
    if "class_emb.weight" in state_dict:
        config["num_classes"] = read_shape(state_dict, "class_emb.weight", 2)[0]
    heads = {dim: heads for dim, _, heads, *_ in SIZES.values()}
    for part, dim in (("encoder", encoder_dim), ("decoder", decoder_dim)):
        name = f"{part}_num_heads"
        if name not in given and dim not in heads:
            raise ValueError(f"{name} cannot be read off the shapes (width {dim}); pass {name}=...")
        config[name] = heads.get(dim)
    return {**config, **given}


def _grid(num_tokens: int, given: Mapping[str, Any]) -> tuple[int, int]:
    if "grid_size" in given:
        return tuple(given["grid_size"])  # type: ignore[return-value]
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"grid_size cannot be read off {num_tokens} tokens; pass grid_size=(height, width)")
    return side, side


def read_averaged(checkpoint: Any) -> dict[str, Tensor]:
    """The averaged weights of a training file; a plain file as it is."""
    try:
        return load_original(checkpoint, key="model_ema")
    except CheckpointError as error:
        if "model_ema" not in str(error):
            raise
        return load_original(checkpoint)
