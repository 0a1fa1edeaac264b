"""The shared-noise rule: a token is a function of seed, position and distribution, and a proposal stays if it is that token.

Any proposal is exact, and the codes are those of next-token sampling with the same seed (So et al., 2025, arXiv:2510.24211).
"""

from __future__ import annotations

from dataclasses import dataclass

from vargen.kernels.verify.types import Carry, VerifyNoise
from vargen.samplers.acceptance.base import Noise, Rows, WindowRule


@dataclass(frozen=True)
class SharedNoise(WindowRule):
    """The rule over windows."""

    carry: Carry = "gumbel"

    def given(self, rows: Rows, noise: Noise) -> VerifyNoise | None:
        """The rows of the cache, which are made once for all iterations."""
        return None if noise.cache is None else VerifyNoise(fresh=noise.cache.rows(rows.positions))
