"""Codes to pixels by the model's own decoder, in the form that pipelines call.

Letters: B images, h w code grid, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vargen.checkpoints.bounds import count_layers, read_shape
from vargen.checkpoints.reader import build_strict, load_original
from vargen.hooks import execution_device, runs_as_forward
from vargen.tokenizers.layers.conv import ConvDecoder
from vargen.tokenizers.settings import LEVELS
from vargen.tokenizers.vq.checkpoints import taming_to_llamagen


class PixelDecoder(nn.Module):
    """A VQ decoder of transformers as the tokenizer of a pipeline.

    Args:
        vq: the model's VQ module; its ``decode`` is called.
        codebook_size: V.
        downsample: pixels along a side of one code.
        flat: ``vq.decode`` takes [B, h * w] instead of [B, h, w].
    """

    vq: Any  # transformers' modules are not typed

    def __init__(self, vq: nn.Module, codebook_size: int, downsample: int, *, flat: bool = False) -> None:
        super().__init__()
        self.vq, self.codebook_size, self.downsample, self.flat = vq, codebook_size, downsample, flat

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return execution_device(self)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.vq.parameters()).dtype

    @property
    def codebook(self) -> Tensor:
        """[V, C] code vectors as the decoder reads them, for samplers that compare codes."""
        table = self.vq.quantize.embedding.weight
        return nn.functional.normalize(table, dim=-1) if self.flat else table  # Janus compares directions

    @property
    def training(self) -> bool:  # type: ignore[override]
        """Whether the decoder is in training mode; this wrapper has no mode of its own."""
        return self.vq.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Nothing to set: ``train`` and ``eval`` reach the decoder as a child."""

    def to(self, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Nothing to do: the decoder is part of the model and moves with the backbone."""
        return self

    @runs_as_forward
    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """[B, h, w] int64 to [B, 3, H, W], about [-1, 1], unclamped."""
        self._check(codes)
        return self.vq.decode(codes.flatten(1) if self.flat else codes)

    def _check(self, codes: Tensor) -> None:
        if bool(((codes < 0) | (codes >= self.codebook_size)).any()):
            raise ValueError(
                f"codes must be in 0..{self.codebook_size - 1}, got {int(codes.min())}..{int(codes.max())}"
            )

    def save_pretrained(self, save_directory: Any, **_: Any) -> None:
        """Refuse: the decoder is part of the model."""
        raise ValueError("the pixel decoder is part of the model; save the model with model.save_pretrained(folder)")

    @classmethod
    def from_pretrained(cls, folder: Any, **_: Any) -> PixelDecoder:
        """Refuse: the decoder is part of the model."""
        raise ValueError("load the model with transformers, then ImagePipeline.from_transformers(model, processor)")


class TamingPixels(PixelDecoder):
    """A taming VQGAN decoder behind a codebook and a convolution that the model holds.

    Args:
        codebook: embedding [V, C].
        post_quant_conv: C channels to the decoder's.
        weights: path or state dict with ``decoder.*`` in taming's layout; other keys, and prefixes, are dropped.
    """

    def __init__(self, codebook: Any, post_quant_conv: nn.Module, weights: str | Path | Mapping[str, Tensor]) -> None:
        decoder = taming_decoder(weights)
        super().__init__(decoder, codebook.num_embeddings, 2 ** (len(decoder.conv_blocks) - 1))
        self.embedding, self.post_quant_conv = codebook, post_quant_conv

    @property
    def codebook(self) -> Tensor:
        """[V, C] code vectors."""
        return self.embedding.weight

    def to(self, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Move the decoder; codebook and convolution move with the model."""
        self.vq.to(*args, **kwargs)
        return self

    @runs_as_forward
    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """[B, h, w] int64 to [B, 3, H, W], about [-1, 1], unclamped."""
        self._check(codes)
        latents = self.post_quant_conv(self.embedding(codes).movedim(-1, 1))
        return self.vq(latents.to(self.device, self.dtype))


def taming_decoder(weights: str | Path | Mapping[str, Tensor]) -> ConvDecoder:
    """Build a decoder from ``decoder.*`` in taming's layout; sizes are read from the shapes."""
    found = load_original(weights)
    named = {key[key.index("decoder.") :]: value for key, value in found.items() if "decoder." in key}
    state = {key.removeprefix("decoder."): value for key, value in taming_to_llamagen(named).items()}
    levels = count_layers(state, "conv_blocks.", least=0, most=LEVELS[-1])
    if levels == 0 or "conv_in.weight" not in state:
        raise ValueError("vq_decoder holds no decoder.* of a taming VQGAN (expected decoder.conv_in, decoder.up.*)")
    widths = [read_shape(state, f"conv_blocks.{i}.res.0.conv2.weight", 4)[0] for i in reversed(range(levels))]
    blocks = count_layers(state, "conv_blocks.0.res.", most=64)
    make = partial(
        ConvDecoder,
        out_channels=read_shape(state, "conv_out.weight", 4)[0],
        base_channels=widths[0],
        channel_multipliers=[width // widths[0] for width in widths],
        num_res_blocks=blocks - 1,
        z_channels=read_shape(state, "conv_in.weight", 4)[1],
        num_groups=32,
        attention="conv_blocks.0.attn.0.q.weight" in state or "mid",
    )
    return build_strict(make, state).eval().requires_grad_(False)
