"""Masses and residuals of LANTERN (Jang et al., 2025, arXiv:2410.03355) and LANTERN++ (Park et al., arXiv:2502.06352).

A draft token counts with its nearest codes as long as their mass stays within a limit: ``delta`` (LANTERN), or
``(lam - 1)`` times the token's own probability (LANTERN++). Distances are those of the codebook; the table lists the
other codes by increasing distance.

p target, q draft. Letters: R rows, V codes, K width of the table, k neighbours that may join.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vargen.kernels import device as rows
from vargen.kernels.acceptance import residual, within
from vargen.kernels.language import jit, tl

RESIDUALS = ("paper", "optimal", "upstream", "upstream-lumina")  # in the order of the kernels' numbers


@dataclass(frozen=True)
class Relaxation:
    """How far acceptance is relaxed, and what a rejection leaves.

    ``residual``: ``"paper"`` zeroes the neighbours that counted; ``"optimal"`` comes closest to p for this acceptance
    (costs V k look-ups, so keep k <= 16); ``"upstream"`` and ``"upstream-lumina"`` are the released codes, which zero the
    k + 1 nearest (of q, or of p) whenever one counted.
    """

    neighbors: Tensor  # [V, K] integer codes, the code itself not among them; K >= k, k + 1 for the released residuals
    k: int
    delta: float | None = None  # exactly one of the two limits is set
    lam: float | None = None
    residual: Literal["paper", "optimal", "upstream", "upstream-lumina"] = "paper"

    @property
    def limits(self) -> tuple[float, float]:
        """(a, b): neighbours may add the mass a + b p."""
        return (self.delta or 0.0, 0.0) if self.lam is None else (0.0, self.lam - 1.0)


def neighbor_mass(p: Tensor, token: Tensor, relaxation: Relaxation) -> tuple[Tensor, Tensor]:
    """Mass that neighbours add to ``token [R]`` under ``p [R, V]``, and how many they are (``[R]`` each)."""
    constant, factor = relaxation.limits
    limit = constant + factor * p.gather(-1, token[:, None])
    mass = p.gather(-1, relaxation.neighbors[token, : relaxation.k].long()).cumsum(-1)
    joins = within.fn(mass, limit)  # a prefix, since the mass rises
    return (mass * joins).amax(-1), joins.sum(-1)


def relaxed_residual(
    p: Tensor, q: Tensor, token: Tensor, count: Tensor, point: Tensor, relaxation: Relaxation
) -> Tensor:
    """Unnormalised law after a rejection, ``[R, V]``.

    Args:
        p, q: ``[R, V]`` laws; q is 1 at the token for a deterministic proposal.
        token: ``[R]`` int64, rejected.
        count: ``[R]`` neighbours that counted.
        point: ``[R]`` bool, the proposal was deterministic.
        relaxation: as in :func:`neighbor_mass`.
    """
    kind = relaxation.residual
    if kind == "optimal":
        return residual.fn(p, torch.minimum(q, p + _every_neighbor_mass(p, relaxation)))
    reach = count if kind == "paper" else torch.where(count > 0, relaxation.k + 1, 0)
    width = relaxation.k if kind == "paper" else relaxation.k + 1
    near = relaxation.neighbors[token, :width].long()
    marked = torch.zeros_like(p, dtype=torch.bool).scatter_(
        1, near, torch.arange(width, device=p.device) < reach[:, None]
    )
    if kind == "paper":
        return residual.fn(p, q).masked_fill(marked, 0.0)
    of_p = marked & (point[:, None] | (kind == "upstream-lumina"))
    return residual.fn(p.masked_fill(of_p, 0.0), q.masked_fill(marked & ~of_p, 0.0))


def _every_neighbor_mass(p: Tensor, relaxation: Relaxation) -> Tensor:
    constant, factor = relaxation.limits
    limit = constant + factor * p
    total, joined = torch.zeros_like(p), torch.ones_like(p, dtype=torch.bool)
    for column in relaxation.neighbors[:, : relaxation.k].long().unbind(1):
        more = total + p[:, column]
        joined = joined & within.fn(more, limit)
        total = torch.where(joined, more, total)
    return total


@jit
def neighbor_mass_of(
    cond, uncond, scale, inv_t, tau, lse, token, p_token, neighbors_ptr, width, k, constant, factor,
    GUIDED: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Device function of ``neighbor_mass`` for one token; K is a power of two from k."""
    m = tl.arange(0, K)
    near = tl.load(neighbors_ptr + token * width + m, mask=m < k, other=0).to(tl.int64)
    p = rows.law_of(rows.load_code(cond, uncond, scale, inv_t, near, GUIDED), tau, lse)
    mass = tl.cumsum(tl.where(m < k, p, 0.0), 0)
    joins = within(mass, constant + factor * p_token) & (m < k)
    return tl.max(tl.where(joins, mass, 0.0), 0), tl.sum(joins.to(tl.int32), 0)


@jit
def every_neighbor_mass_of(
    cond,
    uncond,
    scale,
    inv_t,
    tau,
    lse,
    code,
    p,
    V,
    neighbors_ptr,
    width,
    constant,
    factor,
    GUIDED: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Device function of ``_every_neighbor_mass`` for a piece of a row."""
    row = tl.where(code < V, code, 0).to(tl.int64) * width
    total = p * 0.0
    joined = p == p
    for m in range(COUNT):
        near = tl.load(neighbors_ptr + row + m).to(tl.int64)
        more = total + rows.law_of(rows.load_code(cond, uncond, scale, inv_t, near, GUIDED), tau, lse)
        joined = joined & within(more, constant + factor * p)
        total = tl.where(joined, more, total)
    return total
