"""Neighboring autoregressive decoding: one anti-diagonal of a grid a forward pass (NAR, He et al., 2025, arXiv:2503.10696).

Every code of the front is drawn on its own from the average guess of its upper and its left neighbor (in videos also of
the frame before): h + w - 1 passes for an image of h x w codes, T + H + W - 2 for a video.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from vargen.features import Feature
from vargen.samplers.schedule.decoder import ScheduleSampler
from vargen.samplers.schedule.schedule import DecodeSchedule


@dataclass(frozen=True, kw_only=True)
class NeighboringSampler(ScheduleSampler):
    """Draw diagonal by diagonal, the order that NAR models are trained for.

    The official image models are sampled with ``guidance_scale=4, top_k=2000`` (demo) or ``guidance_scale=2`` (FID),
    text-to-image with 7.5, video with 1.25.

    Args:
        guidance_scale, temperature, top_k, top_p, guidance_interval, guidance_schedule: as in ``ScheduleSampler``.

    Example:
        >>> NeighboringSampler(guidance_scale=2.0).config["guidance_scale"]
        2.0
    """

    required_features: ClassVar[frozenset[str]] = frozenset({Feature.NEIGHBORS})

    def make_schedule(self, backbone: Any) -> DecodeSchedule:
        """Diagonals of the backbone's grid."""
        return _diagonals(tuple(backbone.grid_size), int(backbone.num_condition_tokens))


@lru_cache(maxsize=16)
def _diagonals(grid_size: tuple[int, ...], num_condition: int) -> DecodeSchedule:
    build = DecodeSchedule.nar3d if len(grid_size) == 3 else DecodeSchedule.nar2d
    return build(grid_size, num_condition)
