"""What pipelines return: diffusers outputs that show themselves in notebooks.

Letters: B images, N code positions, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput

from vargen.display.notebook import output_html, output_sheet, png
from vargen.outputs import DecodeStats


@dataclass
class ImagePipelineOutput(BaseOutput):
    """Result of ``ImagePipeline.__call__``; as the last line of a notebook cell it shows its pictures.

    ``images``: list of PIL images, ``[B, H, W, 3]`` float array in [0, 1] (``"np"``), ``[B, 3, H, W]`` float tensor in
    [0, 1] (``"pt"``), or ``None`` for ``output_type="codes"``.
    """

    images: list[Any] | np.ndarray | torch.Tensor | None
    codes: Any
    seeds: list[int]
    stats: DecodeStats

    def _repr_html_(self) -> str:
        return output_html(self)

    def _repr_png_(self) -> bytes | None:
        sheet = output_sheet(self)
        return None if sheet is None else png(sheet)
