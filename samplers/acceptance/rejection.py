"""The ratio test ``u q < p`` of a chain of drafts, with a draw from the residual (Leviathan et al., 2023, arXiv:2211.17192)."""

from __future__ import annotations

from dataclasses import dataclass

from vargen.kernels.verify.types import Carry
from vargen.samplers.acceptance.base import WindowRule


@dataclass(frozen=True)
class Rejection(WindowRule):
    """Exact for proposals that carry the distribution they were drawn from.

    ``carry`` says what becomes of the rows behind a rejection: ``"independent"`` draws them anew (Teng et al., 2024,
    arXiv:2410.01699), ``"maximal"`` goes on with the test at every row (So et al., 2025, arXiv:2510.24211). With ``group``
    it is grouped acceptance (arXiv:2508.07747), which is not exact.
    """

    carry: Carry = "independent"
