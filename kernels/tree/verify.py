"""Verify a tree of proposals: recursive rejection, exact or relaxed by LANTERN (arXiv:2410.03355).

The children of a node are tested one after the other, and what each rejection leaves of the distribution is taken to the
next: exact for deterministic proposals, for independent draws (SpecInfer, arXiv:2305.09781) and for draws without
replacement (arXiv:2402.14160, arXiv:2401.15077).

Letters: G guidance branches, B images, n nodes, C children of a node, D depth, V codes, R draft rows, U uniforms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vargen.kernels.draw import check_logits, new_errors, raise_errors
from vargen.kernels.language import use_triton
from vargen.kernels.tree import triton_kernels as kernels
from vargen.kernels.tree.lantern import RESIDUALS, Neighbors, Relaxation
from vargen.kernels.tree.reference import target_of, verify_tree_reference
from vargen.kernels.tree.types import AcceptedPath, TreeProposals
from vargen.kernels.warp import WarpSettings, dense_rows

__all__ = ["RESIDUALS", "AcceptedPath", "Relaxation", "TreeProposals", "verify_tree"]


def verify_tree(
    logits: Tensor,
    draft: TreeProposals,
    uniforms: Tensor,
    *,
    positions: Tensor,
    limit: Tensor,
    relaxation: Relaxation | None = None,
    forced: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    errors: Tensor | None = None,
) -> AcceptedPath:
    """Decide the tree of every image.

    Args:
        logits: ``[G, B, n, V]`` raw rows behind the nodes.
        draft: proposals.
        uniforms: ``[B, U]`` float32 in [0, 1), used one a test in order; U >= n - 1.
        positions: ``[B, D + 1]`` int64 code positions of the slots, named when a row is bad.
        limit: ``[B]`` int64 slots left, 0 for a finished image; the last one is never proposed for.
        relaxation: LANTERN; None is exact.
        forced: ``[B, D + 1]`` int64 code that a slot must hold, -1 where free.
        guidance_scale, temperature, top_k, top_p: as in :func:`vargen.kernels.warp.warp_logits`; temperature above 0.
        errors: record of bad rows, as in :func:`vargen.kernels.draw.draw`.

    Returns:
        Which proposals are kept, and the distribution of the code behind them.

    Raises:
        ValueError: bad rows, where a kernel runs; the reference leaves NaN to the draw behind the path.
    """
    settings = WarpSettings(guidance_scale, temperature, top_k, top_p)
    if draft.probs is not None or not (use_triton(logits) or torch.compiler.is_compiling()):
        return _reference(logits, draft, uniforms, limit, forced, relaxation, settings)
    check_logits(logits)
    record = new_errors(len(draft.tokens), logits.device) if errors is None else errors
    levels = draft.depth + 1
    relaxed = relaxation if relaxation is not None and relaxation.k > 0 else None
    found = _verify_tree(
        logits,
        *(draft.tokens, draft.children, draft.depth, draft.distributions, draft.row_of, draft.replacement),
        uniforms,
        *(positions[:, :levels], limit, None if forced is None else forced[:, :levels], record),
        *settings.flat(logits.device),
        *((None, 0, None, None, "paper") if relaxed is None else vars(relaxed).values()),
    )
    if errors is None and use_triton(logits):
        raise_errors(record)
    return AcceptedPath(*found)


def _reference(
    logits: Tensor,
    draft: TreeProposals,
    uniforms: Tensor,
    limit: Tensor,
    forced: Tensor | None,
    relaxation: Relaxation | None,
    settings: WarpSettings,
) -> AcceptedPath:
    target = target_of(logits, settings)
    return verify_tree_reference(target, draft, uniforms, limit=limit, relaxation=relaxation, forced=forced)


@torch.library.custom_op("vargen::verify_tree", mutates_args=("errors",))
def _verify_tree(
    logits: Tensor,
    tokens: Tensor,
    children: Tensor,
    depth: int,
    distributions: Tensor | None,
    row_of: Tensor | None,
    replacement: bool,
    uniforms: Tensor,
    positions: Tensor,
    limit: Tensor,
    forced: Tensor | None,
    errors: Tensor,
    scale: float,
    scales: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    neighbors: Tensor | None,
    k: int,
    delta: float | None,
    lam: float | None,
    residual: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    draft = TreeProposals(tokens, children, depth, distributions, row_of, replacement)
    settings = WarpSettings.of_flat(scale, scales, temperature, top_k, top_p)
    relaxation = None if neighbors is None else Relaxation(neighbors, k, delta, lam, residual)
    found = _empty_path(logits, tokens, depth)
    if use_triton(logits):
        slots = kernels.Slots(
            uniforms.float().contiguous(),
            uniforms.shape[1],
            *(limit.contiguous(), positions.contiguous(), (positions if forced is None else forced).contiguous()),
        )
        _launch(logits, draft, slots, relaxation, settings, found, errors, forced is not None)
    else:
        given = _reference(logits, draft, uniforms, limit, forced, relaxation, settings)
        if given.distribution.shape[1]:  # not where all images were finished before
            found = given
    return found.path, found.tokens, found.num_accepted, found.distribution, found.num_uniforms, found.num_relaxed


@_verify_tree.register_fake
def _(logits: Tensor, tokens: Tensor, children: Tensor, depth: int, *settings: Any) -> tuple[Tensor, ...]:
    found = _empty_path(logits, tokens, depth)
    return found.path, found.tokens, found.num_accepted, found.distribution, found.num_uniforms, found.num_relaxed


def _empty_path(logits: Tensor, tokens: Tensor, depth: int) -> AcceptedPath:
    batch = len(tokens)
    path, counts = tokens.new_zeros(batch, depth + 1), [tokens.new_zeros(batch) for _ in range(3)]
    left = logits.new_zeros(batch, logits.shape[-1], dtype=torch.float32)
    return AcceptedPath(path, torch.full_like(path, -1), counts[0], left, counts[1], counts[2])


def _launch(
    logits: Tensor,
    draft: TreeProposals,
    slots: kernels.Slots,
    relaxation: Relaxation | None,
    settings: WarpSettings,
    found: AcceptedPath,
    errors: Tensor,
    is_forced: bool,
) -> None:
    batch, num_codes, children, q = len(draft.tokens), logits.shape[-1], draft.children, draft.distributions
    nodes = kernels.Nodes(
        draft.tokens.contiguous(),
        draft.tokens.shape[1],
        children.contiguous(),
        children.shape[1] * children.shape[2] if len(children) > 1 else 0,
        children.shape[2],
        found.distribution if q is None else q.float().contiguous(),
        0 if q is None else q.shape[1],
        (draft.tokens if draft.row_of is None else draft.row_of).contiguous(),
    )
    pointers = (getattr(found, name) for name in kernels.Path._fields)
    exact = {"neighbors": Neighbors(draft.tokens, 0.0, 0.0), "width": 0, "num_neighbors": 0}
    exact |= {"RULE": 0, "COUNT": 0, "REACH": 1}
    kernels.tree_kernel[(batch,)](
        **settings.row_arguments(dense_rows(logits)),
        **settings.search_arguments(num_codes),
        **(exact if relaxation is None else relaxation.arguments()),
        nodes=nodes,
        slots=slots,
        work_ptr=torch.empty(batch, 2, num_codes, dtype=torch.float32, device=logits.device),
        found=kernels.Path(*pointers),
        errors_ptr=errors,
        levels=draft.depth + 1,
        FORCED=is_forced,
        SAMPLED=q is not None,
        REPLACEMENT=draft.replacement,
        RELAXED=relaxation is not None,
    )
