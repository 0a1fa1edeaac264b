"""Sizes of the LlamaGen family and what the shapes of a checkpoint tell about its configuration.

Shared by the families that extend LlamaGen's blocks (NAR, PAR).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vargen.checkpoints.bounds import CheckpointError, count_layers, read_shape

# name: layers, heads, width (paper, table 1 and the official model registry)
SIZES: dict[str, tuple[int, int, int]] = {
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "XXXL": (48, 40, 2560),
    "1B": (22, 32, 2048),
    "3B": (24, 32, 3200),
    "7B": (32, 32, 4096),
}

# buffers that old checkpoints carry although they are recomputed
RECOMPUTED = ("freqs_cis", "layers.*.attention.kv_cache.*")


def size_config(size: str) -> dict[str, int]:
    """Constructor arguments of a published size."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; published sizes are {', '.join(SIZES)}")
    num_layers, num_heads, dim = SIZES[size]
    return {"num_layers": num_layers, "num_heads": num_heads, "dim": dim}


def infer_config(state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read a LlamaGen configuration off the shapes; ``given`` settles what shapes cannot tell.

    Raises:
        ValueError: ``num_heads`` is neither given nor implied by a published size, ``grid_size`` is missing, the keys are
            not those of LlamaGen, or layers or shapes are none that a model has.
    """
    given = {k: v for k, v in given.items() if v is not None}
    missing = [
        k for k in ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "output.weight") if k not in state_dict
    ]
    if missing:
        raise ValueError(
            f"not a LlamaGen checkpoint: it lacks {', '.join(missing)}; pass a state dict in the official layout"
        )
    num_codes, dim = read_shape(state_dict, "tok_embeddings.weight", 2)
    num_layers = count_layers(state_dict, "layers.")
    config: dict[str, Any] = {"codebook_size": num_codes, "dim": dim, "num_layers": num_layers}
    config["ffn_dim"] = read_shape(state_dict, "layers.0.feed_forward.w1.weight", 2)[0]
    heads = {(d, layers): h for layers, h, d in SIZES.values()}
    config["num_heads"] = given.get("num_heads") or heads.get((dim, num_layers))
    if config["num_heads"] is None:
        raise ValueError(
            f"num_heads cannot be read off the shapes (width {dim}, {num_layers} layers); pass num_heads=..."
        )
    if given.get("grid_size") is None:
        raise ValueError(
            "grid_size cannot be read off the shapes; pass grid_size=(height, width) in codes, e.g. (16, 16)"
        )
    config["num_kv_heads"] = _kv_heads(state_dict, dim, config["num_heads"])
    return {**config, **_infer_condition(state_dict, given), **given}


def _kv_heads(state_dict: Mapping[str, Tensor], dim: int, num_heads: int) -> int:
    if dim % num_heads:
        raise ValueError(f"num_heads must divide the width {dim} of the checkpoint, got {num_heads}")
    rows = read_shape(state_dict, "layers.0.attention.wqkv.weight", 2)[0]
    found = (rows // (dim // num_heads) - num_heads) // 2
    if found < 1:
        raise CheckpointError(f"layers.0.attention.wqkv.weight has {rows} rows, too few for {num_heads} heads")
    return found


def _infer_condition(state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    if "cls_embedding.uncond_embedding" in state_dict:
        tokens, width = read_shape(state_dict, "cls_embedding.uncond_embedding", 2)
        return {"condition_type": "caption", "caption_dim": width, "num_condition_tokens": tokens}
    if "cls_embedding.embedding_table.weight" not in state_dict:
        raise ValueError("not a LlamaGen checkpoint: it has no cls_embedding")
    rows = read_shape(state_dict, "cls_embedding.embedding_table.weight", 2)[0]
    if "cls_embedding.slot_embedding.weight" in state_dict:
        slots = read_shape(state_dict, "cls_embedding.slot_embedding.weight", 2)[0]
        return {"condition_type": "attributes", "num_attributes": rows, "num_condition_tokens": slots}
    if given.get("num_classes") == rows:
        return {"condition_type": "class", "class_dropout_prob": 0.0}  # trained without a null label
    has_null = given.get("class_dropout_prob", 0.1) > 0
    return {"condition_type": "class", "num_classes": rows - int(has_null)}
