"""Convolutional encoder and decoder of VQGAN-style tokenizers, with the module names of LlamaGen (arXiv:2406.06525).

The network is the one of taming transformers (arXiv:2012.09841). Attention sits at the lowest resolution only, chosen by
level and not by image size, so that any image whose sides are multiples of the downsample factor works.

Letters: b images, c channels, h w positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Attention = bool | Literal["mid"]
NORM_EPS = 1e-6  # of every GroupNorm in taming and LlamaGen


class ResBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm and SiLU in front, added to the (projected) input."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, in_channels, h, w]`` to ``[b, out_channels, h, w]``."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, added to the input."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, channels, NORM_EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, c, h, w]`` to the same shape."""
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # scale c^-1/2
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halve both sides: zero-pad right and bottom by one, then a 3x3 convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, c, h, w]`` to ``[b, c, h/2, w/2]``."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double both sides: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, c, h, w]`` to ``[b, c, 2h, 2w]``."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution: ResBlocks, each followed by attention if asked for, then a change of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_res_blocks: int,
        num_groups: int,
        dropout: float,
        attention: bool,
        resample: Literal["down", "up"] | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_res_blocks
        self.res = nn.ModuleList(ResBlock(widths[j], out_channels, num_groups, dropout) for j in range(num_res_blocks))
        self.attn = nn.ModuleList(AttnBlock(out_channels, num_groups) for _ in self.res) if attention else None
        if resample == "down":
            self.downsample = Downsample(out_channels)
        elif resample == "up":
            self.upsample = Upsample(out_channels)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, in_channels, h, w]`` to ``[b, out_channels, h', w']``."""
        for j, res in enumerate(self.res):
            x = res(x)
            if self.attn is not None:
                x = self.attn[j](x)
        if self.resample == "down":
            return self.downsample(x)
        return self.upsample(x) if self.resample == "up" else x


def _mid(channels: int, num_groups: int, dropout: float, attention: Attention) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResBlock(channels, channels, num_groups, dropout),
            AttnBlock(channels, num_groups)
            if attention
            else nn.Identity(),  # keeps the official index of the last block
            ResBlock(channels, channels, num_groups, dropout),
        ]
    )


class ConvEncoder(nn.Module):
    """Image to latents: one level for each multiplier, halving the resolution after every level but the last."""

    def __init__(
        self,
        in_channels: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        num_groups: int,
        dropout: float = 0.0,
        attention: Attention = True,
    ) -> None:
        super().__init__()
        widths = [base_channels * m for m in (1, *channel_multipliers)]
        last = len(channel_multipliers) - 1
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[i],
                widths[i + 1],
                num_res_blocks,
                num_groups,
                dropout,
                attention=attention is True and i == last,
                resample="down" if i < last else None,
            )
            for i in range(last + 1)
        )
        self.mid = _mid(widths[-1], num_groups, dropout, attention)
        self.norm_out = nn.GroupNorm(num_groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[b, in_channels, H, W]`` to ``[b, z_channels, h, w]``."""
        x = self.conv_in(images)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class ConvDecoder(nn.Module):
    """Latents to image: the encoder mirrored, with one ResBlock more at each level. Level 0 is the lowest resolution."""

    def __init__(
        self,
        out_channels: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        num_groups: int,
        dropout: float = 0.0,
        attention: Attention = True,
    ) -> None:
        super().__init__()
        widths = [base_channels * m for m in reversed(channel_multipliers)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = _mid(widths[0], num_groups, dropout, attention)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                widths[i],
                num_res_blocks + 1,
                num_groups,
                dropout,
                attention=attention is True and i == 0,
                resample="up" if i < last else None,
            )
            for i in range(last + 1)
        )
        self.norm_out = nn.GroupNorm(num_groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Map ``[b, z_channels, h, w]`` to ``[b, out_channels, H, W]``, unclamped."""
        x = self.conv_in(latents)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))
