"""Janus and Janus-Pro (DeepSeek; arXiv:2410.13848, arXiv:2501.17811): 24 x 24 codes of a LlamaGen VQ-16 tokenizer.

Codes have an embedding and a head of their own; no tokens stand between them. The second guidance branch reads the
prompt with every token but BOS and begin-of-image replaced by the padding token, which stays visible.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vargen.adapters.base import TransformersBackbone
from vargen.adapters.pixels import PixelDecoder
from vargen.protocols import Layout

TEMPLATE = "<|User|>: {text}\n\n<|Assistant|>:"  # of Janus-Pro, for processors saved without their chat template


class JanusBackbone(TransformersBackbone):
    """``JanusForConditionalGeneration`` in image mode; see ``TransformersBackbone``."""

    model_types = ("janus",)
    guidance_scale = 5.0
    # transformers would sample with its global top_k = 50; the authors sample from the whole distribution
    top_k = 0

    def __init__(self, model: nn.Module, processor: Any = None, **options: Any) -> None:
        super().__init__(model, processor, **options)
        self.boi_token_id = self._find_boi()

    @property
    def body(self) -> nn.Module:
        """The Llama body."""
        return self.model.model.language_model

    @property
    def head(self) -> nn.Module:
        """The generation head (``get_output_embeddings`` is the text head)."""
        return self.model.model.generation_head

    @property
    def codebook_size(self) -> int:
        """Codes of the codebook, V."""
        return int(self.config.vq_config.num_embeddings)

    def embed(self, codes: Tensor) -> Tensor:
        """Generation embedding and aligner: [...] int64 to [..., D]."""
        return self.model.prepare_embeddings_for_image_generation(codes)

    def layout(self, height: int | None = None, width: int | None = None) -> Layout:
        """The raster of this model; it has one size."""
        asked = (height or self.grid_size[0], width or self.grid_size[1])
        return Layout.raster(self._check_grid(asked))

    def unconditional(self, rows: list[Tensor]) -> list[Tensor]:
        """Replace every token but BOS and begin-of-image by the (visible) padding token."""
        text = self.config.get_text_config(decoder=True)
        stored = getattr(self.model, "generation_config", None)
        bos = _first(getattr(stored, "bos_token_id", None), text.bos_token_id)
        pad = _first(getattr(stored, "pad_token_id", None), text.pad_token_id)
        if pad is None:
            raise ValueError("guidance needs the padding token; set model.generation_config.pad_token_id")
        return [torch.where((row == bos) | (row == self.boi_token_id), row, pad) for row in rows]

    def check_prompts(self, rows: list[Tensor], given: Any) -> None:
        """A prompt ends with begin-of-image."""
        for i, row in enumerate(rows):
            if int(row[-1]) != self.boi_token_id:
                raise ValueError(
                    f"prompt {i} must end with the begin-of-image token {self.boi_token_id}, got {int(row[-1])}; call "
                    "the processor with generation_mode='image'"
                )

    def encode_text(self, texts: list[str]) -> Any:
        """Chat template, begin-of-image, left padding."""
        if getattr(self.processor, "chat_template", None):
            chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts]
            texts = [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        else:
            texts = [TEMPLATE.format(text=text) for text in texts]
        return self.processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")

    def pixels(self) -> nn.Module:
        """The model's VQ decoder."""
        vq = self.model.model.vqmodel
        return PixelDecoder(vq, self.codebook_size, _side(vq), flat=True)

    def _own_grid(self) -> tuple[int, int]:
        side = round(int(self.config.vision_config.num_image_tokens) ** 0.5)
        return side, side

    def _check_grid(self, grid_size: tuple[int, int]) -> tuple[int, int]:
        if tuple(grid_size) != self._own_grid():
            raise ValueError(f"Janus makes images of {self._own_grid()} codes (height, width) only, got {grid_size}")
        return self._own_grid()

    def _find_boi(self) -> int:
        stored = getattr(self.model, "generation_config", None)
        inside = getattr(stored, "generation_kwargs", None) or {}
        # converters have written it in both places
        found = _first(inside.get("boi_token_id"), getattr(stored, "boi_token_id", None))
        if found is None and self.processor is not None:
            found = self.processor.tokenizer.convert_tokens_to_ids("<begin_of_image>")
        if found is None:
            raise ValueError(
                "the begin-of-image token is unknown: the generation_config names none; give the processor"
            )
        return int(found)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _side(vq: Any) -> int:
    return 2 ** (len(vq.config.channel_multiplier) - 1)
