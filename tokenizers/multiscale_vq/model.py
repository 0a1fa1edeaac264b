"""Multi-scale tokenizer of VAR (Tian et al., 2024, arXiv:2404.02905): an image is K grids of codes, coarse to fine.

The convolutions are those of ``vargen.tokenizers.layers.conv``; official checkpoints are renamed on the way in.

Letters: B images, H W pixels, K scales, n_k codes of scale k, L all codes, V codebook, C channels, h w the last scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.hooks import HookedModel, runs_as_forward
from vargen.outputs import pytree
from vargen.tokenizers.checks import check_images, check_range, half_precision_explained
from vargen.tokenizers.layers.conv import Attention, ConvDecoder, ConvEncoder
from vargen.tokenizers.layers.tiling import Tiled
from vargen.tokenizers.multiscale_vq.checks import check_scale_codes
from vargen.tokenizers.multiscale_vq.quantizer import ScaleQuantizer, Scales, read_scales
from vargen.tokenizers.settings import MULTISCALE_VQ
from vargen.tokenizers.vq.kmeans import kmeans, refine
from vargen.validation.checks import checked, pair_of
from vargen.validation.folders import Stored

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # of the published models for 256 x 256 pixels
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
ScaleList = Sequence[int | Sequence[int]]


@pytree
@dataclass
class MultiScaleVQEncoderOutput:
    """Result of ``MultiScaleVQTokenizer.encode``."""

    codes: list[Tensor]  # K times [B, n_k] int64, row-major
    latents: Tensor  # [B, C, h, w] sum of all scales
    loss: Tensor | None = None  # [] in training mode


@pytree
@dataclass
class MultiScaleVQTokenizerOutput(MultiScaleVQEncoderOutput):
    """Result of ``MultiScaleVQTokenizer.forward``: an encoder output with the reconstruction."""

    images: Tensor | None = None  # [B, in_channels, H, W], unclamped


class MultiScaleVQTokenizer(Tiled, HookedModel, Stored, ModelMixin, ConfigMixin):
    """Images to codes over scales and back.

    The defaults are the published model ``vae_ch160v4096z32``. ``encoder_type="patch"`` has no learned encoder: features
    are the raw patches of f x f pixels (``codebook_dim = in_channels * f * f``) and the codebook comes from k-means, so
    that the code of a scale is a local function of the picture shrunk to that scale, which small transformers learn
    quickly; the decoder only corrects the picture that the patches make.

    Args:
        in_channels: colour channels.
        base_channels: width of the first level.
        channel_multipliers: width of each level in units of ``base_channels``, highest resolution first.
        num_res_blocks: ResBlocks a level of the encoder; the decoder has one more.
        codebook_size: V.
        codebook_dim: C.
        scales: sides, or (height, width) pairs, of the code grids, coarse to fine; the last one times the downsample
            factor is the image.
        beta: weight of the commitment term.
        znorm: look codes up by direction.
        quant_conv_kernel_size: of the convolutions around the quantizer, odd.
        phi_ratio: share of the convolution behind the enlargement of each scale, 0 = none.
        num_phi: how many such convolutions the scales share; 0 = one each.
        upsample: how codes are enlarged, ``"bicubic"`` (published), ``"bilinear"`` or ``"nearest"``.
        residual: each scale quantizes what the coarser ones left over and all are summed (published); ``False`` makes a
            pyramid, in which each scale quantizes the shrunk picture itself and replaces the coarser ones.
        norm_num_groups: groups of every GroupNorm; must divide every width.
        attention: ``True`` at the lowest resolution and in the middle, ``"mid"`` in the middle only, ``False`` nowhere.
        dropout: inside ResBlocks.
        encoder_type: ``"conv"`` or ``"patch"``.
        z_channels: width in front of the decoder with ``"patch"``; unused with ``"conv"`` (there it is C).
    """

    config_name = "config.json"

    @checked(MULTISCALE_VQ)
    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 160,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        codebook_size: int = 4096,
        codebook_dim: int = 32,
        scales: ScaleList = SCALES_256,
        beta: float = 0.25,
        znorm: bool = False,
        quant_conv_kernel_size: int = 3,
        phi_ratio: float = 0.5,
        num_phi: int = 4,
        upsample: Literal["bicubic", "bilinear", "nearest"] = "bicubic",
        residual: bool = True,
        norm_num_groups: int = 32,
        attention: Attention = True,
        dropout: float = 0.0,
        encoder_type: Literal["conv", "patch"] = "conv",
        z_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.downsample = 2 ** (len(channel_multipliers) - 1)
        self.scales: Scales = tuple(map(pair_of, scales))  # type: ignore[arg-type]  # checked: a side or a pair
        patch = encoder_type == "patch"
        width = (z_channels or codebook_dim) if patch else codebook_dim
        widths = (base_channels, channel_multipliers, num_res_blocks, width, norm_num_groups, dropout, attention)
        kernel, margin = quant_conv_kernel_size, quant_conv_kernel_size // 2
        if not patch:
            self.encoder = ConvEncoder(in_channels, *widths)
            self.quant_conv = nn.Conv2d(width, codebook_dim, kernel, padding=margin)
        self.quantize = ScaleQuantizer(
            codebook_size, codebook_dim, self.scales, beta, znorm, phi_ratio, num_phi, upsample, residual
        )
        self.post_quant_conv = nn.Conv2d(codebook_dim, width, kernel, padding=margin)
        self.decoder = ConvDecoder(in_channels, *widths)
        if patch:
            self.quantize.requires_grad_(False)  # the codebook comes from k-means, not from gradients
            nn.init.zeros_(self.decoder.conv_out.weight)
            nn.init.zeros_(cast(Tensor, self.decoder.conv_out.bias))

    @classmethod
    def from_original(cls, checkpoint: str | Path | Mapping[str, Tensor], **config: Any) -> MultiScaleVQTokenizer:
        """Load an official VAR tokenizer strictly.

        Sizes are read from the shapes. ``scales`` is the list for 256 pixels where the file has ten scales and must be
        given otherwise; any other list may be given too, the weights do not depend on it.

        Args:
            checkpoint: file or state dict, training containers are unwrapped.
            config: settings that override what was inferred; and ``key``, the entry of a file of several such as
                ``\"ema\"``, see ``load_original``.

        Raises:
            ValueError: not such a checkpoint, missing or extra keys, wrong shapes, ``scales`` missing.
        """
        from vargen.tokenizers.multiscale_vq.checkpoints import read_multiscale_checkpoint

        return cast(MultiScaleVQTokenizer, read_multiscale_checkpoint(cls, checkpoint, config))

    @property
    @runs_as_forward
    def codebook(self) -> Tensor:
        """``[V, C]`` code vectors as summed."""
        return self.quantize.codebook

    @property
    def codebook_size(self) -> int:
        """Codes of the codebook, V."""
        return self.quantize.embedding.num_embeddings

    @runs_as_forward
    def features(self, images: Tensor) -> Tensor:
        """Map images ``[B, in_channels, H, W]`` to what is quantized, ``[B, C, h, w]``."""
        check_images(images, self.config.in_channels, self.downsample)
        if self.config.encoder_type == "patch":
            return F.pixel_unshuffle(images.to(self.dtype), self.downsample)
        with half_precision_explained(self.dtype):
            return self.in_pieces(lambda x: self.quant_conv(self.encoder(x)), images.to(self.dtype), self.downsample)

    @runs_as_forward
    def encode(self, images: Tensor, scales: ScaleList | None = None) -> MultiScaleVQEncoderOutput:
        """Turn images into codes.

        Args:
            images: ``[B, in_channels, H, W]`` in [-1, 1].
            scales: another list than the model's own, for other image sizes; (height, width) pairs where not square.

        Raises:
            ValueError: wrong shape, values out of range, NaN, scales that do not end at the size of the latents.
        """
        check_images(images, self.config.in_channels, self.downsample)
        check_range(images)
        sizes = self._scales_for(images, scales)
        return MultiScaleVQEncoderOutput(**vars(self.quantize(self.features(images), sizes)))

    @runs_as_forward
    def decode(self, codes: Sequence[Tensor], scales: ScaleList | None = None) -> Tensor:
        """Turn codes into images.

        Args:
            codes: K tensors ``[B, n_k]`` of integers in [0, V).
            scales: as in ``encode``.

        Returns:
            ``[B, in_channels, H, W]`` around [-1, 1], unclamped.

        Raises:
            ValueError: wrong number of scales or codes, not integers, codes out of range.
        """
        sizes = self._sizes(scales)
        if len(codes) != len(sizes):
            raise ValueError(
                f"codes must hold {len(sizes)} scales, got {len(codes)}; decode_partial takes the first few"
            )
        return self.decode_partial(codes, scales)

    @runs_as_forward
    def decode_partial(self, codes: Sequence[Tensor], scales: ScaleList | None = None) -> Tensor:
        """Turn the first few scales into a full-size preview ``[B, in_channels, H, W]``; arguments as in ``decode``."""
        return self.decode_latents(self.latents(codes, scales))

    @runs_as_forward
    def latents(self, codes: Sequence[Tensor], scales: ScaleList | None = None) -> Tensor:
        """Sum the first few scales: ``[B, C, h, w]`` float32."""
        sizes = self._sizes(scales)
        codes = check_scale_codes(codes, sizes, self.codebook_size)
        total = self.blank(len(codes[0]), sizes)
        for k, picked in enumerate(codes):
            total = self.accumulate(total, self.quantize.lookup(picked), k, sizes)
        return total

    @runs_as_forward
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Turn sums of scales ``[B, C, h, w]`` into images ``[B, in_channels, H, W]``, unclamped."""
        latents = latents.to(self.dtype)
        with half_precision_explained(self.dtype):
            images = self.in_pieces(lambda x: self.decoder(self.post_quant_conv(x)), latents, 1)
        if self.config.encoder_type == "patch":
            images = images + F.pixel_shuffle(latents, self.downsample)
        return images

    @runs_as_forward
    def scale_inputs(self, codes: Sequence[Tensor], scales: ScaleList | None = None) -> Tensor:
        """What a next-scale backbone reads: for each scale but the first, the sum so far shrunk to it.

        Args:
            codes: the first K - 1 scales or all of them (the last is not read); fewer give the inputs of fewer scales.
            scales: as in ``encode``.

        Returns:
            ``[B, L - n_0, C]`` float32, scale by scale, row-major.
        """
        sizes = self._sizes(scales)
        codes = check_scale_codes(codes, sizes, self.codebook_size)[: len(sizes) - 1]
        total = self.blank(len(codes[0]), sizes)
        found = []
        for k, picked in enumerate(codes):
            total = self.accumulate(total, self.quantize.lookup(picked), k, sizes)
            found.append(self.quantize.shrink(total, sizes[k + 1]))
        return torch.cat(found, dim=1)

    def blank(self, num_images: int, sizes: Scales | None = None) -> Tensor:
        """The empty sum ``[B, C, h, w]`` float32."""
        size = (sizes or self.scales)[-1]
        return torch.zeros(num_images, self.config.codebook_dim, *size, dtype=torch.float32, device=self.device)

    @runs_as_forward
    def lookup(self, codes: Tensor) -> Tensor:
        """Codes ``[B, n]`` to vectors ``[B, n, C]`` float32."""
        return self.quantize.lookup(codes)

    @runs_as_forward
    def accumulate(self, total: Tensor, vectors: Tensor, k: int, sizes: Scales | None = None) -> Tensor:
        """Add the vectors ``[B, n_k, C]`` of scale k to the sum ``[B, C, h, w]``."""
        return self.quantize.accumulate(total, vectors, k, sizes or self.scales)

    def shrink(self, total: Tensor, size: tuple[int, int]) -> Tensor:
        """The sum ``[B, C, h, w]`` at a scale, ``[B, n_k, C]``: the backbone's input of that scale."""
        return self.quantize.shrink(total, size)

    def forward(self, images: Tensor, scales: ScaleList | None = None) -> MultiScaleVQTokenizerOutput:
        """Reconstruct images ``[B, in_channels, H, W]`` in [-1, 1]; in training mode with the quantizer's loss.

        The range of the values is not checked here: it would stop the GPU once a step.
        """
        quantized = self.quantize(self.features(images), self._scales_for(images, scales))
        return MultiScaleVQTokenizerOutput(**vars(quantized), images=self.decode_latents(quantized.latents))

    @torch.no_grad()
    def init_codebook_(
        self, images: Tensor, generator: torch.Generator | None = None, num_iterations: int = 2, num_rounds: int = 3
    ) -> float:
        """Set the codebook by k-means over the residuals of all scales.

        Residuals depend on the codebook: it starts from exact residuals and is refitted to the real ones
        ``num_rounds`` times.

        Args:
            images: ``[n, in_channels, H, W]`` in [-1, 1].
            generator: CPU generator of the seeding.
            num_iterations: of the first k-means.
            num_rounds: refits.

        Returns:
            Mean squared distance of a residual to its code, in the last round.
        """
        features = torch.cat([self.features(part).float() for part in images.split(256)])
        weight = self.quantize.embedding.weight
        vectors = torch.cat(self.quantize.residuals(features, exact=True)).unique(dim=0)
        chosen = torch.randperm(len(vectors), generator=generator)[: 4 * len(weight)]  # seeding is quadratic
        centroids, error = kmeans(vectors[chosen], len(weight), generator=generator, num_iterations=num_iterations)
        weight.copy_(centroids)
        for _ in range(num_rounds):
            centroids, error = refine(torch.cat(self.quantize.residuals(features)), weight.float())
            weight.copy_(centroids)
        return error

    def _sizes(self, scales: ScaleList | None) -> Scales:
        return self.scales if scales is None else read_scales(scales)

    def _scales_for(self, images: Tensor, scales: ScaleList | None) -> Scales:
        sizes = self._sizes(scales)
        size = tuple(side // self.downsample for side in images.shape[-2:])
        if size != sizes[-1]:
            raise ValueError(
                f"images of {images.shape[-2]}x{images.shape[-1]} pixels have latents of {size[0]}x{size[1]}, but the "
                f"last scale is {sizes[-1][0]}x{sizes[-1][1]}; resize, or give scales=(..., {size})"
            )
        return sizes
