"""Codes: one choice of V a row, by the kernel ``draw``.

Letters: A images, G guidance branches, g codes an image drawn at once, V codes of the codebook.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vargen.kernels.draw import draw
from vargen.kernels.warp import combine

CLOSE = 1e-4  # log-probabilities so near to the threshold of top-p may fall on either side of it by rounding


@dataclass(frozen=True, kw_only=True, eq=False)
class CategoricalHead:
    """The ``TokenHead`` of codes; rows are logits."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    noise: Tensor | None = None  # [A, g, V] Gumbel numbers instead of the counter-based ones
    errors: Tensor | None = None  # [A] record of bad rows for the kernels, see ``kernels.draw.new_errors``

    def warp(self, guidance_scale: float | Tensor) -> dict[str, Any]:
        """Guidance, temperature, top-k and top-p as keyword arguments of the kernels."""
        kept = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {"guidance_scale": guidance_scale, **kept}

    def draw(self, rows: Tensor, keys: Tensor, positions: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """Draw codes ``[A, g]`` from logits ``[G, A, g, V]``."""
        if self.temperature > 0 and self.top_p < 1 and self.noise is None and rows.device.type == "cpu":
            return self._draw_unsure(rows, keys, positions, guidance_scale)
        warp = self.warp(guidance_scale)
        return draw(rows, seeds=keys, positions=positions, noise=self.noise, errors=self.errors, **warp)

    def _draw_unsure(self, rows: Tensor, keys: Tensor, positions: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """Draw where top-p leaves a choice; a code that holds the whole mass needs no noise, which costs most on a CPU."""
        warp = self.warp(guidance_scale)
        z = combine(rows, guidance_scale, self.temperature)
        mass = z.logsumexp(-1)
        if not bool(mass.isfinite().all()):
            return draw(rows, seeds=keys, positions=positions, **warp)  # which names the bad row
        best, codes = z.max(-1)
        images, columns = (best - mass < math.log(self.top_p) + CLOSE).nonzero(as_tuple=True)
        if len(images):
            unsure = rows[:, images, columns][:, :, None]  # G n 1 V
            where = positions[images, columns][:, None]
            codes[images, columns] = draw(unsure, seeds=keys[images], positions=where, **warp)[:, 0]
        return codes
