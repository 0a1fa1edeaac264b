"""LANTERN's aggregated acceptance (Jang et al., 2025, arXiv:2410.03355; LANTERN++: Park et al., 2025, arXiv:2502.06352).

A code counts with its nearest codes as long as their mass stays within a limit. What the residuals promise for the
distribution ``out`` of the emitted code, with ``p_A(x)`` the aggregated mass and ``a(x) = min(1, p_A(x) / q(x))``:

- ``"optimal"``, ``N([p - q a]+)``: no residual comes closer to p for this acceptance; with LANTERN++
  ``out(x) <= lam * p(x)`` for every code, any number of siblings and any drafter; with one sampled proposal
  ``TV(out, p) = sum [q a - p]+``. Costs V k look-ups, so keep k <= 16.
- ``"paper"``, ``N([p - q]+)`` off the neighbours counted: for deterministic proposals ``TV(out, p) <= delta`` for each
  sibling tested and ``out(x) <= lam * p(x)``; for sampled ones ``TV(out, p) <= TV(q, p)``, and delta bounds nothing.
- ``"upstream"``, the released code: zeroes the k + 1 nearest codes whether they were counted or not. Deterministic
  proposals then break the bound, and where nothing is left any code may follow; kept to reproduce published images.

p is the target distribution, q the draft's. Letters: b rows, V codes, k neighbours, K width of the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vargen.kernels.acceptance import residual, within
from vargen.kernels.language import constant, jit, tl, triton

RESIDUALS = ("paper", "optimal", "upstream", "upstream-lumina")  # the last zeroes p before q is taken off
_, OPTIMAL, UPSTREAM, _ = (constant(number) for number in range(len(RESIDUALS)))


@dataclass(frozen=True)
class Relaxation:
    """How far acceptance is relaxed; exactly one of the limits is set."""

    neighbors: Tensor  # [V, K] integer ids without the code itself, K >= k, and k + 1 for the upstream residuals
    k: int
    delta: float | None = None  # LANTERN: neighbours join while their mass is at most delta
    lam: float | None = None  # LANTERN++: while the mass of all is at most lam times the code's own
    residual: str = "paper"

    @property
    def limits(self) -> tuple[float, float]:
        """(a, b): neighbours may add the mass a + b p to a code of probability p."""
        return (self.delta or 0.0, 0.0) if self.lam is None else (0.0, self.lam - 1.0)

    def limit(self, own: Tensor) -> Tensor:
        """Mass that neighbours may add to codes of probability ``own``."""
        constant_mass, factor = self.limits
        return constant_mass + factor * own

    def arguments(self) -> dict[str, Any]:
        """Arguments of the kernel."""
        table = self.neighbors.contiguous()
        return {
            "neighbors": Neighbors(table, *self.limits),
            "width": table.shape[1],
            "num_neighbors": self.k,
            "RULE": RESIDUALS.index(self.residual),
            "COUNT": self.k,
            "REACH": triton.next_power_of_2(self.k + 1),
        }


@dataclass(frozen=True)
class Aggregate:
    """A code with the neighbours that count with it."""

    own: Tensor  # [b] p(x)
    mass: Tensor  # [b] p_A(x)
    members: Tensor | None = None  # [b, k] int64, nearest first
    inside: Tensor | None = None  # [b, k] bool, a prefix of the members


def aggregate(p: Tensor, token: Tensor, relaxation: Relaxation | None) -> Aggregate:
    """Aggregated mass of ``token [b]`` under ``p [b, V]``; its own probability without relaxation."""
    own = p.gather(1, token[:, None])[:, 0]
    if relaxation is None or relaxation.k == 0:
        return Aggregate(own, own)
    members = relaxation.neighbors[token, : relaxation.k].long()
    total = p.gather(1, members).cumsum(-1)
    inside = within.fn(total, relaxation.limit(own)[:, None])
    return Aggregate(own, own + (total * inside).amax(-1), members, inside)


def aggregate_all(p: Tensor, relaxation: Relaxation) -> Tensor:
    """Aggregated mass of every code, ``[b, V]``."""
    total, joined = torch.zeros_like(p), torch.ones_like(p, dtype=torch.bool)
    limit = relaxation.limit(p)
    for column in relaxation.neighbors[:, : relaxation.k].long().unbind(1):
        more = total + p[:, column]
        joined = joined & within.fn(more, limit)
        total = torch.where(joined, more, total)
    return p + total


def after_rejection(
    p: Tensor, q: Tensor | None, token: Tensor, found: Aggregate, relaxation: Relaxation | None
) -> Tensor:
    """Unnormalised distribution that remains when ``token`` was rejected.

    Args:
        p: ``[b, V]`` distribution that the test used.
        q: ``[b, V]`` distribution from which the token was drawn; None for a deterministic proposal.
        token: ``[b]`` int64.
        found: from ``aggregate``.
        relaxation: as there.
    """
    kind = "paper" if relaxation is None else relaxation.residual
    if kind == "optimal" and q is not None:
        assert relaxation is not None
        return residual.fn(p, torch.minimum(q, aggregate_all(p, relaxation)))
    if kind.startswith("upstream") and found.inside is not None:
        p, q = _ring_removed(p, q, token, found, relaxation)
    left = p.scatter(1, token[:, None], 0.0) if q is None else residual.fn(p, q)
    if kind == "paper" and found.inside is not None:
        assert found.members is not None
        left = left.scatter(1, found.members, left.gather(1, found.members).masked_fill(found.inside, 0.0))
    return left


def _ring_removed(
    p: Tensor, q: Tensor | None, token: Tensor, found: Aggregate, relaxation: Relaxation | None
) -> tuple[Tensor, Tensor | None]:
    assert relaxation is not None
    assert found.inside is not None
    ring = relaxation.neighbors[token, : relaxation.k + 1].long()
    relaxed = found.inside[:, :1]  # some neighbour counted
    if q is None or relaxation.residual == "upstream-lumina":
        return p.scatter(1, ring, p.gather(1, ring).masked_fill(relaxed, 0.0)), q
    return p, q.scatter(1, ring, q.gather(1, ring).masked_fill(relaxed, 0.0))


class Neighbors(NamedTuple):
    """Pointer and limits of a ``Relaxation``."""

    table: Any  # V K
    constant: Any
    factor: Any


@jit
def aggregate_code(work, inv, token, own, neighbors, width, num_neighbors, REACH: tl.constexpr):
    """Device function of ``aggregate`` over p = ``work * inv``: mass added, and by how many; REACH: power of two above k."""
    m = tl.arange(0, REACH)
    near = tl.load(neighbors.table + token * width + m, mask=m < num_neighbors, other=0).to(tl.int64)
    mass = tl.cumsum(tl.where(m < num_neighbors, tl.load(work + near) * inv, 0.0), 0)
    joins = within(mass, neighbors.constant + neighbors.factor * own) & (m < num_neighbors)
    return tl.max(tl.where(joins, mass, 0.0), 0), tl.sum(joins.to(tl.int32), 0)


@jit
def aggregate_piece(work, inv, v, p, V, neighbors, width, COUNT: tl.constexpr):
    """Device function of ``aggregate_all`` for a piece of a row: the mass added."""
    row = tl.where(v < V, v, 0).to(tl.int64) * width
    total = p * 0.0
    joined = p == p
    for m in range(COUNT):
        near = tl.load(neighbors.table + row + m).to(tl.int64)
        more = total + tl.load(work + near) * inv
        joined = joined & within(more, neighbors.constant + neighbors.factor * p)
        total = tl.where(joined, more, total)
    return total


@jit
def remove_neighbors(
    old, new, inv, token, count, neighbors, width, num_neighbors, SAMPLED: tl.constexpr, RULE: tl.constexpr,
    REACH: tl.constexpr,
):  # fmt: skip
    """Device function of the neighbours' part of ``after_rejection``: ``new`` holds what is left without them."""
    reach = count
    if RULE >= UPSTREAM:  # the released codes: k + 1 of them as soon as one counted
        reach = tl.where(count > 0, num_neighbors + 1, 0)
    m = tl.arange(0, REACH)
    near = tl.load(neighbors.table + token * width + m, mask=m < reach, other=0).to(tl.int64)
    value = tl.load(old + near) * 0.0
    if SAMPLED and RULE == UPSTREAM:  # it takes the ring from q
        value = tl.load(old + near) * inv
    tl.store(new + near, value, mask=m < reach)
