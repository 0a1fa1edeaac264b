"""A token head that writes down the guided logits it draws from."""

from typing import Any

from torch import Tensor

from vargen.kernels.warp import warp_logits
from vargen.samplers.heads.categorical import CategoricalHead

SEEN: list[Tensor] = []  # step by step


class RecordingHead(CategoricalHead):
    def draw(self, rows: Tensor, keys: Tensor, positions: Tensor, guidance_scale: Any) -> Tensor:
        SEEN.append(warp_logits(rows, guidance_scale=guidance_scale))
        return super().draw(rows, keys, positions, guidance_scale)
