"""Near-ties: draws so close that the last bits of float32 could have decided otherwise.

With the shared-noise rule a code is ``argmax(logits + noise)``, so windows and batches change it only where the two best sums are as
close as logits differ between forward passes of other shapes. Counted behind a run, in one forward pass, so that drawing costs nothing.

Letters: G guidance branches, B images, N codes, V entries of the codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vargen.kernels.warp import warp_logits
from vargen.protocols import ConditionInput
from vargen.random import gumbel, seed_tensor
from vargen.samplers.window.decoder import WindowSampler
from vargen.samplers.window.layout import SlotLayout
from vargen.validation.checks import check_number, check_seeds

MARGIN = 1e-5


@dataclass(frozen=True)
class NearTie:
    """One draw that was close."""

    seed: int
    position: int
    code: int  # that was drawn
    other: int  # that came second
    margin: float  # the winner's sum of logit and noise less the second's


@torch.no_grad()
def near_ties(
    sampler: WindowSampler,
    backbone: Any,
    condition: ConditionInput,
    codes: Tensor,
    *,
    seeds: Sequence[int] | int,
    margin: float = MARGIN,
) -> list[NearTie]:
    """List the draws of finished images whose two best candidates are less than ``margin`` apart.

    Args:
        sampler: whose guidance, temperature, top-k and top-p drew them, by shared noise or code after code.
        backbone: the model, without structural codes.
        condition: as in ``sample``.
        codes: ``[B, N]`` what was drawn.
        seeds: of the images.
        margin: largest distance listed, in nats.

    Raises:
        ValueError: temperature 0, which draws without noise, codes of another shape, or a margin that is no number above 0.
    """
    check_number("margin", margin, low=0.0, open_low=True)
    if sampler.temperature == 0:
        raise ValueError("near-ties are those of draws with noise, got temperature=0; take a temperature above 0")
    prepared = backbone.prepare(condition, guidance_scale=sampler.guidance_scale)
    layout, _ = SlotLayout.of(backbone)
    if codes.shape != (prepared.batch, layout.num_slots):
        raise ValueError(f"codes must be [{prepared.batch}, {layout.num_slots}], got {list(codes.shape)}")
    session, first = backbone.open(prepared, max_window=codes.shape[1])
    logits = torch.cat([first.logits, backbone.step(session, codes[:, :-1]).logits], dim=2)
    positions = layout.to(logits.device).code_index.expand(len(codes), -1)
    logits = sampler.within_interval(logits.float(), positions)
    sums = warp_logits(logits, **sampler.warp)  # [B, N, V]
    listed = check_seeds(seeds, prepared.batch)
    keys = seed_tensor(listed, backbone.device)
    best, which = (sums + gumbel(keys, positions, sums.shape[-1])).topk(2, dim=-1)
    gap = best[..., 0] - best[..., 1]
    return [
        NearTie(listed[b], int(positions[b, n]), int(which[b, n, 0]), int(which[b, n, 1]), float(gap[b, n]))
        for b, n in (gap < margin).nonzero().tolist()
    ]
