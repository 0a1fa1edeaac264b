"""Verify a chain of drafts with LANTERN's relaxed acceptance (Jang et al., 2025, arXiv:2410.03355; LANTERN++: Park et
al., 2025, arXiv:2502.06352): a draft counts with its nearest codes. The law of the output changes; by how much is said
in ``vargen.samplers.acceptance.lantern``. Trees are walked by ``vargen.samplers.acceptance.recursive``.

p target, q draft. Letters: G guidance branches (conditional first), B images, W window, V codes, K table width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vargen.kernels.draw import check_logits, new_errors, raise_errors
from vargen.kernels.language import triton, use_triton
from vargen.kernels.tree.neighborhood import RESIDUALS, Relaxation
from vargen.kernels.verify import relaxed_kernels as kernels
from vargen.kernels.verify.arguments import WindowLaunch
from vargen.kernels.verify.reference import Setting, verify_twin
from vargen.kernels.verify.types import Carry, Draft, Verdict, VerifyNoise
from vargen.kernels.verify.verify import CARRIES, check_window

__all__ = ["RESIDUALS", "Relaxation", "verify_relaxed"]


def verify_relaxed(
    logits: Tensor,
    draft: Draft,
    relaxation: Relaxation,
    *,
    seeds: Tensor,
    positions: Tensor,
    iteration: Tensor,
    num_rows: Tensor,
    carry: Carry = "none",
    guidance_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    forced: Tensor | None = None,
    noise: VerifyNoise | None = None,
    errors: Tensor | None = None,
) -> Verdict:
    """Decide every row of a chain, neighbours counting with the drafts.

    Args:
        logits, draft, seeds, positions, iteration, num_rows, guidance_scale, temperature, top_k, top_p, forced, noise,
            errors: as in :func:`vargen.kernels.verify.verify.verify_window`. With temperature 0 a draft is accepted when it
            would be the argmax with the mass of its neighbours added.
        relaxation: neighbours, limit and residual.
        carry: ``"none"`` for chains of a draft model, ``"independent"`` for Jacobi windows.

    Returns:
        The outcome of every row, as of :func:`vargen.kernels.verify.verify.verify_window`.

    Raises:
        ValueError: an unfitting carry, limit or neighbour table; bad rows.
    """
    check_logits(logits)
    check_window(logits, draft, carry, positions, forced)
    _check(relaxation, carry, logits.shape[-1])
    noise = noise or VerifyNoise()
    inverse = noise.fresh is not None and noise.fresh.ndim == 2
    if inverse or not (use_triton(logits) or torch.compiler.is_compiling()):
        setting = Setting(guidance_scale, temperature, top_k, top_p)
        place = (seeds, positions, iteration, num_rows)
        return verify_twin(logits, draft, carry, *place, setting, forced, noise, relaxation)
    record = new_errors(logits.shape[1], logits.device) if errors is None else errors
    per_image = guidance_scale.to(logits.device) if isinstance(guidance_scale, Tensor) else None
    scale = 1.0 if isinstance(guidance_scale, Tensor) else float(guidance_scale)
    verdict = _verify_relaxed(
        logits,
        *(draft.tokens, draft.kind, draft.prob, draft.row, draft.logits, draft.stats),
        carry,
        *(seeds, positions, iteration, num_rows, record, scale, per_image),
        *(float(temperature), top_k, float(top_p), forced),
        *(relaxation.neighbors, relaxation.k, relaxation.delta, relaxation.lam, relaxation.residual),
        *(noise.accept, noise.fresh, noise.residual),
    )
    if errors is None and use_triton(logits):
        raise_errors(record)
    return Verdict(*verdict)


def _check(relaxation: Relaxation, carry: str, num_codes: int) -> None:
    if carry not in ("none", "independent"):
        raise ValueError(f"relaxed acceptance needs carry 'none' or 'independent', got {carry!r}")
    if (relaxation.delta is None) == (relaxation.lam is None):
        raise ValueError(f"give delta or lam, one of the two; got delta={relaxation.delta}, lam={relaxation.lam}")
    if relaxation.residual not in RESIDUALS:
        raise ValueError(f"residual must be one of {', '.join(RESIDUALS)}, got {relaxation.residual!r}")
    needed = relaxation.k + relaxation.residual.startswith("upstream")
    if relaxation.k < 1 or tuple(relaxation.neighbors.shape) < (num_codes, needed):
        raise ValueError(
            f"k={relaxation.k} with residual {relaxation.residual!r} needs k >= 1 and neighbors [{num_codes}, >= {needed}], "
            f"got {list(relaxation.neighbors.shape)}"
        )


@torch.library.custom_op("vargen::verify_relaxed", mutates_args=("errors",))
def _verify_relaxed(
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
    errors: Tensor,
    scale: float,
    scales: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    forced: Tensor | None,
    neighbors: Tensor,
    k: int,
    delta: float | None,
    lam: float | None,
    residual: str,
    accept: Tensor | None,
    fresh: Tensor | None,
    residual_noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    draft = Draft(tokens, kind, prob, row, label_logits, label_stats)
    relaxation = Relaxation(neighbors, k, delta, lam, residual)  # type: ignore[arg-type]
    noise = VerifyNoise(accept, fresh, residual_noise)
    setting = Setting(scale if scales is None else scales, temperature, top_k, top_p)
    place = (seeds, positions, iteration, num_rows)
    if not use_triton(logits):
        verdict = verify_twin(logits, draft, carry, *place, setting, forced, noise, relaxation)
    else:
        run = WindowLaunch.of(logits, draft, *place, setting, forced, noise)
        verdict = _launch(run, draft, carry, errors, setting, relaxation)
    return verdict.tokens, verdict.accepted, verdict.prob, verdict.num_committed, verdict.stats


@_verify_relaxed.register_fake
def _(logits: Tensor, tokens: Tensor, kind: Tensor, prob: Tensor, row: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(tokens),
        torch.empty_like(tokens, dtype=torch.bool),
        torch.empty_like(tokens, dtype=torch.float32),
        tokens.new_empty(tokens.shape[0]),
        tokens.new_empty((*tokens.shape, 2), dtype=torch.float32),
    )


def _launch(
    run: WindowLaunch, draft: Draft, carry: str, errors: Tensor, setting: Setting, relaxation: Relaxation
) -> Verdict:
    batch, window = draft.tokens.shape
    constant, factor = relaxation.limits
    table = relaxation.neighbors.contiguous()
    near = {"neighbors_ptr": table, "width": table.shape[1]}
    limits = {"constant": constant, "factor": factor}
    count = torch.empty_like(draft.tokens, dtype=torch.int32)
    marks = torch.zeros(batch, run.rows["V"], dtype=torch.uint8, device=draft.tokens.device)
    number, reach = CARRIES.index(carry), triton.next_power_of_2(relaxation.k + 1)
    kernels.relaxed_rows_kernel[(window, batch)](
        **run.rows,
        **near,
        **limits,
        num_neighbors=relaxation.k,
        count_ptr=count,
        errors_ptr=errors,
        CARRY=number,
        NEIGHBORS=reach,
    )
    needed = ("tokens_ptr", "kind_ptr", "accepted_ptr", "num_rows_ptr", "W", "V", "WINDOW")
    if relaxation.residual != "optimal" and setting.temperature > 0:
        kernels.mark_kernel[(batch,)](
            **{name: run.finish[name] for name in needed},
            **near,
            num_neighbors=relaxation.k,
            count_ptr=count,
            marks_ptr=marks,
            RING=relaxation.residual.startswith("upstream"),
            NEIGHBORS=reach,
        )
    kernels.relaxed_finish_kernel[(batch,)](
        **run.finish,
        **near,
        **limits,
        marks_ptr=marks,
        CARRY=number,
        COUNT=relaxation.k,
        GREEDY=setting.temperature == 0,
        RESIDUAL=RESIDUALS.index(relaxation.residual),
    )
    return run.result()
