"""The Inception network of FID (TensorFlow's 2015-12-05 graph) in the key layout of its well-known PyTorch port.

Built from torchvision's blocks with the three differences of that graph: average pools that do not count padding, a
max pool in the last block, and 1008 outputs. Weights are the user's file; see ``vargen.metrics.networks.registry``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.validation.extras import extra

with extra("eval", "the Inception network of FID"):
    from torchvision.models import inception as tv  # type: ignore[import-untyped]


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(tv.InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_average_pool(x))]


class _BlockC(tv.InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = x
        for i in range(1, 6):
            double = getattr(self, f"branch7x7dbl_{i}")(double)
        return [self.branch1x1(x), single, double, self.branch_pool(_average_pool(x))]


class _BlockE(tv.InceptionE):
    def __init__(self, in_channels: int, *, max_pool: bool) -> None:
        super().__init__(in_channels)
        self.max_pool = max_pool

    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average_pool(x)
        return [
            self.branch1x1(x),
            torch.cat([self.branch3x3_2a(single), self.branch3x3_2b(single)], 1),
            torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1),
            self.branch_pool(pooled),
        ]


def _network() -> nn.Module:
    # init_weights=False: the truncated normal of torchvision takes a minute and is overwritten anyway
    network: Any = tv.Inception3(num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
    network.Mixed_5b = _BlockA(192, pool_features=32)
    network.Mixed_5c = _BlockA(256, pool_features=64)
    network.Mixed_5d = _BlockA(288, pool_features=64)
    for name, width in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
        setattr(network, f"Mixed_6{name}", _BlockC(768, channels_7x7=width))
    network.Mixed_7b = _BlockE(1280, max_pool=False)
    network.Mixed_7c = _BlockE(2048, max_pool=True)
    return network


def resize_like_tensorflow1(x: Tensor, size: int) -> Tensor:
    """Bilinear resize of ``[B, C, H, W]`` as TensorFlow 1 did it: no half-pixel shift, no antialias (torch-fidelity)."""
    for dim in (2, 3):
        length = x.shape[dim]
        position = torch.arange(size, dtype=x.dtype, device=x.device) * (length / size)
        low = position.long().clamp_max(length - 1)
        weight = (position - low).view([size if d == dim else 1 for d in range(4)])
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(length - 1))
        x = a + (b - a) * weight
    return x


class InceptionBody(nn.Module):
    """Features of one layer: spatial means after the two max pools and Mixed_6e, the 2048-d pool, or logits.

    ``"spatial"`` is the layer of sFID (Nash et al., 2021, arXiv:2103.03841) as ADM's evaluator reads it: the first seven
    channels of mixed_6/conv at all 17 x 17 places.
    """

    dims = {"64": 64, "192": 192, "768": 768, "spatial": 2023, "2048": 2048, "logits_unbiased": 1008, "logits": 1008}  # noqa: RUF012

    def __init__(self, *, tap: str = "2048", antialias: bool = True) -> None:
        super().__init__()
        self.network, self.tap, self.antialias = _network(), tap, antialias

    def forward(self, pixels: Tensor) -> Tensor:
        """Return ``[B, dims[tap]]`` features of float pixels in [0, 255]."""
        net: Any = self.network
        if self.antialias:  # the resize of torchmetrics
            x = F.interpolate(pixels, (299, 299), mode="bilinear", antialias=True, align_corners=False)
        else:
            x = resize_like_tensorflow1(pixels, 299)
        x = (x - 128) / 128
        x = net.maxpool1(net.Conv2d_2b_3x3(net.Conv2d_2a_3x3(net.Conv2d_1a_3x3(x))))
        if self.tap == "64":
            return x.mean((2, 3))
        x = net.maxpool2(net.Conv2d_4a_3x3(net.Conv2d_3b_1x1(x)))
        if self.tap == "192":
            return x.mean((2, 3))
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e"):
            if self.tap == "spatial" and name == "6d":  # TensorFlow counts Mixed_5b as mixed, Mixed_6d as mixed_6
                return net.Mixed_6d.branch1x1(x)[:, :7].flatten(1)
            x = getattr(net, f"Mixed_{name}")(x)
        if self.tap == "768":
            return x.mean((2, 3))
        for name in ("7a", "7b", "7c"):
            x = getattr(net, f"Mixed_{name}")(x)
        x = x.mean((2, 3))
        if self.tap == "2048":
            return x
        # the FID graph's softmax has no bias: the Inception score uses these "unbiased" logits
        return F.linear(x, net.fc.weight) if self.tap == "logits_unbiased" else net.fc(x)
