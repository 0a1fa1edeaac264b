"""Next-block decoding: all codes of a block in one forward pass (NBP, Ren et al., 2025, arXiv:2502.07737).

Code j of a block is guessed by code j of the block before it. A model with a condition draws its first block code by
code; a model of frame prediction continues given frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.orders import block_order
from vargen.outputs import SamplerOutput
from vargen.samplers.base import Run
from vargen.samplers.schedule.decoder import ScheduleInputs, ScheduleSampler, ScheduleState
from vargen.samplers.schedule.schedule import DecodeSchedule


@dataclass(frozen=True, kw_only=True)
class NextBlockSampler(ScheduleSampler):
    """Draw block by block, in the blocks that the model was trained for: a row, a frame, or any other.

    The published models are sampled with ``top_k=16000, top_p=0.9`` and without guidance. Codes that are given
    beforehand (``forced_codes``) are read in one pass as far as they fill the first blocks.

    Args:
        guidance_scale, temperature, top_k, top_p, guidance_interval, guidance_schedule: as in ``ScheduleSampler``.

    Example:
        >>> NextBlockSampler(top_p=0.9).config["top_p"]
        0.9
    """

    required_features: ClassVar[frozenset[str]] = frozenset({Feature.BLOCKS})

    def make_schedule(self, backbone: Any) -> DecodeSchedule:
        """Blocks of the backbone's grid, nothing given."""
        return block_schedule(backbone, 0)

    def begin(self, run: Run, inputs: ScheduleInputs) -> ScheduleState:
        """Choose the pass over given blocks by what ``forced_codes`` holds, and run it."""
        if inputs.schedule is None:
            prefix = given_codes(run.backbone, inputs.forced_codes)
            inputs = replace(inputs, schedule=block_schedule(run.backbone, prefix))
        return super().begin(run, inputs)

    def finish(self, state: ScheduleState) -> SamplerOutput:
        """Collect codes and statistics; what a head that knows text drew beside codes becomes code 0, as published."""
        out = super().finish(state)
        stray = state.tokens >= state.backbone.codebook_size
        out.codes = torch.where(stray, 0, state.tokens)
        if bool(stray.any()):
            out.stats.extra["num_stray_codes"] = int(stray.sum())
        return out


def given_codes(backbone: Any, forced: Tensor | None) -> int:
    """How many codes one pass over given blocks may take: whole blocks, known in every clip, that fill whole frames."""
    if forced is None:
        if getattr(backbone, "needs_frames", False):
            raise ValueError("this model continues given frames; pass them as frames=... (codes: forced_codes)")
        return 0
    grid, size = tuple(backbone.grid_size), int(backbone.group_size)
    num_codes = math.prod(grid)
    codes = torch.as_tensor(forced)
    if codes.ndim not in (1, 2) or codes.shape[-1] != num_codes:
        return 0  # refused where forced codes are checked
    order = block_order(grid, backbone.config.block)
    known = (codes.reshape(-1, num_codes) >= 0).all(0).cpu()
    inside = known[order].long().cumprod(0).sum()  # leading codes in block order
    prefix = min(int(inside), num_codes - size) // size * size
    while prefix and int(order[:prefix].max()) >= prefix:  # blocks of several frames or rows: no clean border here
        prefix -= size
    if prefix == 0 and getattr(backbone, "needs_frames", False):
        raise ValueError(f"this model continues given frames; give at least the first block of {size} codes")
    return prefix


def block_schedule(backbone: Any, prefix: int) -> DecodeSchedule:
    """The schedule of a backbone when its first ``prefix`` codes are given."""
    block = tuple(int(side) for side in backbone.config.block)
    return _schedule(tuple(backbone.grid_size), block, int(backbone.num_condition_tokens), prefix)


@lru_cache(maxsize=32)
def _schedule(grid_size: tuple[int, ...], block: tuple[int, ...], num_condition: int, prefix: int) -> DecodeSchedule:
    return DecodeSchedule.next_block(grid_size, block, num_condition, prefix, hybrid=num_condition > 0)
