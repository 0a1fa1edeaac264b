"""Sizes of the NAR family and what the shapes of a checkpoint tell about its configuration (arXiv:2503.10696)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vargen.backbones.llamagen.sizes import SIZES, infer_config
from vargen.checkpoints.bounds import CheckpointError, count_layers, read_shape

# name: layers below the first head, heads, width
IMAGE_SIZES: dict[str, tuple[int, int, int]] = {**SIZES, "M": (18, 16, 1024)}
VIDEO_SIZES: dict[str, tuple[int, int, int]] = {
    "abs-S": (12, 6, 384),
    "abs-B": (12, 12, 768),
    "abs-L": (24, 16, 1024),
    "abs-LP": (30, 20, 1280),
    "abs-XL": (36, 20, 1280),
}
VIDEO_DEFAULTS: dict[str, Any] = {"grid_size": (4, 16, 16), "codebook_size": 8192, "num_classes": 101}  # LARP, UCF-101


def nar_size_config(size: str) -> dict[str, Any]:
    """Constructor arguments of a published size."""
    known = {**IMAGE_SIZES, **VIDEO_SIZES}
    if size not in known:
        raise ValueError(f"unknown size {size!r}; published sizes are {', '.join(known)}")
    num_layers, num_heads, dim = known[size]
    config: dict[str, Any] = {"num_layers": num_layers, "num_heads": num_heads, "dim": dim}
    return {**config, **VIDEO_DEFAULTS} if size in VIDEO_SIZES else config


def infer_nar_config(state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read a NAR configuration off the shapes; ``given`` settles what shapes cannot tell.

    Raises:
        ValueError: ``num_heads`` is neither given nor implied by a published size, ``grid_size`` is missing or does not
            fit the file, or the keys are not those of NAR.
    """
    video = "output_D.weight" in state_dict
    given = {name: value for name, value in given.items() if value is not None}
    if video:
        given = _video_grid(state_dict, given)
    extra = 2 if video else 1  # blocks above the first head
    depth = count_layers(state_dict, "layers.") - extra
    if depth < 1:
        raise CheckpointError(f"the checkpoint has {depth + extra} layers, its heads alone need {extra}")
    width = read_shape(state_dict, "tok_embeddings.weight", 2)[1]
    sizes = VIDEO_SIZES if video else IMAGE_SIZES
    heads = {(dim, layers): count for layers, count, dim in sizes.values()}
    if "num_heads" not in given and (width, depth) in heads:
        given["num_heads"] = heads[width, depth]
    # what LlamaGen's reader looks for; video models have a head for each axis instead
    alias = {"output.weight": state_dict["output_D.weight"]} if video else {}
    config = infer_config({**state_dict, **alias}, given)
    config.pop("num_kv_heads")
    return {**config, "num_layers": depth, **{k: v for k, v in given.items() if k == "num_layers"}}


def _video_grid(state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    slots = read_shape(state_dict, "abs_pe", 3)[1] - 1
    grid = tuple(given.get("grid_size") or ())
    if len(grid) != 3 or grid[0] * grid[1] * grid[2] != slots:
        got = f"got {grid}" if grid else "none was given"
        raise ValueError(f"grid_size must be (frames, height, width) of the file's {slots} codes, {got}")
    return {**given, "grid_size": grid}
