"""Sizes of NBP (arXiv:2502.07737) and what the shapes of a checkpoint tell about its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vargen.checkpoints.bounds import count_layers, read_shape

SIZES: dict[str, tuple[int, int, int]] = {  # layers, heads, width; the official scripts say base, xl and 3b
    "XL": (24, 16, 1536),
    "XXL": (24, 32, 2048),
    "3B": (32, 32, 3072),
}
CODES = 64000  # of the published tokenizer
TEXT = {96016: (32000, 16)}  # rows of the published text models -> text ids, codes of a block
PREFIX = "transformer."
OTHERS = ("first_stage_model.", "lpips.", "loss.")  # the tokenizer and what trained it


def nbp_size_config(size: str) -> dict[str, int]:
    """Constructor arguments of a published size."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; published sizes are {', '.join(SIZES)}")
    num_layers, num_heads, dim = SIZES[size]
    return {"num_layers": num_layers, "num_heads": num_heads, "dim": dim}


def official_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformer of a published file under our names: no prefix, no masks, no tokenizer."""
    kept = {k: v for k, v in state_dict.items() if not k.startswith(OTHERS) and "mask" not in k}
    return {k.removeprefix(PREFIX): v for k, v in kept.items()}


def infer_nbp_config(weights: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read a configuration off the shapes; ``given`` settles what shapes cannot tell.

    Raises:
        ValueError: the number of heads, or how the vocabulary divides, is neither given nor that of a published model.
    """
    missing = [k for k in ("tok_emb.weight", "pos_emb", "uncond_embedding") if k not in weights]
    if missing:
        raise ValueError(f"not an NBP checkpoint: it lacks {', '.join(PREFIX + k for k in missing)}")
    rows, dim = read_shape(weights, "tok_emb.weight", 2)
    layers = count_layers(weights, "blocks.")
    tokens = read_shape(weights, "uncond_embedding", 2, least=0)[0]
    config: dict[str, Any] = {"dim": dim, "num_layers": layers, "num_condition_tokens": tokens}
    config["max_positions"] = read_shape(weights, "pos_emb", 3)[1]
    heads = given.get("num_heads") or {(d, n): h for n, h, d in SIZES.values()}.get((dim, layers))
    if heads is None:
        raise ValueError(f"num_heads cannot be read off the shapes (width {dim}, {layers} layers); pass num_heads=...")
    config |= {"num_heads": heads, "condition_type": "text" if tokens else "none"}
    if tokens:
        config |= _vocabulary(rows, given)
    else:
        config["codebook_size"] = rows
    return {**config, **given}


def _vocabulary(rows: int, given: Mapping[str, Any]) -> dict[str, int]:
    """How the rows of a text model divide into special tokens, text and codes."""
    if rows in TEXT and "codebook_size" not in given:
        return {"codebook_size": CODES, "text_vocabulary": TEXT[rows][0]}
    size = 1
    for side in given.get("block", (1, 1, 16)):
        size *= side
    codes = given.get("codebook_size")
    if codes is None or rows - codes - size < 1:
        raise ValueError(f"the {rows} rows of the vocabulary do not divide; pass codebook_size=... and block=...")
    return {"text_vocabulary": rows - codes - size}
