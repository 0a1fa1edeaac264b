"""What the constructors of backbones over codes, and of their drafter, take; see ``vargen.backbones.settings.common``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from vargen.backbones.layers.transformer import swiglu_dim
from vargen.backbones.settings.common import (
    AREA,
    BLOCKS,
    CLASS_OR_SLOTS,
    DROPOUT,
    EPS,
    FACTOR,
    GRID,
    HIDDEN,
    MAYBE_POSITIONS,
    MAYBE_ROWS,
    PERIOD,
    POSITIONS,
    ROWS,
    SHARE,
    VIDEO_GRID,
    WIDTH,
    area,
    check_condition,
    check_heads,
    check_hidden,
    check_rotary,
    condition_rows,
    gated_blocks,
)
from vargen.validation.checks import (
    MAX_POSITIONS,
    Check,
    Settings,
    at_most,
    check_choice,
    check_flag,
    check_list,
    check_scales,
    optional,
    pair_of,
)

CODES: dict[str, Check] = {"dim": WIDTH, "num_layers": BLOCKS, "num_heads": WIDTH, "codebook_size": ROWS}
CONDITION: dict[str, Check] = {
    "num_classes": MAYBE_ROWS,
    "num_attributes": MAYBE_ROWS,
    "num_condition_tokens": MAYBE_POSITIONS,
    "class_dropout_prob": SHARE,
    "attribute_dropout_prob": SHARE,
}
ROTARY: dict[str, Check] = {
    "grid_size": GRID,
    "rope_base": PERIOD,
    "norm_eps": EPS,
    "condition_rope": partial(check_choice, allowed=("zero", "identity")),
}


# LlamaGen and the families over its blocks


def _llamagen_heads(c: Any) -> None:
    kv_heads = getattr(c, "num_kv_heads", None) or c.num_heads
    if c.dim % c.num_heads or (c.dim // c.num_heads) % 4 or c.num_heads % kv_heads:
        got = f"dim={c.dim}, num_heads={c.num_heads}, num_kv_heads={kv_heads}"
        raise ValueError(f"dim / num_heads must be a multiple of 4 and num_kv_heads divide num_heads, got {got}")


def _llamagen_hidden(c: Any) -> None:
    if c.ffn_dim is None and swiglu_dim(c.dim, c.multiple_of, c.ffn_dim_multiplier) < 1:
        raise ValueError(f"ffn_dim_multiplier must leave the feed-forward a width, got {c.ffn_dim_multiplier:g}")


def _llamagen_weights(
    dim: int,
    num_layers: int,
    codebook_size: int,
    grid_size: Sequence[int],
    condition_type: str,
    num_classes: int,
    caption_dim: int,
    num_condition_tokens: int,
    num_attributes: int,
    ffn_dim: int | None,
    multiple_of: int,
    ffn_dim_multiplier: float | None,
    code_rank: int | None,
) -> int:
    hidden = ffn_dim or swiglu_dim(dim, multiple_of, ffn_dim_multiplier)
    rows = condition_rows(condition_type, num_classes, num_attributes, num_condition_tokens)
    captions = caption_dim * (dim + num_condition_tokens) + dim * dim if condition_type == "caption" else 0
    heads, width = len(grid_size), code_rank or dim  # NAR has as many heads as axes, and a block for each
    tables = codebook_size * width * (1 + heads) + dim * (rows + area(grid_size, num_condition_tokens) + heads * width)
    return gated_blocks(dim, num_layers + heads, hidden) + tables + captions


def _grouped(c: Any) -> None:
    side, sides = math.isqrt(c.group_size), c.grid_size
    if side * side != c.group_size or side < 2 or any(s % side for s in sides) or c.group_size == math.prod(sides):
        raise ValueError(
            f"group_size must be the square (above 1) of a number that divides the sides of {sides} and leave more than "
            f"one group, got {c.group_size} (grid_size={sides})"
        )


_LLAMAGEN: dict[str, Check] = {
    **CODES,
    **CONDITION,
    **ROTARY,
    "condition_type": partial(check_choice, allowed=("class", "caption", "attributes")),
    "caption_dim": WIDTH,
    "ffn_dim": optional(HIDDEN),
    "multiple_of": HIDDEN,
    "token_dropout_p": DROPOUT,
    "resid_dropout_p": DROPOUT,
    "ffn_dropout_p": DROPOUT,
}
LLAMAGEN = Settings(
    {
        **_LLAMAGEN,
        "num_kv_heads": optional(WIDTH),
        "ffn_dim_multiplier": optional(FACTOR),
        "drop_path_rate": DROPOUT,
    },
    (_llamagen_heads, _llamagen_hidden, check_condition, AREA),
    _llamagen_weights,
)
_RULES = (_llamagen_heads, check_condition, AREA)
NAR = Settings({**_LLAMAGEN, "grid_size": VIDEO_GRID, "code_rank": optional(WIDTH)}, _RULES, _llamagen_weights)
PAR = Settings({**_LLAMAGEN, "group_size": POSITIONS}, (*_RULES, _grouped), _llamagen_weights)


def _eagle_weights(
    dim: int, ffn_dim: int, num_layers: int, codebook_size: int, grid_size: Sequence[int], num_condition_tokens: int
) -> int:
    tables = codebook_size + 2 * dim + 1 + area(grid_size, num_condition_tokens)
    return gated_blocks(dim, num_layers, ffn_dim) + dim * tables


EAGLE = Settings(
    {
        **CODES,
        **ROTARY,
        "ffn_dim": HIDDEN,
        "num_condition_tokens": POSITIONS,
        "own_embeddings": check_flag,
        "bias": check_flag,
    },
    (
        check_rotary,
        AREA,
    ),
    _eagle_weights,
)


def _row_weights(dim: int, right_dim: int, below_dim: int) -> int:
    return (right_dim + below_dim) * (2 * dim + 1) + below_dim * dim + 2 * dim


ROW = Settings(
    {
        "dim": WIDTH,
        "right_dim": HIDDEN,
        "below_dim": HIDDEN,
        "codebook_size": ROWS,
        "grid_size": GRID,
        "num_condition_tokens": POSITIONS,
    },
    (AREA,),
    _row_weights,
)


# NBP


def _blocked(c: Any) -> None:
    grid, block = c.grid_size, c.block
    if len(block) != len(grid) or any(s % b for s, b in zip(grid, block, strict=True)):
        raise ValueError(f"block must divide the grid {grid} (grid_size) side by side, got {block}")


def _nbp_heads(c: Any) -> None:
    check_heads(c.dim, c.num_heads, 2 * len(c.grid_size) if c.rope else 1)
    if c.code_rank is not None and c.condition_type in ("text", "none"):
        raise ValueError("code_rank is for models with condition_type 'class' or 'attributes'; leave it None")


def _nbp_weights(
    dim: int,
    num_layers: int,
    codebook_size: int,
    grid_size: Sequence[int],
    block: Sequence[int],
    condition_type: str,
    num_condition_tokens: int,
    text_vocabulary: int,
    num_classes: int,
    num_attributes: int,
    max_positions: int | None,
    code_rank: int | None,
) -> int:
    special = math.prod(block) + (text_vocabulary if condition_type == "text" else 0)
    rows = condition_rows(condition_type, num_classes, num_attributes, num_condition_tokens)
    rows += 2 * special + area(grid_size, num_condition_tokens) + (max_positions or 0)
    width = code_rank or dim
    blocks = num_layers * dim * (12 * dim + 13)
    return blocks + dim * (rows + 2 * width + 2) + 2 * width * codebook_size


NBP = Settings(
    {
        **CODES,
        **CONDITION,
        "grid_size": VIDEO_GRID,
        "block": partial(check_list, item=POSITIONS, lengths=(2, 3), words="the sides of a block in codes"),
        "condition_type": partial(check_choice, allowed=("text", "none", "class", "attributes")),
        "text_vocabulary": MAYBE_ROWS,
        "max_positions": optional(POSITIONS),
        "restrict_head": check_flag,
        "rope": check_flag,
        "code_rank": optional(WIDTH),
        "dropout_p": DROPOUT,
    },
    (
        _blocked,
        _nbp_heads,
        check_condition,
        AREA,
    ),
    _nbp_weights,
)


# VAR


def _var_heads(c: Any) -> None:
    check_heads(c.dim, c.num_heads)
    check_hidden(c.dim, c.mlp_ratio)


def _var_positions(scales: Sequence[int | tuple[int, int]], num_condition_tokens: int) -> int:
    return sum(math.prod(pair_of(scale)) for scale in scales) + num_condition_tokens


def _var_weights(
    dim: int,
    num_layers: int,
    codebook_size: int,
    codebook_dim: int,
    scales: Sequence[int | tuple[int, int]],
    condition_type: str,
    num_classes: int,
    num_condition_tokens: int,
    num_attributes: int,
    mlp_ratio: float,
) -> int:
    rows = condition_rows(condition_type, num_classes, num_attributes, num_condition_tokens)
    rows += 2 * _var_positions(scales, num_condition_tokens) + len(scales) + 2 * codebook_dim + codebook_size
    blocks = (num_layers + 1) * dim * (10 * dim + 2 * round(dim * mlp_ratio) + 32)
    return blocks + dim * (rows + 2 * dim + 8) + codebook_size * (codebook_dim + 1)


VAR = Settings(
    {
        **CODES,
        **CONDITION,
        "codebook_dim": WIDTH,
        "scales": check_scales,
        "condition_type": CLASS_OR_SLOTS,
        "mlp_ratio": FACTOR,
        "norm_eps": EPS,
        "shared_aln": check_flag,
        "attn_l2_norm": check_flag,
        "drop_path_rate": DROPOUT,
        "codebook_head": check_flag,
        "residual": check_flag,
    },
    (
        _var_heads,
        check_condition,
        at_most(MAX_POSITIONS, "positions", _var_positions),
    ),
    _var_weights,
)


# Infinity


def _grid_positions(scales: Sequence[int | tuple[int, int]]) -> int:
    return _var_positions(scales, 0)


def _infinity_heads(c: Any) -> None:
    check_rotary(c)
    pool = c.text_pool_heads or max(1, c.text_dim // 128)
    if c.dim % pool:
        raise ValueError(f"text_pool_heads must divide dim, got dim={c.dim} and {pool} heads")
    if len(c.scales) > c.max_scales:
        raise ValueError(f"scales must be at most {c.max_scales} (max_scales), got {len(c.scales)}")


def _infinity_weights(
    dim: int,
    num_layers: int,
    num_bits: int,
    text_dim: int,
    text_length: int,
    ffn_dim: int | None,
    max_scales: int,
) -> int:
    hidden = ffn_dim or 4 * dim + 256
    text = text_dim * (text_length + 3 * dim + 1) + 3 * dim * dim
    return num_layers * dim * (8 * dim + 2 * hidden + 32) + text + dim * (8 * dim + 3 * num_bits + max_scales + 32)


INFINITY = Settings(
    {
        "dim": WIDTH,
        "num_layers": BLOCKS,
        "num_heads": WIDTH,
        "num_bits": WIDTH,
        "scales": check_scales,
        "position_grid": optional(GRID),
        "text_dim": WIDTH,
        "text_length": POSITIONS,
        "text_pool_heads": optional(WIDTH),
        "ffn_dim": optional(HIDDEN),
        "max_scales": POSITIONS,
        "norm_eps": EPS,
        "drop_path_rate": DROPOUT,
        "class_dropout_prob": SHARE,
    },
    (
        _infinity_heads,
        at_most(MAX_POSITIONS, "positions", _grid_positions),
    ),
    _infinity_weights,
)


# Switti


def _switti_heads(c: Any) -> None:
    check_heads(c.dim, c.num_heads, 4 if c.rope else 1)
    if c.crop_condition and c.dim % 8:
        raise ValueError(f"crop_condition needs a dim that is a multiple of 8, got {c.dim}")
    if c.class_dropout_prob:
        raise ValueError(
            f"class_dropout_prob must be 0, got {c.class_dropout_prob:g}: the model has no empty caption of its own"
        )


def _switti_weights(
    dim: int,
    num_layers: int,
    codebook_size: int,
    codebook_dim: int,
    scales: Sequence[int | tuple[int, int]],
    text_dim: int,
    pooled_dim: int,
    ffn_dim: int | None,
) -> int:
    block = dim * (13 * dim + 2 * text_dim + 3 * (ffn_dim or 4 * dim) + 32) + text_dim + 5 * (ffn_dim or 4 * dim)
    rows = pooled_dim + codebook_dim + codebook_size + 2 * _grid_positions(scales) + len(scales) + 3 * dim + 32
    return num_layers * block + dim * rows + codebook_size


SWITTI = Settings(
    {
        "dim": WIDTH,
        "num_layers": BLOCKS,
        "num_heads": WIDTH,
        "codebook_size": ROWS,
        "codebook_dim": WIDTH,
        "scales": check_scales,
        "autoregressive": check_flag,
        "text_dim": WIDTH,
        "pooled_dim": WIDTH,
        "text_length": POSITIONS,
        "ffn_dim": optional(HIDDEN),
        "swiglu": check_flag,
        "rope": check_flag,
        "rope_extent": PERIOD,
        "rope_base": PERIOD,
        "crop_condition": check_flag,
        "norm_eps": EPS,
        "drop_path_rate": DROPOUT,
        "class_dropout_prob": SHARE,
    },
    (
        _switti_heads,
        at_most(MAX_POSITIONS, "positions", _grid_positions),
    ),
    _switti_weights,
)
