"""I3D of FVD (Carreira and Zisserman, 2017, arXiv:1705.07750): Inception-v1 in three dimensions, Kinetics-400 logits.

An eager definition in the key layout of the open port ``i3d_pretrained_400.pt``. Weights are the user's file.

Letters: B clips, T frames, H W sides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_FRAMES = 9  # with fewer, one step in time is left, and the last pool needs two
_MIXED = {  # name -> input channels, then widths of b0, b1a, b1b, b2a, b2b, b3b
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}
_POOLS = {"Mixed_4b": (3, 2), "Mixed_5b": (2, 2)}  # kernel and stride of the pool in front


def same_padding(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Pad ``[B, C, T, H, W]`` with zeros as TensorFlow's "SAME" does: the odd pixel at the end."""
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        missing = max(k - s if size % s == 0 else k - size % s, 0)
        pads += [missing // 2, missing - missing // 2]
    return F.pad(x, pads)


def _pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return F.max_pool3d(same_padding(x, kernel, stride), kernel, stride)  # what it pools is never negative


class Unit3D(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, outputs, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` to ``[B, C', ...]``, sides divided by the stride, rounded up."""
        k, s = self.conv3d.kernel_size, self.conv3d.stride
        return F.relu(self.bn(self.conv3d(same_padding(x, k, s))))


class Logits(nn.Module):
    """The last convolution, with bias and nothing else."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, ...]`` to ``[B, C', ...]``."""
        return self.conv3d(x)


class Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(self, channels: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = Unit3D(channels, b0)
        self.b1a, self.b1b = Unit3D(channels, b1a), Unit3D(b1a, b1b, 3)
        self.b2a, self.b2b = Unit3D(channels, b2a), Unit3D(b2a, b2b, 3)
        self.b3b = Unit3D(channels, b3b)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` to the concatenation of the branches."""
        pooled = _pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class I3D(nn.Module):
    """Clips to the 400 logits of Kinetics, averaged over time; 12.71M numbers in 344 entries.

    Args:
        num_classes: 400 in the published weights.
    """

    def __init__(self, num_classes: int = 400) -> None:
        super().__init__()
        self.num_features = num_classes
        self.Conv3d_1a_7x7 = Unit3D(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit3D(64, 64)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, 3)
        for name, (channels, widths) in _MIXED.items():
            setattr(self, name, Mixed(channels, widths))
        self.logits = Logits(1024, num_classes)

    def forward(self, clips: Tensor) -> Tensor:
        """``[B, 3, T, 224, 224]`` in [-1, 1], T >= 9, to ``[B, num_classes]``.

        Raises:
            ValueError: wrong shape or too few frames.
        """
        if clips.ndim != 5 or clips.shape[1] != 3 or tuple(clips.shape[3:]) != (224, 224):
            raise ValueError(f"I3D reads [B, 3, T, 224, 224], got {tuple(clips.shape)}")
        if clips.shape[2] < MIN_FRAMES:
            raise ValueError(f"I3D needs at least {MIN_FRAMES} frames, got {clips.shape[2]}; give longer clips")
        x = _pool(self.Conv3d_1a_7x7(clips), (1, 3, 3), (1, 2, 2))
        x = _pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name in _MIXED:
            if name in _POOLS:
                kernel, stride = _POOLS[name]
                x = _pool(x, (kernel,) * 3, (stride,) * 3)
            x = getattr(self, name)(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return self.logits(x).flatten(2).mean(2)
