"""One test of one proposal: LANTERN's aggregated acceptance with its residuals, and the exact rules as its limits.

LANTERN counts the mass of a code's nearest neighbours as its own (Jang et al., 2025, arXiv:2410.03355; LANTERN++:
Park et al., 2025, arXiv:2502.06352). What the residuals promise for the law ``out`` of the emitted code, with
``p_A(x)`` the aggregated mass and ``a(x) = min(1, p_A(x) / q(x))``:

- ``"optimal"``, ``N([p - q a]+)``: no residual comes closer to p for this acceptance; with LANTERN++
  ``out(x) <= lam * p(x)`` for every code, any number of siblings and any drafter; with one sampled proposal
  ``TV(out, p) = sum [q a - p]+``.
- ``"paper"``, ``N([p - q]+)`` off the neighbours counted: for deterministic proposals ``TV(out, p) <= delta`` for each
  sibling tested and ``out(x) <= lam * p(x)``; for sampled ones ``TV(out, p) <= TV(q, p)``, and delta bounds nothing.
- ``"upstream"``, the released code: zeroes the k + 1 nearest codes whether they were counted or not. Deterministic
  proposals then break the bound, and where nothing is left any code may follow; kept to reproduce published images.

p is the target law, q the draft law. Letters: b rows, V codes, k neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vargen.kernels.acceptance import NOTHING_LEFT, accept, residual, within

RESIDUALS = ("paper", "optimal", "upstream", "upstream-lumina")  # the last zeroes p before q is taken off
KSEQ_STEPS = 40  # halvings of [1, K]: the root to double precision of what the test can see


@dataclass(frozen=True)
class Relaxation:
    """How far acceptance is relaxed; exactly one of the limits is set."""

    neighbors: Tensor  # [V, K] integer ids, K >= k, and k + 1 for the upstream residuals
    k: int
    delta: float | None = None  # LANTERN: neighbours join while their mass is at most delta
    lam: float | None = None  # LANTERN++: while the mass of all is at most lam times the code's own
    residual: str = "paper"

    def limit(self, own: Tensor) -> Tensor:
        """Mass that neighbours may add to a code of probability ``own``."""
        return (self.lam - 1.0) * own if self.lam is not None else torch.full_like(own, self.delta or 0.0)


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
    """Unnormalised law that remains when ``token`` was rejected.

    Args:
        p: ``[b, V]`` law that the test used.
        q: ``[b, V]`` law from which the token was drawn; None for a deterministic proposal.
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


def normalized(weights: Tensor, fallback: Tensor) -> Tensor:
    """Divide ``weights [b, V]`` by their sum; ``fallback`` where nothing is left (p <= q in floating point)."""
    total = weights.sum(-1, keepdim=True)
    some = total > NOTHING_LEFT
    return torch.where(some, weights / total.where(some, 1.0), fallback)


def k_seq_factor(p: Tensor, q: Tensor, count: Tensor) -> Tensor:
    """Division factor rho of K-SEQ (SpecTr: Sun et al., 2023, arXiv:2310.15141), from the valid side of the root.

    Args:
        p: ``[b, V]`` target laws.
        q: ``[b, V]`` draft laws.
        count: ``[b]`` int64 K, independent candidates of each row.

    Returns:
        ``[b]`` float64 in [1, K].
    """
    p, q, most = p.double(), q.double(), count.double().clamp(min=1.0)
    low, high = torch.ones_like(most), most
    for _ in range(KSEQ_STEPS):
        middle = 0.5 * (low + high)
        beta = torch.minimum(q, p / middle[:, None]).sum(-1)
        invalid = 1.0 - (1.0 - beta).clamp(min=0.0) ** most > middle * beta
        low, high = middle.where(invalid, low), high.where(invalid, middle)
    return high


def k_seq_residual(p: Tensor, q: Tensor, count: Tensor, rho: Tensor) -> Tensor:
    """Unnormalised law when none of K candidates passed ``u * rho * q < p``: ``[b, V]`` float64."""
    p, q = p.double(), q.double()
    common = torch.minimum(q, p / rho[:, None])
    beta = common.sum(-1)
    factor = torch.where(beta > 0, (1.0 - (1.0 - beta).clamp(min=0.0) ** count.double()) / beta, 0.0)
    return (p - common * factor[:, None]).clamp(min=0.0)


def passes(mass: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """Whether proposals of draft probability ``q`` pass, ``u`` uniform in [0, 1)."""
    return accept.fn(mass, q, u)
