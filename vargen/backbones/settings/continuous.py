"""What the constructors of backbones over continuous tokens take; see ``vargen.backbones.settings.common``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from vargen.backbones.layers.diffusion_head import NUM_FREQUENCIES, PREDICTION_TYPES
from vargen.backbones.layers.gaussian_diffusion import NUM_TIMESTEPS, spaced_timesteps
from vargen.backbones.layers.transformer import swiglu_dim
from vargen.backbones.settings.common import (
    AREA,
    BLOCKS,
    CLASS_OR_SLOTS,
    DROPOUT,
    FACTOR,
    GRID,
    HIDDEN,
    MAYBE_POSITIONS,
    MAYBE_ROWS,
    POSITIONS,
    ROWS,
    SHARE,
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
    MAX_WIDTH,
    Check,
    Settings,
    at_most,
    check_choice,
    check_integer,
    check_number,
    optional,
)

LONGEST_STEPS = 1000  # characters of a list of steps


def check_steps(name: str, value: Any) -> str:
    """Return the steps of a chain as ``spaced_timesteps`` reads them."""
    if not isinstance(value, str):
        value = check_integer(name, value, low=1, high=NUM_TIMESTEPS, hint='or numbers with commas, as "25" or "4,0"')
    elif len(value) > LONGEST_STEPS:
        raise ValueError(f"{name} must be at most {LONGEST_STEPS} characters long, got {len(value)}")
    try:
        spaced_timesteps(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return str(value)


def _head_weights(token_dim: int, dim: int, depth: int, width: int) -> int:
    return width * (width * (5 * depth + 4) + dim + 3 * token_dim + 2 * NUM_FREQUENCIES + 5 * depth + 8)


def _patched(latent_channels: int, patch_size: int) -> int:
    return latent_channels * patch_size**2


_TOKENS: dict[str, Check] = {
    "grid_size": GRID,
    "latent_channels": WIDTH,
    "patch_size": partial(check_integer, low=1, high=256),
    "condition_type": CLASS_OR_SLOTS,
    "num_classes": MAYBE_ROWS,
    "num_condition_tokens": MAYBE_POSITIONS,
    "num_attributes": MAYBE_ROWS,
    "head_depth": BLOCKS,
    "head_width": WIDTH,
    "num_sampling_steps": check_steps,
    "last_timestep": optional(partial(check_integer, low=0, high=NUM_TIMESTEPS - 1)),
    "prediction_type": partial(check_choice, allowed=PREDICTION_TYPES),
    "diffusion_batch_mul": partial(check_integer, low=1, high=1024),
    "input_noise": partial(check_number, low=0.0, high=1e6),
    "dropout": DROPOUT,
    "class_dropout_prob": SHARE,
}
_PATCH = at_most(MAX_WIDTH, "numbers of a token", _patched)


# MAR


def _mar_heads(c: Any) -> None:
    for part in ("encoder", "decoder"):
        dim, heads = getattr(c, f"{part}_dim"), getattr(c, f"{part}_num_heads")
        check_heads(dim, heads, prefix=f"{part}_")
        check_hidden(dim, c.mlp_ratio)


def _mar_positions(grid_size: Sequence[int], buffer_size: int, num_condition_tokens: int) -> int:
    return area(grid_size, max(buffer_size, num_condition_tokens))


def _mar_weights(
    grid_size: Sequence[int],
    latent_channels: int,
    patch_size: int,
    encoder_dim: int,
    encoder_depth: int,
    decoder_dim: int,
    decoder_depth: int,
    mlp_ratio: float,
    condition_type: str,
    num_classes: int,
    num_condition_tokens: int,
    num_attributes: int,
    buffer_size: int,
    head_depth: int,
    head_width: int,
) -> int:
    token_dim = _patched(latent_channels, patch_size)
    length = _mar_positions(grid_size, buffer_size, num_condition_tokens)
    rows = condition_rows(condition_type, num_classes, num_attributes, num_condition_tokens)
    stacks = sum(
        depth * dim * (4 * dim + 2 * int(dim * mlp_ratio) + int(mlp_ratio) + 12)
        for depth, dim in ((encoder_depth, encoder_dim), (decoder_depth, decoder_dim))
    )
    tables = encoder_dim * (rows + token_dim + length + decoder_dim + 8) + decoder_dim * (2 * length + 6)
    return stacks + tables + _head_weights(token_dim, decoder_dim, head_depth, head_width)


MAR = Settings(
    {
        **_TOKENS,
        "encoder_dim": WIDTH,
        "encoder_depth": BLOCKS,
        "encoder_num_heads": WIDTH,
        "decoder_dim": WIDTH,
        "decoder_depth": BLOCKS,
        "decoder_num_heads": WIDTH,
        "mlp_ratio": FACTOR,
        "buffer_size": POSITIONS,
        "mask_ratio_min": SHARE,
        "mask_ratio_std": partial(check_number, low=1e-3, high=100.0),
    },
    (
        _mar_heads,
        check_condition,
        _PATCH,
        at_most(MAX_POSITIONS, "positions", _mar_positions),
    ),
    _mar_weights,
)


# causal MAR


def _causal_weights(
    grid_size: Sequence[int],
    latent_channels: int,
    patch_size: int,
    dim: int,
    num_layers: int,
    ffn_dim: int | None,
    condition_type: str,
    num_classes: int,
    num_condition_tokens: int,
    num_attributes: int,
    head_depth: int,
    head_width: int,
) -> int:
    token_dim = _patched(latent_channels, patch_size)
    rows = condition_rows(condition_type, num_classes, num_attributes, num_condition_tokens)
    tables = dim * (rows + token_dim + area(grid_size, num_condition_tokens) + 2)
    head = _head_weights(token_dim, dim, head_depth, head_width)
    return gated_blocks(dim, num_layers, ffn_dim or swiglu_dim(dim, 16)) + tables + head


CAUSAL_MAR = Settings(
    {**_TOKENS, "dim": WIDTH, "num_layers": BLOCKS, "num_heads": WIDTH, "ffn_dim": optional(HIDDEN)},
    (
        check_rotary,
        check_condition,
        _PATCH,
        AREA,
    ),
    _causal_weights,
)


# xAR


def _celled(c: Any) -> None:
    if any(side % count for side, count in zip(c.grid_size, c.cells, strict=True)):
        raise ValueError(f"cells must divide grid_size, got {c.cells} and {c.grid_size}")
    check_hidden(c.dim, c.mlp_ratio * 2 / 3)


def _xar_weights(
    grid_size: Sequence[int],
    latent_channels: int,
    dim: int,
    encoder_depth: int,
    decoder_depth: int,
    mlp_ratio: float,
    num_classes: int,
) -> int:
    block = dim * (10 * dim + 3 * int(dim * mlp_ratio * 2 / 3) + 2 * int(mlp_ratio) + 16)
    tables = num_classes + 2 * area(grid_size, None) + 2 * latent_channels + 2 * dim + 2 * NUM_FREQUENCIES + 16
    return (encoder_depth + decoder_depth) * block + dim * tables


XAR = Settings(
    {
        "grid_size": GRID,
        "cells": partial(GRID, words="(rows, columns) of cells"),
        "latent_channels": WIDTH,
        "dim": WIDTH,
        "encoder_depth": BLOCKS,
        "decoder_depth": BLOCKS,
        "num_heads": WIDTH,
        "mlp_ratio": FACTOR,
        "num_classes": ROWS,
        "class_dropout_prob": SHARE,
    },
    (
        check_rotary,
        _celled,
        AREA,
    ),
    _xar_weights,
)
