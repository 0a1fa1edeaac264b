"""Codes to pixels by the model's own decoder, in the form that pipelines call.

Letters: B images, h w code grid, H W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PixelDecoder(nn.Module):
    """A VQ decoder of transformers as the tokenizer of a pipeline.

    Args:
        vq: the model's VQ module; its ``decode`` is called.
        codebook_size: V.
        downsample: pixels along a side of one code.
        flat: ``vq.decode`` takes [B, h * w] instead of [B, h, w].
    """

    def __init__(self, vq: nn.Module, codebook_size: int, downsample: int, *, flat: bool = False) -> None:
        super().__init__()
        self.vq, self.codebook_size, self.downsample, self.flat = vq, codebook_size, downsample, flat

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.vq.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.vq.parameters()).dtype

    def to(self, *args: Any, **kwargs: Any) -> PixelDecoder:
        """Nothing to do: the decoder is part of the model and moves with the backbone."""
        return self

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """[B, h, w] int64 to [B, 3, H, W], about [-1, 1], unclamped."""
        if bool(((codes < 0) | (codes >= self.codebook_size)).any()):
            raise ValueError(
                f"codes must be in 0..{self.codebook_size - 1}, got {int(codes.min())}..{int(codes.max())}"
            )
        return self.vq.decode(codes.flatten(1) if self.flat else codes)

    def save_pretrained(self, save_directory: Any, **_: Any) -> None:
        """Refuse: the decoder is part of the model."""
        raise ValueError("the pixel decoder is part of the model; save the model with model.save_pretrained(folder)")

    @classmethod
    def from_pretrained(cls, folder: Any, **_: Any) -> PixelDecoder:
        """Refuse: the decoder is part of the model."""
        raise ValueError("load the model with transformers, then ImagePipeline.from_transformers(model, processor)")
