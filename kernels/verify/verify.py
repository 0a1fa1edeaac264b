"""Verify a window of drafts against the target: the acceptance step of speculative Jacobi decoding and its family.

Three ways to carry a row that cannot be committed yet, all exact (Teng et al., 2024, arXiv:2410.01699; So et al.,
2025, arXiv:2510.24211): ``independent`` redraws it, ``maximal`` continues the accept-or-residual step at every row,
``gumbel`` reuses the noise of the position and commits while the draw repeats the draft.

p is the target distribution, q the draft's. Letters: G guidance branches (conditional first), B images, W window, V codes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from vargen.kernels.draw import check_logits, new_errors, raise_errors
from vargen.kernels.language import use_triton
from vargen.kernels.verify.arguments import launch
from vargen.kernels.verify.reference import verify_reference
from vargen.kernels.verify.types import CARRIES, Carry, Draft, GroupSpec, Label, Place, VerifyNoise, VerifyOutcome
from vargen.kernels.warp import WarpSettings

__all__ = ["Carry", "Draft", "GroupSpec", "Label", "VerifyNoise", "VerifyOutcome", "verify_window"]


def verify_window(
    logits: Tensor,
    draft: Draft,
    *,
    carry: Carry,
    seeds: Tensor,
    positions: Tensor,
    iteration: Tensor,
    num_rows: Tensor,
    guidance_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    forced: Tensor | None = None,
    group: GroupSpec | None = None,
    noise: VerifyNoise | None = None,
    errors: Tensor | None = None,
) -> VerifyOutcome:
    """Decide every row of a window.

    Args:
        logits: ``[G, B, W, V]``; row j is the distribution of position ``positions[b, j]``, given the drafts before it.
        draft: proposals, entry j for the same position.
        carry: ``"gumbel"``, ``"maximal"``, ``"independent"``, or ``"none"`` for chains whose rows behind the first
            rejection are thrown away (draft models; those rows then hold -1).
        seeds: ``[B]`` int64.
        positions: ``[B, W]`` int64.
        iteration: ``[B]`` int64, the image's own count of iterations.
        num_rows: ``[B]`` int64 in [0, W], how many rows count; 0 for a finished image.
        guidance_scale, temperature, top_k, top_p: as in :func:`vargen.kernels.warp.warp_logits`; temperature 0 is
            greedy: the argmax is emitted and a draft is accepted when it is the argmax.
        forced: ``[B, W]`` int64 codes that a position must hold, -1 where it is free.
        group: grouped acceptance; changes the distribution. Not with ``"gumbel"``.
        noise: explicit noise in place of Philox (uniforms in place of Gumbel rows always run the reference).
        errors: record of bad rows, as in :func:`vargen.kernels.draw.draw`.

    Returns:
        The outcome of every row and how many rows each image commits (at least 1 if it is not finished).

    Raises:
        ValueError: unknown carry, unfitting shapes, labels without logits; NaN, infinite or all -inf rows.
    """
    check_logits(logits)
    _check_window(logits, draft, carry, positions, forced)
    if group is not None and carry == "gumbel":
        raise ValueError(
            "grouped acceptance needs carry 'independent' or 'maximal', got 'gumbel', which has no ratio test"
        )
    noise = noise or VerifyNoise()
    settings = WarpSettings(guidance_scale, temperature, top_k, top_p)
    inverse = noise.fresh is not None and noise.fresh.ndim == 2
    if inverse or not (use_triton(logits) or torch.compiler.is_compiling()):
        place = Place(seeds, positions, iteration, num_rows, forced)
        return verify_reference(logits, draft, carry, place, settings, group, noise)
    record = new_errors(logits.shape[1], logits.device) if errors is None else errors
    spec = group or GroupSpec(size=0)
    outcome = _verify(
        logits,
        *(draft.tokens, draft.kind, draft.prob, draft.row, draft.logits, draft.stats),
        carry,
        *(seeds, positions, iteration, num_rows, forced, record),
        *settings.flat(logits.device),
        *(spec.size, spec.prob_threshold, spec.distance_threshold, spec.embeddings),
        *(noise.accept, noise.fresh, noise.residual),
    )
    if errors is None and use_triton(logits):
        raise_errors(record)
    return VerifyOutcome(*outcome)


def _check_window(logits: Tensor, draft: Draft, carry: str, positions: Tensor, forced: Tensor | None) -> None:
    """Check that a window's arguments fit one another."""
    shape = logits.shape[1:3]
    if carry not in CARRIES:
        raise ValueError(f"carry must be one of {', '.join(CARRIES)}, got {carry!r}")
    for name, value in (("draft.tokens", draft.tokens), ("positions", positions), ("forced", forced)):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must be [B, W] = {list(shape)} like the logits, got {list(value.shape)}")
    if draft.logits is not None and draft.logits.shape[-1] != logits.shape[-1]:
        raise ValueError(f"draft.logits have {draft.logits.shape[-1]} codes, the target {logits.shape[-1]}")


@torch.library.custom_op("vargen::verify", mutates_args=("errors",))
def _verify(
    logits: Tensor,
    tokens: Tensor,
    kind: Tensor,
    prob: Tensor,
    row: Tensor,
    label_logits: Tensor | None,
    label_stats: Tensor | None,
    carry: str,
    seeds: Tensor,
    positions: Tensor,
    iteration: Tensor,
    num_rows: Tensor,
    forced: Tensor | None,
    errors: Tensor,
    scale: float,
    scales: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    group_size: int,
    prob_threshold: float,
    distance_threshold: float,
    embeddings: Tensor | None,
    accept: Tensor | None,
    fresh: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parts = (
        Draft(tokens, kind, prob, row, label_logits, label_stats),
        cast(Carry, carry),
        Place(seeds, positions, iteration, num_rows, forced),
        WarpSettings.of_flat(scale, scales, temperature, top_k, top_p),
        GroupSpec(group_size, prob_threshold, distance_threshold, embeddings) if group_size else None,
        VerifyNoise(accept, fresh, residual),
    )
    found = launch(logits, *parts, errors) if use_triton(logits) else verify_reference(logits, *parts)
    return found.tokens, found.accepted, found.prob, found.num_committed, found.stats


@_verify.register_fake
def _(logits: Tensor, tokens: Tensor, kind: Tensor, prob: Tensor, row: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(tokens),
        torch.empty_like(tokens, dtype=torch.bool),
        torch.empty_like(tokens, dtype=torch.float32),
        tokens.new_empty(tokens.shape[0]),
        tokens.new_empty((*tokens.shape, 2), dtype=torch.float32),
    )
