"""What the constructors of the tokenizers take: every argument by itself, then what must go together.

The bounds are wide: they stop what no machine holds before anything is allocated. Counts of weights are a little high.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from vargen.tokenizers.multiscale_vq.quantizer import UPSAMPLE
from vargen.validation.checks import (
    MAX_POSITIONS,
    MAX_ROWS,
    MAX_WIDTH,
    Check,
    Settings,
    at_most,
    check_choice,
    check_flag,
    check_integer,
    check_list,
    check_number,
    check_scales,
    optional,
    pair_of,
)

WIDTH = partial(check_integer, low=1, high=MAX_WIDTH)
MAYBE_WIDTH = partial(check_integer, low=0, high=MAX_WIDTH)
UNITS = partial(check_integer, low=1, high=64)  # residual blocks of a level
WEIGHT = partial(check_number, low=0.0, high=1e6)  # of a part of a loss
LEVELS = range(1, 11)  # of resolution

_CONVOLUTIONS: dict[str, Check] = {
    "in_channels": WIDTH,
    "base_channels": WIDTH,
    "channel_multipliers": partial(
        check_list, item=partial(check_integer, low=1, high=1024), lengths=LEVELS, words="a list of 1..10 integers"
    ),
    "num_res_blocks": UNITS,
    "norm_num_groups": WIDTH,
}
_CODES: dict[str, Check] = {
    **_CONVOLUTIONS,
    "codebook_size": partial(check_integer, low=1, high=MAX_ROWS),
    "codebook_dim": WIDTH,
    "attention": partial(check_choice, allowed=(True, False, "mid")),
    "dropout": partial(check_number, low=0.0, high=1.0, open_high=True),
    "encoder_type": partial(check_choice, allowed=("conv", "patch")),
}


def _downsample(c: Any) -> int:
    return 2 ** (len(c.channel_multipliers) - 1)


def _normed(c: Any) -> None:
    for multiplier in (1, *c.channel_multipliers):
        if c.base_channels * multiplier % c.norm_num_groups:
            raise ValueError(
                f"norm_num_groups={c.norm_num_groups} must divide every width, "
                f"got base_channels={c.base_channels} times {multiplier} of channel_multipliers"
            )


def _vq_patch(c: Any) -> None:
    dim = c.in_channels * _downsample(c) ** 2
    if c.encoder_type == "patch" and (c.codebook_dim != dim or c.l2_norm):
        raise ValueError(
            f"encoder_type 'patch' needs codebook_dim={dim} and l2_norm=False, got codebook_dim={c.codebook_dim}, "
            f"l2_norm={c.l2_norm} with in_channels={c.in_channels} and {len(c.channel_multipliers)} channel_multipliers"
        )


def _widths(base_channels: int, channel_multipliers: Sequence[int]) -> list[int]:
    return [base_channels * multiplier for multiplier in (1, *channel_multipliers)]


def _convolution_weights(widths: Sequence[int], num_res_blocks: int, ends: int) -> int:
    """Encoder and decoder of taming's kind; ``ends`` channels come in and go out."""
    blocks = sum(
        (num_res_blocks + 1) * (9 * (before + after) * after + before * after + 4 * after * after + 10 * after)
        + 9 * after**2
        for before, after in pairwise(widths)
    )
    last = widths[-1]
    return 2 * (blocks + 40 * last**2 + 40 * last + 9 * ends * (widths[0] + last) + ends)


def _vq_weights(
    in_channels: int,
    base_channels: int,
    channel_multipliers: Sequence[int],
    num_res_blocks: int,
    z_channels: int,
    codebook_size: int,
    codebook_dim: int,
) -> int:
    widths = _widths(base_channels, channel_multipliers)
    network = _convolution_weights(widths, num_res_blocks, in_channels + z_channels)
    return network + (codebook_size + 2 * z_channels + 2) * (codebook_dim + 1)


VQ = Settings(
    {
        **_CODES,
        "z_channels": WIDTH,
        "l2_norm": check_flag,
        "commit_loss_beta": WEIGHT,
        "entropy_loss_ratio": WEIGHT,
        "legacy_beta": check_flag,
        "patch_residual": check_flag,
    },
    (
        _vq_patch,
        _normed,
    ),
    _vq_weights,
)


# VAR's


def _multiscale_patch(c: Any) -> None:
    dim = c.in_channels * _downsample(c) ** 2
    if c.encoder_type == "patch" and c.codebook_dim != dim:
        raise ValueError(
            f"encoder_type 'patch' needs codebook_dim={dim}, got {c.codebook_dim} "
            f"with in_channels={c.in_channels} and {len(c.channel_multipliers)} channel_multipliers"
        )
    if c.quant_conv_kernel_size % 2 == 0:
        raise ValueError(f"quant_conv_kernel_size must be odd, got {c.quant_conv_kernel_size}")


def _multiscale_positions(scales: Sequence[int | tuple[int, int]]) -> int:
    return sum(math.prod(pair_of(scale)) for scale in scales)


def _multiscale_weights(
    in_channels: int,
    base_channels: int,
    channel_multipliers: Sequence[int],
    num_res_blocks: int,
    z_channels: int | None,
    codebook_size: int,
    codebook_dim: int,
    scales: Sequence[int | tuple[int, int]],
    quant_conv_kernel_size: int,
    num_phi: int,
) -> int:
    width = max(z_channels or 0, codebook_dim)
    network = _convolution_weights(_widths(base_channels, channel_multipliers), num_res_blocks, in_channels + width)
    kernels = 2 * quant_conv_kernel_size**2 * width * codebook_dim + 2 * width
    phi = max(num_phi, len(scales)) * (9 * codebook_dim**2 + codebook_dim)
    return network + kernels + phi + codebook_size * (codebook_dim + len(scales))


MULTISCALE_VQ = Settings(
    {
        **_CODES,
        "scales": check_scales,
        "beta": WEIGHT,
        "znorm": check_flag,
        "quant_conv_kernel_size": partial(check_integer, low=1, high=31),
        "phi_ratio": partial(check_number, low=0.0, high=1.0),
        "num_phi": partial(check_integer, low=0, high=64),
        "upsample": partial(check_choice, allowed=UPSAMPLE),
        "residual": check_flag,
        "z_channels": optional(WIDTH),
    },
    (
        _multiscale_patch,
        _normed,
        at_most(MAX_POSITIONS, "positions", _multiscale_positions),
    ),
    _multiscale_weights,
)


# Infinity's


def _bsq_weights(
    in_channels: int, base_channels: int, channel_multipliers: Sequence[int], num_res_blocks: int, codebook_dim: int
) -> int:
    return _convolution_weights(
        _widths(base_channels, channel_multipliers), num_res_blocks, in_channels + codebook_dim
    )


MULTISCALE_BSQ = Settings(
    {
        **_CONVOLUTIONS,
        "codebook_dim": WIDTH,
        "patch": partial(check_integer, low=1, high=8),
        "scales": check_scales,
    },
    (
        _normed,
        at_most(MAX_POSITIONS, "positions", _multiscale_positions),
    ),
    _bsq_weights,
)


# NBP's


def _video_levels(c: Any) -> None:
    steps = len(c.channel_multipliers) - 1
    if len(c.temporal_downsample) != steps:
        raise ValueError(
            f"temporal_downsample must have one entry for each of the {steps} steps between levels "
            f"(channel_multipliers), got {len(c.temporal_downsample)}"
        )
    if c.dictionary and (steps or c.unit_range):
        raise ValueError("dictionary=True needs a single entry in channel_multipliers and unit_range=False")
    for multiplier in c.channel_multipliers:
        width, groups = c.base_channels * multiplier, c.norm_num_groups
        if groups and width % min(groups, width):
            raise ValueError(
                f"norm_num_groups={groups} must divide every width, got {width} of base_channels={c.base_channels} "
                "and channel_multipliers"
            )


def _video_weights(
    in_channels: int,
    base_channels: int,
    channel_multipliers: Sequence[int],
    num_res_blocks: int,
    num_mid_blocks: int,
    levels: Sequence[int],
    patch_size: Sequence[int],
    refine_channels: int,
    dictionary: bool,
) -> int:
    widths, pixels = _widths(base_channels, channel_multipliers), in_channels * math.prod(patch_size)
    units = sum(
        num_res_blocks * (27 * (before + after) * after + before * after) + 27 * (1 + 8) * max(before, after) ** 2
        for before, after in pairwise(widths)
    )
    last = widths[-1]
    ends = 2 * pixels * 27 * (widths[0] + last + 1) + 27 * last * (last + len(levels) + 8)
    table = math.prod(levels) * pixels if dictionary else 0
    return (
        2 * units
        + 2 * (num_mid_blocks + 1) * (54 * last**2 + 8 * last)
        + ends
        + table
        + 18 * in_channels * refine_channels
    )


VIDEO_FSQ = Settings(
    {
        **_CONVOLUTIONS,
        "temporal_downsample": partial(
            check_list, item=check_flag, lengths=range(10), words="a list of True and False, one for each step"
        ),
        "num_mid_blocks": partial(check_integer, low=0, high=64),
        "levels": partial(
            check_list,
            item=partial(check_integer, low=2, high=MAX_WIDTH),
            lengths=range(1, 25),
            words="a list of 1..24 integers of at least 2",
        ),
        "fsq_variant": partial(check_choice, allowed=("nbp", "cosmos")),
        "norm_num_groups": MAYBE_WIDTH,
        "factorized": check_flag,
        "patch_size": partial(check_list, item=UNITS, lengths=(3,), words="(frames, height, width) of a patch"),
        "refine_channels": MAYBE_WIDTH,
        "unit_range": check_flag,
        "dictionary": check_flag,
    },
    (
        _video_levels,
        at_most(MAX_ROWS, "codes", lambda levels: math.prod(levels)),
    ),
    _video_weights,
)
