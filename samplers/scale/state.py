"""What next-scale sampling carries from scale to scale, and what it asks of the tokenizer.

Letters: B images, K scales, n_k codes of scale k, L all codes, V codebook, C channels, h w the last scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from vargen.random import Stream
from vargen.samplers.state import DecodeState

ScaleNoise = Callable[[int, Stream, tuple[int, int, int]], Tensor]


class ScaleTokenizer(Protocol):
    """How tokens become a picture: all that differs between residual, pyramid and bitwise tokenizers.

    Tokens of a scale are codes ``[B, n]``, or bits ``[B, n, d]`` where the tokenizer has ``num_bits`` d; V is then 2.
    """

    scales: tuple[tuple[int, int], ...]  # (h_k, w_k), coarse to fine
    codebook_size: int  # V
    codebook: Tensor  # [V, C] what ``smooth`` mixes; those of bits have none

    def blank(self, num_images: int) -> Tensor:
        """The empty picture ``[B, C, h, w]`` float32."""
        ...

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes ``[B, n]`` to vectors ``[B, n, C]`` float32."""
        ...

    def accumulate(self, total: Tensor, vectors: Tensor, k: int) -> Tensor:
        """The picture ``[B, C, h, w]`` with the vectors ``[B, n_k, C]`` of scale k in it: enlargement, phi and sum."""
        ...

    def shrink(self, total: Tensor, size: tuple[int, int]) -> Tensor:
        """The picture at a scale, ``[B, n_k, C]``: what the backbone reads there."""
        ...

    def decode_latents(self, latents: Tensor) -> Tensor:
        """The picture ``[B, C, h, w]`` as pixels ``[B, 3, H, W]`` around [-1, 1]."""
        ...


@dataclass(kw_only=True)
class NextScaleState(DecodeState):
    """Everything that changes while scales are drawn; ``num_forwards`` counts those of both models."""

    tokenizer: ScaleTokenizer
    condition: Any  # as given, for the second model
    total: Tensor  # [B, C, h, w] float32 sum of the scales drawn so far
    forced: list[Tensor] | None  # K times [B, n_k] (or [B, n_k, d]), -1 where free
    noise: ScaleNoise | None
    drafter: Any = None  # the model of the first scales, in collaborative decoding
    scales: list[Tensor] = field(default_factory=list)  # drawn so far, [B, n_k] int64 (or [B, n_k, d] int8) each
    inputs: list[Tensor] = field(
        default_factory=list
    )  # [B, n_k, C] what scales 1, 2, ... read: kept for a second model

    @property
    def sizes(self) -> list[int]:
        """n_k of every scale."""
        return [h * w for h, w in self.tokenizer.scales]

    def preview(self) -> Tensor:
        """Decode the picture so far: ``[B, 3, H, W]`` around [-1, 1], at full size whatever the scale."""
        return self.tokenizer.decode_latents(self.total)


def token_shape(tokenizer: Any) -> tuple[int, ...]:
    """Axes of one token of a tokenizer, or of a backbone: none for a code, d for bits."""
    num_bits = getattr(tokenizer, "num_bits", None)
    return () if num_bits is None else (num_bits,)
