"""Blocks of next-block prediction (NBP, Ren et al., 2025, arXiv:2502.07737): given blocks in one pass.

Letters: w items, g targets, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vargen.protocols import Step


def merged(steps: Sequence[Step]) -> Step:
    """One pass for several whose draws but the last are known beforehand: all items, the targets of the last."""
    last = steps[-1]
    joined = {name: torch.cat([getattr(step, name) for step in steps]) for name in ("kinds", "index", "slots")}
    joined |= {name: torch.cat([getattr(step, name) for step in steps]) for name in ("tau", "nu", "commit")}
    mix = F.pad(last.mix, (len(joined["kinds"]) - len(last.kinds), 0))
    return Step(**joined, targets=last.targets, mix=mix, counted=last.counted)
