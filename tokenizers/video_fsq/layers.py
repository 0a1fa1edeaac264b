"""Causal 3-D convolutions of MAGVIT-v2 (arXiv:2310.05737) as NBP writes them: no frame sees a later one.

Modules take ``(x, state)``. ``state`` is None for a whole clip, or a ``StreamState`` that carries the last frames of every
convolution from one piece of a clip to the next; the pieces then give the same numbers as the whole.

Letters: B clips, C channels, T frames, H W sides, k kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class StreamState:
    """What a stream of pieces leaves behind: the frames that convolutions still need, by module."""

    def __init__(self) -> None:
        self.frames: dict[int, Tensor] = {}  # id of a convolution -> [B, C, k - stride.., H, W]
        self.started: set[int] = set()  # ids of expansions that have dropped their first frames


class FlatConv3d(nn.Conv3d):
    """``nn.Conv3d`` whose kernels that are flat in time or space run as 2-D convolutions or matrix products.

    That is several times faster on a CPU. Borders are not padded.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` to ``[B, C', T', H', W']``."""
        (k, kh, kw), stride = self.kernel_size, self.stride
        if (k, stride[0]) == (1, 1) and (kh, kw) != (1, 1):
            return self._flat(x)
        if (kh, kw) == (1, 1) and stride == (1, 1, 1):
            return self._line(x, k)
        return super().forward(x)

    def _flat(self, x: Tensor) -> Tensor:
        """Frame by frame."""
        frames = rearrange(x, "b c t h w -> (b t) c h w")  # a view of channels-last clips
        y = F.conv2d(frames, self.weight[:, :, 0], self.bias, self.stride[1:])
        return rearrange(y, "(b t) c h w -> b c t h w", b=x.shape[0]) if len(x) else y

    def _line(self, x: Tensor, k: int) -> Tensor:
        """Pixel by pixel."""
        rows = rearrange(x, "b c t h w -> b t h w c")
        length = rows.shape[1] - k + 1
        near = torch.cat([rows[:, i : i + length] for i in range(k)], dim=-1) if k > 1 else rows
        weight = self.weight[..., 0, 0].transpose(1, 2).flatten(1)  # o (k c)
        return rearrange(F.linear(near, weight, self.bias), "b t h w c -> b c t h w")


class CausalConv3d(nn.Module):
    """Convolution that sees this frame and earlier ones; borders are replicated, in time on the left only."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.conv = FlatConv3d(in_channels, out_channels, kernel, stride)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """``[B, C, T, H, W]`` to ``[B, C', T', H', W']``; odd T with stride 2 gives (T + 1) / 2."""
        (k, kh, kw), stride = self.conv.kernel_size, self.conv.stride
        if k > 1:
            x = self._past(x, state, k, stride[0])
        if kh > 1 or kw > 1:
            x = (
                F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2, 0, 0), mode="replicate")
                if k > 1
                else _pad_frames(x, kh, kw)
            )
        return self.conv(x)

    def _past(self, x: Tensor, state: StreamState | None, k: int, stride: int) -> Tensor:
        """Put the frames before this piece in front of it."""
        past = None if state is None else state.frames.get(id(self))
        if past is None:
            past = x[:, :, :1].expand(-1, -1, k - 1, -1, -1)
        x = torch.cat([past, x], dim=2)
        if state is not None:
            state.frames[id(self)] = x[:, :, ((x.shape[2] - k) // stride + 1) * stride :].clone()
        return x


def _pad_frames(x: Tensor, kh: int, kw: int) -> Tensor:
    """Replicate the borders of each frame; channels-last clips stay views of frames."""
    frames = rearrange(x, "b c t h w -> (b t) c h w")
    frames = F.pad(frames, (kw // 2, kw // 2, kh // 2, kh // 2), mode="replicate")
    return frames.unflatten(0, (x.shape[0], -1) if len(x) else (0, x.shape[2])).transpose(1, 2)


class FrameNorm(nn.GroupNorm):
    """Group normalisation of each frame on its own."""

    def forward(self, x: Tensor, state: Any = None) -> Tensor:  # type: ignore[override]
        """Normalise ``[B, C, T, H, W]``."""
        y = super().forward(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(y, "(b t) c h w -> b c t h w", t=x.shape[2])


class Unnormed(nn.Module):
    """Stands where a norm would."""

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        """Return ``x``."""
        return x


class Swish(nn.Module):
    """``x * sigmoid(beta x)`` with a learned slope a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1, channels, 1, 1, 1))

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        """Map ``[B, C, T, H, W]``."""
        return x * torch.sigmoid(self.beta * x)


class Pointwise(nn.Conv3d):
    """A 1x1x1 convolution under its own name in the state dict."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor, state: Any = None) -> Tensor:  # type: ignore[override]
        """Map ``[B, C, T, H, W]`` pixel by pixel."""
        y = F.linear(rearrange(x, "b c t h w -> b t h w c"), self.weight.flatten(1), self.bias)
        return rearrange(y, "b t h w c -> b c t h w")


class ResidualUnit(nn.Module):
    """Norm, swish, convolution, twice, and a bypass.

    Args:
        in_channels: of the input.
        out_channels: of the output; a 1x1x1 convolution on the bypass where it differs.
        groups: of the norms; 0 = no norm.
        factorized: one convolution in space, one in time, instead of two in both.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, factorized: bool = False) -> None:
        super().__init__()
        kernels = [(1, 3, 3), (3, 1, 1)] if factorized else [(3, 3, 3), (3, 3, 3)]
        self.fn = nn.ModuleList(
            [
                make_norm(in_channels, groups),
                Swish(in_channels),
                CausalConv3d(in_channels, out_channels, kernels[0]),
                make_norm(out_channels, groups),
                Swish(out_channels),
                CausalConv3d(out_channels, out_channels, kernels[1]),
            ]
        )
        self.residual_fn = nn.ModuleList()
        if in_channels != out_channels:
            self.residual_fn.append(CausalConv3d(in_channels, out_channels, (1, 1, 1)))

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """``[B, C, T, H, W]`` to ``[B, C', T, H, W]``."""
        y = x
        for layer in self.fn:
            y = layer(y, state)
        for layer in self.residual_fn:
            x = layer(x, state)
        return x + y


class DepthToSpace(nn.Module):
    """Spread channels over a (time, height, width) block; the first frame of a clip stays one frame.

    Channel index = ((it * bh + ih) * bw + iw) * C + c.
    """

    def __init__(self, block: tuple[int, int, int]) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """``[B, bt * bh * bw * C, T, H, W]`` to ``[B, C, 1 + (T - 1) * bt, H * bh, W * bw]``; all T * bt later on."""
        i, j, k = self.block
        y = rearrange(x, "b (i j k c) t h w -> b (t i) (h j) (w k) c", i=i, j=j, k=k)
        if state is None or id(self) not in state.started:
            y = y[:, i - 1 :]
        if state is not None:
            state.started.add(id(self))
        return rearrange(y, "b t h w c -> b c t h w")


class SpaceToDepth(nn.Module):
    """Undo ``DepthToSpace``: the first frame of a clip is repeated to fill its block."""

    def __init__(self, block: tuple[int, int, int]) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """``[B, C, 1 + k * bt, H, W]`` to ``[B, bt * bh * bw * C, 1 + k, H / bh, W / bw]``."""
        i, j, k = self.block
        if state is None or id(self) not in state.started:
            x = torch.cat([x[:, :, :1].expand(-1, -1, i - 1, -1, -1), x], dim=2) if i > 1 else x
        if state is not None:
            state.started.add(id(self))
        y = rearrange(x, "b c (t i) (h j) (w k) -> b t h w (i j k c)", i=i, j=j, k=k)
        return rearrange(y, "b t h w c -> b c t h w")  # channels stay last in memory


def make_norm(channels: int, groups: int) -> nn.Module:
    """Per-frame norm in min(groups, channels) groups, none for 0."""
    return FrameNorm(min(groups, channels), channels, eps=1e-5) if groups else Unnormed()
