"""Video tokenizer of NBP (Ren et al., 2025, arXiv:2502.07737): causal 3-D convolutions of MAGVIT-v2 and FSQ codes.

The default is the published graph, key by key. A patch stem and factorised convolutions make small ones that train on a
CPU. A clip has 1 + k * f frames: the first frame is coded alone, every f further frames together.

Letters: B clips, T frames, H W pixels, t h w code grid, C channels of a code, V codes, f frames a code covers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vargen.hooks import HookedModel, runs_as_forward
from vargen.outputs import pytree
from vargen.tokenizers.checks import check_range, half_precision_explained
from vargen.tokenizers.settings import VIDEO_FSQ
from vargen.tokenizers.video_fsq.layers import (
    CausalConv3d,
    DepthToSpace,
    Pointwise,
    ResidualUnit,
    SpaceToDepth,
    StreamState,
    Swish,
    make_norm,
)
from vargen.tokenizers.video_fsq.quantizer import FSQ, Variant
from vargen.validation.checks import checked
from vargen.validation.folders import Stored


@pytree
@dataclass
class VideoEncoderOutput:
    """Result of ``VideoFSQTokenizer.encode``."""

    codes: Tensor  # [B, t, h, w] int64
    latents: Tensor  # [B, C, t, h, w] code vectors in [-1, 1]; they carry the straight-through gradient


@pytree
@dataclass
class VideoTokenizerOutput(VideoEncoderOutput):
    """Result of ``VideoFSQTokenizer.forward``: an encoder output with the reconstruction."""

    videos: Tensor | None = None  # [B, 3, T, H, W], unclamped


class VideoFSQTokenizer(HookedModel, Stored, ModelMixin, ConfigMixin):
    """Clips to a grid of codes and back, causally: a code depends on its own and earlier frames only.

    Args:
        in_channels: colour channels.
        base_channels: width of the first level.
        channel_multipliers: width of each level in units of ``base_channels``, highest resolution first; every further
            level halves the sides.
        temporal_downsample: for each step between levels, whether it halves time too.
        num_res_blocks: residual units a level.
        num_mid_blocks: further units at the code grid, on either side.
        levels: of FSQ; their number is C, their product V.
        fsq_variant: constants of FSQ, ``"nbp"`` or ``"cosmos"``.
        norm_num_groups: groups of the per-frame norms, at most one a channel; 0 = no norms.
        factorized: convolutions of residual units in space, then time (1x3x3, 3x1x1) instead of 3x3x3 twice.
        patch_size: (frames, height, width) of a patch that the first layer reads and the last one writes as a whole;
            (1, 1, 1) is the published convolution of pixels.
        refine_channels: width of a residual correction at full resolution after a patch decoder; 0 = none.
        unit_range: the network works on [0, 1] as the published one does; in and out stay [-1, 1].
        dictionary: the encoder is a table of V patches (``patch_table [V, pixels]`` uint8, set before training) and takes the
            nearest one; a code's digits are the patch's place in it. The decoder reads the patches of the codes and
            corrects them from what surrounds and precedes them. Needs every level in the patch: one multiplier.

    Example:
        >>> small = VideoFSQTokenizer(base_channels=8, channel_multipliers=(1,), temporal_downsample=(), num_res_blocks=1,
        ...     num_mid_blocks=0, levels=(4, 4), norm_num_groups=1, factorized=True, patch_size=(4, 4, 4))
        >>> small.encode(torch.zeros(1, 3, 9, 16, 16)).codes.shape
        torch.Size([1, 3, 4, 4])
    """

    config_name = "config.json"

    @checked(VIDEO_FSQ)
    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 4),
        temporal_downsample: Sequence[bool] = (False, True, True),
        num_res_blocks: int = 4,
        num_mid_blocks: int = 4,
        levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        fsq_variant: Variant = "nbp",
        norm_num_groups: int = 32,
        factorized: bool = False,
        patch_size: Sequence[int] = (1, 1, 1),
        refine_channels: int = 0,
        unit_range: bool = False,
        dictionary: bool = False,
    ) -> None:
        super().__init__()
        self.quantize = FSQ(levels, fsq_variant)
        patch = cast(tuple[int, int, int], patch_size)
        self.temporal_factor = patch[0] * 2 ** sum(temporal_downsample)
        steps = 2 ** (len(channel_multipliers) - 1)
        self.downsample = (patch[1] * steps, patch[2] * steps)
        widths = [base_channels * m for m in channel_multipliers]
        self.patch, self.unpatch = SpaceToDepth(patch), DepthToSpace(patch)
        pixels = in_channels * math.prod(patch)
        if dictionary:
            self.register_buffer("patch_table", torch.zeros(self.quantize.codebook_size, pixels, dtype=torch.uint8))
        self.encoder_layers = nn.ModuleList([] if dictionary else _encoder(self.config, widths, pixels))
        self.decoder_layers = nn.ModuleList(_decoder(self.config, widths, pixels))
        if refine_channels:
            last = CausalConv3d(refine_channels, in_channels, (1, 3, 3))
            nn.init.zeros_(last.conv.weight)
            nn.init.zeros_(cast(Tensor, last.conv.bias))
            first = CausalConv3d(in_channels, refine_channels, (1, 3, 3))
            self.refine_layers = nn.ModuleList([first, Swish(refine_channels), last])

    @classmethod
    def from_original(cls, checkpoint: str | Path | Mapping[str, Tensor], **config: Any) -> VideoFSQTokenizer:
        """Load a published NBP tokenizer strictly, such as ``magvit2_ucf.pt``.

        Args:
            checkpoint: file or state dict; training containers are unwrapped.
            config: settings that differ from the published ones; and ``key``, the entry of a file of several such as
                ``\"ema\"``, see ``load_original``.

        Raises:
            ValueError: not such a checkpoint, missing or extra keys, wrong shapes.
        """
        from vargen.checkpoints.bounds import check_given
        from vargen.checkpoints.reader import check_family, load_original, load_strict, split_key

        key, config = split_key(config)
        config = check_given(cls, config)
        state_dict = load_original(checkpoint, key=key)
        check_family(state_dict, "nbp-tokenizer")
        with torch.device("meta"):  # the checkpoint's own tensors take the places
            model = cls(**{"unit_range": True, **config})
        load_strict(model, state_dict, family="nbp-tokenizer")
        return model.eval()

    @property
    def codebook_size(self) -> int:
        """Codes of the codebook, V."""
        return self.quantize.codebook_size

    @property
    def codebook(self) -> Tensor:
        """``[V, C]`` code vectors."""
        return self.quantize.lookup(torch.arange(self.codebook_size, device=self.device))

    def num_frames(self, latent_frames: int) -> int:
        """Frames of a clip of t code frames: 1 + (t - 1) * f."""
        return 1 + (latent_frames - 1) * self.temporal_factor

    @runs_as_forward
    def features(self, videos: Tensor, state: StreamState | None = None) -> Tensor:
        """Map clips ``[B, 3, T, H, W]`` to what FSQ reads, ``[B, C, t, h, w]``."""
        x = videos.to(self.dtype)
        x = self.patch((x + 1) / 2 if self.config.unit_range else x, state)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        with half_precision_explained(self.dtype):
            for layer in self.encoder_layers:
                x = layer(x, state)
        return x

    @runs_as_forward
    def encode(
        self, videos: Tensor, *, chunk: int | None = None, state: StreamState | None = None
    ) -> VideoEncoderOutput:
        """Turn clips into codes.

        Args:
            videos: ``[B, 3, T, H, W]`` in [-1, 1], T = 1 + k * f.
            chunk: work on so many code frames at a time, for less memory; same codes.
            state: of a stream, for one piece after another: ``StreamState()`` before the first piece, of 1 + k * f
                frames; later pieces have k * f.

        Raises:
            ValueError: wrong shape, number of frames or values.
        """
        self._check_videos(videos, state)
        check_range(videos)
        if chunk is None:
            return self._quantize(self.features(videos, state))
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        state = state or StreamState()
        first = self.num_frames(chunk) if not state.started else chunk * self.temporal_factor
        pieces = [videos[:, :, :first], *videos[:, :, first:].split(chunk * self.temporal_factor, dim=2)]
        return self._quantize(torch.cat([self.features(p, state) for p in pieces if p.shape[2]], dim=2))

    @runs_as_forward
    def decode(self, codes: Tensor, *, chunk: int | None = None, state: StreamState | None = None) -> Tensor:
        """Turn codes into clips.

        Args:
            codes: ``[B, t, h, w]`` integers in [0, V).
            chunk: work on so many code frames at a time; same pixels.
            state: of a stream, ``StreamState()`` before its first piece; later pieces give t * f frames.

        Returns:
            ``[B, 3, 1 + (t - 1) * f, H, W]`` around [-1, 1], unclamped.

        Raises:
            ValueError: not integers, wrong shape, codes out of range.
        """
        return self.decode_latents(self.quantize.lookup(self._check_codes(codes)), chunk=chunk, state=state)

    @runs_as_forward
    def decode_latents(self, latents: Tensor, *, chunk: int | None = None, state: StreamState | None = None) -> Tensor:
        """Turn code vectors ``[B, C, t, h, w]`` into clips; arguments as in ``decode``."""
        if latents.ndim != 5 or latents.shape[1] != len(self.config.levels):
            raise ValueError(f"latents must be [B, {len(self.config.levels)}, t, h, w], got {tuple(latents.shape)}")
        if chunk is not None:
            if chunk < 1:
                raise ValueError(f"chunk must be at least 1, got {chunk}")
            state = state or StreamState()
            return torch.cat([self._decode(part, state) for part in latents.split(chunk, dim=2)], dim=2)
        return self._decode(latents, state)

    def forward(self, videos: Tensor) -> VideoTokenizerOutput:
        """Reconstruct clips ``[B, 3, T, H, W]`` in [-1, 1]; the range of the values is not checked here."""
        self._check_videos(videos, None)
        encoded = self._quantize(self.features(videos))
        return VideoTokenizerOutput(encoded.codes, encoded.latents, videos=self._decode(encoded.latents, None))

    @property
    @runs_as_forward
    def patches(self) -> Tensor:
        """``[V, pixels]`` patches of the dictionary in [-1, 1]."""
        return cast(Tensor, self.patch_table).to(self.dtype) / 127.5 - 1

    def _nearest(self, features: Tensor) -> Tensor:
        rows, table = rearrange(features, "b c t h w -> (b t h w) c"), self.patches
        half_norms = table.square().sum(1) / 2
        nearest = [torch.addmm(half_norms, part, table.T, alpha=-1).argmin(1) for part in rows.split(1024)]
        codes = torch.cat(nearest) if nearest else rows.new_empty(0, dtype=torch.long)
        return codes.view(features.shape[0], *features.shape[2:])

    def _quantize(self, features: Tensor) -> VideoEncoderOutput:
        if self.config.dictionary:
            codes = self._nearest(features)
            return VideoEncoderOutput(codes, self.quantize.lookup(codes))
        latents = self.quantize.quantize(features)
        return VideoEncoderOutput(self.quantize.codes(latents.detach()), latents)

    def _decode(self, latents: Tensor, state: StreamState | None) -> Tensor:
        x = latents.to(self.dtype).contiguous(memory_format=torch.channels_last_3d)
        with half_precision_explained(self.dtype):
            guess = None
            if self.config.dictionary:
                guess = x = self.patches[self.quantize.codes(latents)].permute(0, 4, 1, 2, 3)
            for layer in self.decoder_layers:
                x = layer(x, state)
            x = self.unpatch(x if guess is None else x + guess, state)
            if self.config.refine_channels:
                y = x
                for layer in self.refine_layers:
                    y = layer(y)
                x = x + y
        # the published network clamps, which tells it nothing and hides gradients: pixels stay as they are
        return (x * 2 - 1 if self.config.unit_range else x).contiguous()

    def _check_videos(self, videos: Tensor, state: StreamState | None) -> None:
        channels, f, (dh, dw) = self.config.in_channels, self.temporal_factor, self.downsample
        if videos.ndim != 5 or videos.shape[1] != channels:
            raise ValueError(f"videos must be [B, {channels}, T, H, W], got {tuple(videos.shape)}")
        if not videos.is_floating_point():
            raise ValueError(f"videos must be floating point in [-1, 1], got {videos.dtype}; divide by 127.5, minus 1")
        frames, height, width = videos.shape[2:]
        later = state is not None and bool(state.started)
        if frames < 1 or (frames - (not later)) % f:
            raise ValueError(
                f"a later piece must have a multiple of {f} frames, got {frames}"
                if later
                else f"a clip must have 1 + a multiple of {f} frames, got {frames}; use {max(frames - 1, 0) // f * f + 1}"
            )
        if height % dh or width % dw or 0 in (height, width):
            raise ValueError(f"video sides must be multiples of {dh}x{dw}, got {height}x{width}; resize or pad")

    def _check_codes(self, codes: Tensor) -> Tensor:
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers, got {codes.dtype}")
        if codes.ndim != 4:
            raise ValueError(f"codes must be [B, t, h, w], got {tuple(codes.shape)}")
        if codes.numel():
            low, high = (int(v) for v in codes.aminmax())
            if low < 0 or high >= self.codebook_size:
                raise ValueError(f"codes must lie in [0, {self.codebook_size}), got {low if low < 0 else high}")
        return codes.long()


def _encoder(config: Any, widths: list[int], pixels: int) -> list[nn.Module]:
    """Layers in the published order; their places are their names in the state dict."""
    groups, factorized = config.norm_num_groups, config.factorized
    kernel = (3, 3, 3) if pixels == config.in_channels else (1, 1, 1)
    layers: list[nn.Module] = [CausalConv3d(pixels, widths[0], kernel)]
    for level, width in enumerate(widths):
        if level:
            before = widths[level - 1]
            stride = (2 if config.temporal_downsample[level - 1] else 1, 2, 2)
            layers.append(CausalConv3d(before, before, stride=stride))
        for i in range(config.num_res_blocks):
            layers.append(ResidualUnit(widths[max(level - 1, 0)] if i == 0 else width, width, groups, factorized))
    layers += [ResidualUnit(widths[-1], widths[-1], groups, factorized) for _ in range(config.num_mid_blocks)]
    last = Pointwise(widths[-1], len(config.levels))
    return [*layers, make_norm(widths[-1], groups), Swish(widths[-1]), last]


def _decoder(config: Any, widths: list[int], pixels: int) -> list[nn.Module]:
    """Layers in the published order."""
    groups, factorized = config.norm_num_groups, config.factorized
    first = (3, 3, 3) if not factorized else (1, 1, 1)
    layers: list[nn.Module] = [CausalConv3d(pixels if config.dictionary else len(config.levels), widths[-1], first)]
    layers += [ResidualUnit(widths[-1], widths[-1], groups, factorized) for _ in range(config.num_mid_blocks)]
    layers += [ResidualUnit(widths[-1], widths[-1], groups, factorized) for _ in range(config.num_res_blocks)]
    for level in reversed(range(len(widths) - 1)):
        above, width = widths[level + 1], widths[level]
        block = (2 if config.temporal_downsample[level] else 1, 2, 2)
        layers += [CausalConv3d(above, above * math.prod(block)), DepthToSpace(block)]
        for i in range(config.num_res_blocks):
            layers.append(ResidualUnit(above if i == 0 else width, width, groups, factorized))
    kernel = (3, 3, 3) if pixels == config.in_channels else (1, 1, 1)
    return [*layers, make_norm(widths[0], groups), Swish(widths[0]), CausalConv3d(widths[0], pixels, kernel)]
