"""Binary multi-scale tokenizer of Infinity (Han et al., 2024, arXiv:2412.04431): an image is K grids of bits.

The convolutions are those of ``vargen.tokenizers.layers.conv``; official checkpoints are renamed on the way in.

Letters: B images, H W pixels, K scales, n_k positions of scale k, L all positions, C channels, p cells of a position along a
side, d = C p^2 bits of a position, h w the size of the feature map.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from vargen.hooks import HookedModel, runs_as_forward
from vargen.outputs import pytree
from vargen.tokenizers.checks import check_images, check_range, half_precision_explained
from vargen.tokenizers.layers.conv import ConvDecoder, ConvEncoder
from vargen.tokenizers.layers.tiling import Tiled
from vargen.tokenizers.multiscale_bsq.quantizer import Scales, SignQuantizer, check_bits
from vargen.tokenizers.settings import MULTISCALE_BSQ
from vargen.validation.checks import check_scales, checked, pair_of
from vargen.validation.folders import Stored

SCALES_1M = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)  # of the published models for 1024 x 1024 pixels
ScaleList = Sequence[int | Sequence[int]]


@pytree
@dataclass
class MultiScaleBSQEncoderOutput:
    """Result of ``MultiScaleBSQTokenizer.encode``."""

    codes: list[Tensor]  # K times [B, n_k, d] int8 bits, positions row-major
    latents: Tensor  # [B, C, h, w] sum of all scales


class MultiScaleBSQTokenizer(Tiled, HookedModel, Stored, ModelMixin, ConfigMixin):
    """Images to bits over scales and back.

    The defaults are the published ``infinity_vae_d32reg``; the one of Infinity-8B has ``codebook_dim=14``,
    ``channel_multipliers=(1, 2, 4, 4)`` and ``patch=2``.

    Args:
        in_channels: colour channels.
        base_channels: width of the first level.
        channel_multipliers: width of each level in units of ``base_channels``, highest resolution first.
        num_res_blocks: ResBlocks a level of the encoder; the decoder has one more.
        codebook_dim: C.
        patch: p, cells of the feature map along a side that are one position of the backbone.
        scales: sides, or (height, width) pairs, of the grids of positions, coarse to fine; see ``with_scales``.
        norm_num_groups: groups of every GroupNorm; must divide every width.

    Example:
        >>> tokenizer = MultiScaleBSQTokenizer(
        ...     base_channels=4, channel_multipliers=(1, 1), num_res_blocks=1, codebook_dim=3, scales=(1, 2), norm_num_groups=2
        ... )
        >>> [tuple(part.shape) for part in tokenizer.encode(torch.zeros(1, 3, 4, 4)).codes]
        [(1, 1, 3), (1, 4, 3)]
    """

    config_name = "config.json"
    codebook_size = 2  # what each bit may be

    @checked(MULTISCALE_BSQ)
    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 4, 4, 4),
        num_res_blocks: int = 2,
        codebook_dim: int = 32,
        patch: int = 1,
        scales: ScaleList = SCALES_1M,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.downsample = patch * 2 ** (len(channel_multipliers) - 1)  # pixels of a position along a side
        self.scales: Scales = tuple(map(pair_of, scales))  # type: ignore[arg-type]  # checked: a side or a pair
        self.quantize = SignQuantizer(codebook_dim, patch)
        widths = (base_channels, channel_multipliers, num_res_blocks, codebook_dim, norm_num_groups, 0.0, False)
        self.encoder = ConvEncoder(in_channels, *widths)
        self.decoder = ConvDecoder(in_channels, *widths)

    @classmethod
    def from_original(cls, checkpoint: str | Path | Mapping[str, Tensor], **config: Any) -> MultiScaleBSQTokenizer:
        """Load an official tokenizer strictly.

        Sizes are read from the shapes; C = 14 is taken for the tokenizer of Infinity-8B, whose positions are 2 x 2 cells.

        Args:
            checkpoint: file or state dict; of a container the entry ``vae`` is taken, ``key="ema"`` of ``load_original``
                gives the moving average.
            config: settings that override what was inferred, such as ``patch`` and ``scales``.

        Raises:
            ValueError: not such a checkpoint, missing or extra keys, wrong shapes.
        """
        from vargen.tokenizers.multiscale_bsq.checkpoints import read_bsq_checkpoint

        return cast(MultiScaleBSQTokenizer, read_bsq_checkpoint(cls, checkpoint, config))

    @property
    def num_bits(self) -> int:
        """Bits of a position, d."""
        return self.quantize.num_bits

    def with_scales(self, scales: ScaleList) -> Self:
        """The same tokenizer for another image size: a light view that shares all weights.

        Args:
            scales: sides, or (height, width) pairs, of the grids of positions.
        """
        view = copy.copy(self)
        view.scales = tuple(map(pair_of, check_scales("scales", scales)))
        return view

    @runs_as_forward
    def features(self, images: Tensor) -> Tensor:
        """Map images ``[B, in_channels, H, W]`` to what is quantized, ``[B, C, h, w]``."""
        check_images(images, self.config.in_channels, self.downsample)
        with half_precision_explained(self.dtype):
            return self.in_pieces(self.encoder, images.to(self.dtype), self.downsample)

    @runs_as_forward
    def encode(self, images: Tensor) -> MultiScaleBSQEncoderOutput:
        """Turn images ``[B, in_channels, H, W]`` in [-1, 1] into bits.

        Raises:
            ValueError: wrong shape, values out of range, NaN, a size that is not that of the scales.
        """
        check_images(images, self.config.in_channels, self.downsample)
        check_range(images)
        size = (images.shape[-2] // self.downsample, images.shape[-1] // self.downsample)
        if size != self.scales[-1]:
            raise ValueError(
                f"images of {images.shape[-2]}x{images.shape[-1]} pixels have {size[0]}x{size[1]} positions, but the last "
                f"scale is {self.scales[-1][0]}x{self.scales[-1][1]}; resize, or use with_scales((..., {size}))"
            )
        codes, _, total = self.quantize.encode(self.features(images), self.scales)
        return MultiScaleBSQEncoderOutput(codes, total.to(self.dtype))

    @runs_as_forward
    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Turn K tensors ``[B, n_k, d]`` of bits into images ``[B, in_channels, H, W]`` around [-1, 1], unclamped.

        Raises:
            ValueError: wrong number of scales, wrong shapes, not zeros and ones.
        """
        if not isinstance(codes, Tensor) and len(codes) != len(self.scales):
            raise ValueError(
                f"codes must hold {len(self.scales)} scales, got {len(codes)}; decode_partial takes the first few"
            )
        return self.decode_partial(codes)

    @runs_as_forward
    def decode_partial(self, codes: Sequence[Tensor]) -> Tensor:
        """Decode the first few scales: a coarse picture at full size; arguments and errors as in ``decode``."""
        bits = check_bits(codes, self.scales, self.num_bits)
        total = self.blank(len(bits[0]))
        for k, part in enumerate(bits):
            total = self.accumulate(total, self.lookup(part.to(total.device)), k)
        return self.decode_latents(total)

    @runs_as_forward
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Turn the sum of scales ``[B, C, h, w]`` into images, unclamped."""
        with half_precision_explained(self.dtype):
            return self.in_pieces(self.decoder, latents.to(self.dtype), 1)

    def scale_inputs(self, codes: Sequence[Tensor]) -> Tensor:
        """What a next-scale backbone reads at the scales behind the first, teacher-forced.

        Args:
            codes: K - 1 scales or all of them (the last is not read); fewer give the inputs of fewer scales.

        Returns:
            ``[B, L - n_0, d]`` float32, scale by scale, row-major.
        """
        bits = check_bits(codes, self.scales, self.num_bits)[: len(self.scales) - 1]
        total, found = self.blank(len(bits[0])), []
        for k, part in enumerate(bits):
            total = self.accumulate(total, self.lookup(part.to(total.device)), k)
            found.append(self.shrink(total, self.scales[k + 1]))
        return torch.cat(found, dim=1)

    def blank(self, num_images: int) -> Tensor:
        """The empty sum ``[B, C, h, w]`` float32."""
        size = self.quantize.cells(self.scales[-1])
        return torch.zeros(num_images, self.config.codebook_dim, *size, dtype=torch.float32, device=self.device)

    def lookup(self, codes: Tensor) -> Tensor:
        """Bits ``[B, n, d]`` to vectors ``[B, n, d]`` float32."""
        return self.quantize.lookup(codes)

    def accumulate(self, total: Tensor, vectors: Tensor, k: int) -> Tensor:
        """Add the vectors ``[B, n_k, d]`` of scale k to the sum ``[B, C, h, w]``."""
        return self.quantize.accumulate(total, vectors, self.scales[k])

    def shrink(self, total: Tensor, size: tuple[int, int]) -> Tensor:
        """The sum ``[B, C, h, w]`` at a scale, ``[B, n_k, d]``: the backbone's input of that scale."""
        return self.quantize.shrink(total, size)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct images ``[B, in_channels, H, W]`` in [-1, 1]."""
        return self.decode_latents(self.encode(images).latents)
