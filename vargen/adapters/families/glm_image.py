"""GLM-Image, the autoregressive stage: preview grid, then the large grid, then one end token; no guidance.

A code is its own token id. Rotary positions have three axes (temporal, height, width); the stock class keeps them as
state on the module, the adapter computes them from the layout, so rows may differ in length. Pixels are drawn by
diffusers' ``GlmImagePipeline``, which takes ``backbone.prior_token_ids(codes)`` as ``prior_token_ids``.

Letters: R rows, W window, N codes of both grids, h w large grid, h' w' preview grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vargen.adapters.base import TransformersBackbone
from vargen.adapters.layouts import fill, grids
from vargen.protocols import Layout

CELL = 32  # pixels along a side of a code
PREVIEW_SIDE = 16  # of a square image's preview grid


class GlmImageBackbone(TransformersBackbone):
    """``GlmImageForConditionalGeneration``, text to image; see ``TransformersBackbone``.

    Args:
        preview_size: (h', w'); default as the pipeline of diffusers computes it from the large grid.
    """

    model_types = ("glm_image",)
    temperature = 0.9
    top_p = 0.75
    default_grid = (32, 32)  # 1024 x 1024 pixels

    def __init__(
        self, model: nn.Module, processor: Any = None, *, preview_size: tuple[int, int] | None = None, **options: Any
    ) -> None:
        super().__init__(model, processor, **options)
        self.preview_size = preview_size
        self.boi, self.eoi = int(self.config.image_start_token_id), int(self.config.image_end_token_id)

    @property
    def body(self) -> nn.Module:
        """The language model."""
        return self.model.model.language_model

    @property
    def head(self) -> nn.Module:
        """Head over codes and a few special ids."""
        return self.model.lm_head

    @property
    def preview(self) -> tuple[int, int]:
        """(h', w')."""
        h, w = self.grid_size
        if self.preview_size is not None:
            return self.preview_size
        ratio = h / w  # rounded as the processor rounds
        return int(math.sqrt(ratio) * PREVIEW_SIDE), int(math.sqrt(1 / ratio) * PREVIEW_SIDE)

    def code_ids(self) -> Tensor:
        """[V]: codes are their token ids; the end token, which could cut a grid short, is left out."""
        return torch.arange(int(self.config.vq_config.num_embeddings))

    def layout(self, height: int | None = None, width: int | None = None) -> Layout:
        """Preview grid, large grid, end token."""
        if (height, width) not in ((None, None), self.grid_size):
            return self.with_grid(height or self.grid_size[0], width or self.grid_size[1]).layout()
        return grids([self.preview, self.grid_size], tail=(self.eoi,))

    def to_stream(self, codes: Tensor) -> Tensor:
        """Codes [B, N] as ``generate`` returns them: both grids and the end token."""
        ids = self._ids()
        assert ids is not None
        return fill(self.layout(), codes, ids)

    def prior_token_ids(self, codes: Tensor) -> Tensor:
        """The large grid of codes [B, N], doubled in both directions: [B, 4 h w], what the diffusion stage reads."""
        h, w = self.grid_size
        large = codes[:, -h * w :].unflatten(1, (h, w))
        return large.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)

    def unconditional(self, rows: list[Tensor]) -> list[Tensor]:
        """There is none."""
        raise ValueError("GLM-Image has no unconditional branch; set guidance_scale to 1, or give a negative prompt")

    def check_prompts(self, rows: list[Tensor], given: Any) -> None:
        """A prompt ends with begin-of-image and asks for these grids; source images are not supported."""
        for i, row in enumerate(rows):
            if int(row[-1]) != self.boi:
                raise ValueError(f"prompt {i} must end with the begin-of-image token {self.boi}, got {int(row[-1])}")
            if bool((row == self.eoi).any()):
                raise ValueError(f"prompt {i} holds a source image; the adapter covers text to image only")
        asked = given.get("image_grid_thw") if isinstance(given, Mapping) else None
        if asked is None:
            return
        expected = [list(self.grid_size), list(self.preview)] * len(rows)
        if [[int(side) for side in grid[1:]] for grid in asked] != expected:
            raise ValueError(
                f"the prompts ask for the grids {[list(map(int, g[1:])) for g in asked[:2]]} (large, preview), the "
                f"backbone makes {expected[:2]}; use backbone.with_grid(height, width)"
            )

    def encode_text(self, texts: list[str]) -> Any:
        """Chat template with the size tags of both grids."""
        h, w = self.grid_size
        chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts]
        options = {"target_h": h * CELL, "target_w": w * CELL, "tokenize": True, "return_dict": True}
        return self.processor.apply_chat_template(chats, padding=True, return_tensors="pt", **options)

    def prompt_positions(self, index: Tensor, lengths: Tensor) -> Tensor:
        """[3, R, T]: text counts up on all axes."""
        return index.expand(3, len(lengths), -1)

    def stream_positions(self, slots: Tensor, lengths: Tensor, layout: Layout) -> Tensor:
        """[3, R, W]: a grid starts where the one before it ends along its longer side."""
        return lengths[:, None] + self._offsets(layout, slots.device)[:, slots]

    def _offsets(self, layout: Layout, device: torch.device) -> Tensor:
        """[3, S] positions of all slots behind a prompt of length 0."""
        starts = [0]
        for h, w in layout.grids:
            starts.append(starts[-1] + max(h, w))
        number, row, column = layout.slot_grid.to(device).unbind(-1)
        start = torch.tensor(starts, device=device)[torch.where(number < 0, len(layout.grids), number)]
        offsets = torch.stack([torch.zeros_like(row), row, column]).clamp(min=0)
        return start + offsets
