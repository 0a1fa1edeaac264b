"""Walk down trees of proposals on chip: recursive rejection, exact or relaxed by LANTERN (arXiv:2410.03355).

The reference twin is ``vargen.samplers.acceptance.recursive.walk_tree``, which also holds the rules that have no kernel (K-SEQ, given
probabilities of proposals).

Letters: G guidance branches, B images, n nodes, C children of a node, D depth, V codes, R draft laws, U uniforms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vargen.kernels.acceptance import NOTHING_LEFT
from vargen.kernels.draw import check_logits, new_errors, raise_errors
from vargen.kernels.language import triton
from vargen.kernels.tree.neighborhood import RESIDUALS
from vargen.kernels.tree.triton_kernels import walk_kernel
from vargen.kernels.verify.arguments import _law_arguments, dense_rows
from vargen.kernels.verify.reference import Setting


def walk_on_chip(
    logits: Tensor,
    tokens: Tensor,
    children: Tensor,
    uniforms: Tensor,
    *,
    levels: int,
    positions: Tensor,
    limit: Tensor,
    laws: Tensor | None = None,
    law_of: Tensor | None = None,
    replacement: bool = False,
    relaxation: Any = None,
    forced: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    errors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Walk every image down its tree in one launch.

    Args:
        logits: ``[G, B, n, V]`` raw rows behind the nodes.
        tokens: ``[B, n]`` int64 proposals, -1 where there is none.
        children: ``[B or 1, n, C]`` int64 in the order in which they are tested, -1 behind the last.
        uniforms: ``[B, U]`` float32 in [0, 1), U >= n - 1.
        levels: D + 1.
        positions: ``[B, D + 1]`` int64 code positions of the slots, named when a row is bad.
        limit: ``[B]`` int64 slots left; the last one is never proposed for.
        laws, law_of, replacement: as in ``vargen.samplers.drafters.tree.TreeDraft``.
        relaxation: ``neighbors, k, delta, lam, residual``; None is exact.
        forced: ``[B, D + 1]`` int64 code that a slot must hold, -1 where free.
        guidance_scale, temperature, top_k, top_p: as in :func:`vargen.kernels.warp.warp_logits`; temperature above 0.
        errors: as in :func:`vargen.kernels.draw.draw`.

    Returns:
        Nodes ``[B, D + 1]``, their codes ``[B, D + 1]`` (-1 behind the last), how many were kept ``[B]``, the law
        ``[B, V]`` of the code behind them, tests made ``[B]``, and proposals ``[B]`` kept by the relaxation only.

    Raises:
        ValueError: bad rows.
    """
    check_logits(logits)
    batch, num_codes, device = tokens.shape[0], logits.shape[-1], logits.device
    record = new_errors(batch, device) if errors is None else errors
    logits = dense_rows(logits)
    setting = Setting(guidance_scale, temperature, top_k, top_p)
    law, search = _law_arguments(logits, setting)

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    path, codes, result = empty(batch, levels), empty(batch, levels) - 1, empty(batch, num_codes, dtype=torch.float32)
    counts = [empty(batch) for _ in range(3)]
    given = {
        "tokens_ptr": tokens,
        "children_ptr": children,
        "q_ptr": result if laws is None else laws.float(),
        "law_of_ptr": tokens if law_of is None else law_of,
        "uniforms_ptr": uniforms.float(),
        "limit_ptr": limit,
        "positions_ptr": positions,
        "forced_ptr": positions if forced is None else forced,
    }
    sizes = {"N": tokens.shape[1], "C": children.shape[-1], "U": uniforms.shape[1], "levels": levels}
    walk_kernel[(batch,)](
        **{name: value.contiguous() for name, value in given.items()},
        **(law | search | sizes | _relaxation_arguments(relaxation, tokens)),
        children_stride=children.shape[1] * children.shape[2] if len(children) > 1 else 0,
        num_laws=0 if laws is None else laws.shape[1],
        work_ptr=torch.empty(batch, 2, num_codes, device=device),
        path_ptr=path,
        codes_ptr=codes,
        num_kept_ptr=counts[0],
        law_ptr=result,
        used_ptr=counts[1],
        relaxed_ptr=counts[2],
        errors_ptr=record,
        FORCED=forced is not None,
        SAMPLED=laws is not None,
        REPLACEMENT=replacement,
        NOTHING=NOTHING_LEFT,
    )
    if errors is None:
        raise_errors(record)
    return path, codes, counts[0], result, counts[1], counts[2]


def _relaxation_arguments(relaxation: Any, filler: Tensor) -> dict[str, Any]:
    if relaxation is None or relaxation.k == 0:
        limits = {"width": 0, "num_neighbors": 0, "constant": 0.0, "factor": 0.0}
        return {"neighbors_ptr": filler, **limits, "RELAXED": False, "RESIDUAL": 0, "COUNT": 0, "NEIGHBORS": 1}
    constant, factor = (relaxation.delta or 0.0, 0.0) if relaxation.lam is None else (0.0, relaxation.lam - 1.0)
    table = relaxation.neighbors.contiguous()
    return {
        "neighbors_ptr": table,
        "width": table.shape[1],
        "num_neighbors": relaxation.k,
        "constant": constant,
        "factor": factor,
        "RELAXED": True,
        "RESIDUAL": RESIDUALS.index(relaxation.residual),
        "COUNT": relaxation.k,
        "NEIGHBORS": triton.next_power_of_2(relaxation.k + 1),
    }
