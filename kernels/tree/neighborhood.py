"""Masses and residuals of LANTERN (Jang et al., 2025, arXiv:2410.03355) and LANTERN++ (Park et al., arXiv:2502.06352).

A draft token counts with its nearest codes as long as their mass stays within a limit: ``delta`` (LANTERN), or
``(lam - 1)`` times the token's own probability (LANTERN++). Distances are those of the codebook; the table lists the
other codes by increasing distance.

p target, q draft. Letters: R rows, V codes, K width of the table, k neighbours that may join.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

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
