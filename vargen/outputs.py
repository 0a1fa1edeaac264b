"""What samplers return: plain dataclasses whose every field states its shape.

Letters: B images, N code positions, W window.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

Guarantee = Literal["exact", "relaxed", "heuristic"]
Kind = TypeVar("Kind", bound=type)


def pytree(kind: Kind) -> Kind:
    """Let torch see the tensors of an output dataclass: ``torch.export``, ``torch.func`` and ``tree_map`` take it apart."""
    register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
    return kind


@pytree
@dataclass
class DecodeStats:
    """How a batch was decoded.

    ``num_forwards`` counts forward passes of the target backbone, prefill included; the passes of a drafter or a
    diffusion head are counted beside it and never mixed in.
    """

    num_forwards: int = 0
    num_drafter_forwards: int = 0
    num_head_rows: int = 0
    forwards_per_image: Tensor | None = None  # [B] int64: passes until this image was complete, prefill included
    commit_trace: Tensor | None = None  # [B, N] int64: the forward (0 = prefill) that made position n permanent
    guarantee: Guarantee = "exact"  # what this run kept; lower than the sampler's own when a cap or a fallback struck
    notes: list[str] = field(default_factory=list)  # one line for each departure from the sampler's own guarantee
    depends_on_rows: bool = (
        False  # of window samplers: half precision, not row_invariant; codes need not be next-token's
    )
    widths: list[int] = field(
        default_factory=list
    )  # of window samplers, slots decided by each pass behind the prefill
    peak_memory: int | None = None  # bytes at most in use so far, see ``peak_memory``; None where nobody tells
    extra: dict[str, Any] = field(default_factory=dict)  # numbers of one sampler only, named in its documentation

    def tokens_per_forward(self, num_codes: int) -> float:
        """Mean number of codes that one forward pass made permanent, over the batch."""
        if self.forwards_per_image is None:
            return num_codes / max(self.num_forwards, 1)
        return float(num_codes / self.forwards_per_image.double().mean())


@pytree
@dataclass
class SamplerOutput:
    """Result of ``sampler.sample``.

    ``codes`` is ``[B, N]`` int64 in the backbone's order (raster), or a list over scales of ``[B, n_k]`` for next-scale
    samplers; ``latents`` is ``[B, N, C]`` for continuous backbones. ``seeds`` holds the 64-bit seed of every image.
    """

    codes: Tensor | list[Tensor] | None
    seeds: list[int]
    stats: DecodeStats
    latents: Tensor | None = None


def peak_memory(device: torch.device) -> int | None:
    """Bytes at most in use so far: of a CUDA device what torch allocated, else the resident memory of the process.

    It never falls; ``torch.cuda.reset_peak_memory_stats()`` before a call makes it that call's. None on other accelerators and
    where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type != "cpu":
        return None
    try:
        import resource
    except ImportError:
        return None
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
