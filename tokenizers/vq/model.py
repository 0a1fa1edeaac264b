"""VQ tokenizer of LlamaGen (Sun et al., 2024, arXiv:2406.06525), which also runs taming VQGANs (arXiv:2012.09841).

Module names, and so the state dict, are LlamaGen's. Residual, scalar and video tokenizers are other files.

Letters: B images, H W pixels, h w code grid, V codes, C channels of a code.
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
from einops import rearrange
from torch import Tensor, nn

from vargen.hooks import HookedModel, runs_as_forward
from vargen.outputs import pytree
from vargen.tokenizers.checks import check_images, check_range, half_precision_explained
from vargen.tokenizers.layers.conv import Attention, ConvDecoder, ConvEncoder
from vargen.tokenizers.layers.tiling import Tiled
from vargen.tokenizers.settings import VQ
from vargen.tokenizers.vq.quantizers import VectorQuantizer
from vargen.validation.checks import checked
from vargen.validation.folders import Stored

SIZES: dict[str, dict[str, Any]] = {  # published by LlamaGen; every other setting is the default
    "VQ-16": {"channel_multipliers": [1, 1, 2, 2, 4]},
    "VQ-8": {"channel_multipliers": [1, 2, 2, 4]},
}


@pytree
@dataclass
class VQEncoderOutput:
    """Result of ``VQTokenizer.encode``; loss parts are scalars in training mode and ``None`` otherwise."""

    codes: Tensor  # [B, h, w] int64, row-major
    latents: Tensor  # [B, C, h, w] code vectors
    vq_loss: Tensor | None = None
    commit_loss: Tensor | None = None
    entropy_loss: Tensor | None = None

    @property
    def loss(self) -> Tensor | None:
        """Sum of the quantizer's loss parts, or ``None`` outside training mode."""
        if self.vq_loss is None or self.commit_loss is None or self.entropy_loss is None:
            return None
        return self.vq_loss + self.commit_loss + self.entropy_loss


@pytree
@dataclass
class VQTokenizerOutput(VQEncoderOutput):
    """Result of ``VQTokenizer.forward``: an encoder output with the reconstruction."""

    images: Tensor | None = None  # [B, in_channels, H, W], unclamped


class VQTokenizer(Tiled, HookedModel, Stored, ModelMixin, ConfigMixin):
    """Images to a grid of codes and back.

    ``encoder_type="patch"`` has no learned encoder: a latent is the raw patch of f x f pixels (f = ``downsample``,
    ``codebook_dim = in_channels * f * f``), its code the nearest patch of a k-means codebook, and the convolutional
    decoder supplies the context. Codes are then strictly local, which small transformers learn quickly. With
    ``patch_residual`` the decoder only corrects the picture that the patches already make.

    Args:
        in_channels: colour channels.
        base_channels: width of the first level.
        channel_multipliers: width of each level in units of ``base_channels``, highest resolution first.
        num_res_blocks: ResBlocks a level of the encoder; the decoder has one more.
        z_channels: channels between convolutions and quantizer.
        codebook_size: V.
        codebook_dim: C.
        l2_norm: compare directions (LlamaGen) instead of points (taming).
        commit_loss_beta: weight of the commitment loss.
        entropy_loss_ratio: weight of the entropy loss.
        legacy_beta: beta on the codebook loss instead, as in taming's released models.
        dropout: inside ResBlocks, in [0, 1).
        norm_num_groups: groups of every GroupNorm; must divide every width.
        attention: ``True`` at the lowest resolution and in the middle, ``"mid"`` in the middle only, ``False`` nowhere.
        encoder_type: ``"conv"`` or ``"patch"``.
        patch_residual: with ``"patch"``: the decoder starts as the identity and learns a correction.
    """

    config_name = "config.json"

    @checked(VQ)
    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        l2_norm: bool = True,
        commit_loss_beta: float = 0.25,
        entropy_loss_ratio: float = 0.0,
        legacy_beta: bool = False,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention: Attention = True,
        encoder_type: Literal["conv", "patch"] = "conv",
        patch_residual: bool = True,
    ) -> None:
        super().__init__()
        self.downsample = 2 ** (len(channel_multipliers) - 1)
        widths = (base_channels, channel_multipliers, num_res_blocks, z_channels, norm_num_groups, dropout, attention)
        if encoder_type == "conv":
            self.encoder = ConvEncoder(in_channels, *widths)
            self.quant_conv = nn.Conv2d(z_channels, codebook_dim, 1)
        self.quantize = VectorQuantizer(
            codebook_size,
            codebook_dim,
            l2_norm=l2_norm,
            commit_loss_beta=commit_loss_beta,
            entropy_loss_ratio=entropy_loss_ratio,
            legacy_beta=legacy_beta,
        )
        self.post_quant_conv = nn.Conv2d(codebook_dim, z_channels, 1)
        self.decoder = ConvDecoder(in_channels, *widths)
        if encoder_type == "patch":
            self.quantize.embedding.requires_grad_(False)  # the codebook comes from k-means, not from gradients
            if patch_residual:
                nn.init.zeros_(self.decoder.conv_out.weight)
                nn.init.zeros_(cast(Tensor, self.decoder.conv_out.bias))

    @classmethod
    def from_size(cls, size: str, **config: Any) -> VQTokenizer:
        """Build a published size, ``"VQ-16"`` or ``"VQ-8"``, with random weights.

        Args:
            size: name of the size.
            config: settings that differ from it.

        Raises:
            ValueError: unknown name.
        """
        if size not in SIZES:
            raise ValueError(f"unknown tokenizer size {size!r}; choose from {', '.join(SIZES)}")
        return cls(**{**SIZES[size], **config})

    @classmethod
    def from_original(cls, checkpoint: str | Path | Mapping[str, Tensor], **config: Any) -> VQTokenizer:
        """Load an official LlamaGen tokenizer or a taming VQGAN.

        Every size is read from the shapes. What they cannot tell keeps the value of the family: LlamaGen has
        ``l2_norm=True``, taming ``l2_norm=False, legacy_beta=True``, both 32 norm groups.

        Args:
            checkpoint: file (``.pt``, ``.ckpt``, ``.safetensors``) or state dict; training containers are unwrapped.
            config: settings that override what was inferred; and ``key``, the entry of a file of several such as
                ``\"ema\"``, see ``load_original``.

        Raises:
            ValueError: not such a checkpoint, missing or extra keys, wrong shapes.
        """
        from vargen.tokenizers.vq.checkpoints import read_vq_checkpoint

        return cast(VQTokenizer, read_vq_checkpoint(cls, checkpoint, config))

    @property
    @runs_as_forward
    def codebook(self) -> Tensor:
        """``[V, C]`` code vectors as used: unit length where the model normalises."""
        return self.quantize.codebook

    @property
    def codebook_size(self) -> int:
        """Codes of the codebook, V."""
        return self.quantize.embedding.num_embeddings

    @runs_as_forward
    def features(self, images: Tensor) -> Tensor:
        """Map images ``[B, in_channels, H, W]`` to what the quantizer reads, ``[B, C, h, w]``, not normalised."""
        check_images(images, self.config.in_channels, self.downsample)
        if self.config.encoder_type == "patch":
            return F.pixel_unshuffle(images.to(self.dtype), self.downsample)
        with half_precision_explained(self.dtype):
            return self.in_pieces(lambda x: self.quant_conv(self.encoder(x)), images.to(self.dtype), self.downsample)

    @runs_as_forward
    def encode(self, images: Tensor) -> VQEncoderOutput:
        """Turn images into codes.

        Args:
            images: ``[B, in_channels, H, W]`` in [-1, 1]; H and W are multiples of ``downsample`` and may differ.

        Raises:
            ValueError: wrong shape, values out of range, NaN.
        """
        check_images(images, self.config.in_channels, self.downsample)
        check_range(images)
        return VQEncoderOutput(**vars(self.quantize(self.features(images))))

    @runs_as_forward
    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes into images.

        Args:
            codes: ``[B, h, w]`` integers in [0, V), or ``[B, N]`` for a square grid.

        Returns:
            ``[B, in_channels, H, W]`` around [-1, 1], unclamped.

        Raises:
            ValueError: not integers, wrong shape, codes out of range.
        """
        return self.decode_latents(self.quantize.lookup(self._check_codes(codes)).permute(0, 3, 1, 2))

    @runs_as_forward
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Turn code vectors ``[B, C, h, w]`` into images ``[B, in_channels, H, W]``, unclamped."""
        if latents.ndim != 4 or latents.shape[1] != self.config.codebook_dim:
            raise ValueError(f"latents must be [B, {self.config.codebook_dim}, h, w], got {tuple(latents.shape)}")
        with half_precision_explained(self.dtype):
            images = self.in_pieces(lambda x: self.decoder(self.post_quant_conv(x.contiguous())), latents, 1)
        if self.config.encoder_type == "patch" and self.config.patch_residual:
            images = images + F.pixel_shuffle(latents, self.downsample)
        return images

    def forward(self, images: Tensor) -> VQTokenizerOutput:
        """Reconstruct images ``[B, in_channels, H, W]`` in [-1, 1]; in training mode with the quantizer's losses.

        The range of the values is not checked here: it would stop the GPU once a step.
        """
        quantized = self.quantize(self.features(images))
        return VQTokenizerOutput(**vars(quantized), images=self.decode_latents(quantized.latents))

    @torch.no_grad()
    def init_codebook_(
        self, images: Tensor, generator: torch.Generator | None = None, num_iterations: int = 12
    ) -> float:
        """Set the codebook by k-means over the features of images ``[B, in_channels, H, W]``.

        Returns:
            Mean squared distance of a feature vector to its code.
        """
        vectors = [rearrange(self.features(part), "b c h w -> (b h w) c") for part in images.split(256)]
        return self.quantize.kmeans_(torch.cat(vectors), generator, num_iterations)

    def _check_codes(self, codes: Tensor) -> Tensor:
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers, got {codes.dtype}")
        if codes.ndim == 2 and (side := round(codes.shape[1] ** 0.5)) ** 2 == codes.shape[1]:
            codes = rearrange(codes, "b (h w) -> b h w", h=side)
        if codes.ndim != 3:
            raise ValueError(f"codes must be [B, h, w], or [B, N] with a square N, got {tuple(codes.shape)}")
        if codes.numel():
            low, high = (int(v) for v in codes.aminmax())
            if low < 0 or high >= self.codebook_size:
                raise ValueError(f"codes must lie in [0, {self.codebook_size}), got {low if low < 0 else high}")
        return codes.long()
