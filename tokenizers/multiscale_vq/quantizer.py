"""The residual quantizer over scales of VAR (Tian et al., 2024, arXiv:2404.02905, algorithms 1 and 2).

Each scale quantizes what the coarser ones left over: the residual is shrunk to the scale, every position takes the nearest
code of one shared codebook, and the codes are enlarged again, convolved (phi) and subtracted. The sum of all scales is
what the decoder reads. Parameter names are those of the published checkpoints.

Letters: B images, K scales, (h_k, w_k) size of scale k, n_k = h_k w_k, V codes, C channels of a code, h w the last scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vargen.hooks import execution_device
from vargen.kernels.nearest import nearest_code
from vargen.outputs import pytree
from vargen.validation.checks import check_scales, pair_of

Scales = tuple[tuple[int, int], ...]
UPSAMPLE = ("bicubic", "bilinear", "nearest")
IDENTITY_PHI = 1e-6  # a mixing ratio below it leaves phi out, as in the official code


def read_scales(scales: Sequence[int | Sequence[int]]) -> Scales:
    """Turn sides or (height, width) pairs into pairs.

    Raises:
        ValueError: no scales, sizes below 1, or a scale larger than the last one.
    """
    return tuple(map(pair_of, check_scales("scales", scales)))


class Phi(nn.Conv2d):
    """``(1 - r) h + r conv(h)``: what interpolation loses, a 3x3 convolution may restore."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__(dim, dim, 3, padding=1)
        self.ratio = abs(ratio)

    def forward(self, h: Tensor) -> Tensor:
        """Map ``[B, C, h, w]`` float32 to the same shape, in float32 whatever the dtype of the weights."""
        return h * (1 - self.ratio) + F.conv2d(h, self.weight.float(), self.bias.float(), padding=1) * self.ratio  # type: ignore[union-attr]


def phi_index(num_scales: int, num_phi: int) -> list[int]:
    """Which of ``num_phi`` kernels serves each scale: the tick nearest to ``k / (K - 1)``, the first on ties.

    Two scales of the published list are ties that rounding decides, so the float64 arithmetic is part of the definition.

    >>> phi_index(10, 4)
    [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    """
    edge = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    step = (1 - edge - edge) / max(num_phi - 1, 1)
    ticks = [edge + i * step for i in range(num_phi)]  # the numbers of numpy.linspace, which compilers cannot follow
    ticks[-1] = 1 - edge if num_phi > 1 else edge
    places = [k / (num_scales - 1) if num_scales > 1 else 0.0 for k in range(num_scales)]
    return [min(range(num_phi), key=lambda i: abs(ticks[i] - place)) for place in places]


class _SharedPhi(nn.Module):
    """Holds the kernels under the official names: ``qresi`` for one, ``qresi_ls`` for several."""

    def __init__(self, dim: int, ratio: float, num_phi: int) -> None:
        super().__init__()
        if num_phi == 1:
            self.qresi = Phi(dim, ratio)
        else:
            self.qresi_ls = nn.ModuleList(Phi(dim, ratio) for _ in range(num_phi))

    def __getitem__(self, index: int) -> nn.Module:
        return self.qresi if hasattr(self, "qresi") else self.qresi_ls[index]


@pytree
@dataclass
class ScaleQuantizerOutput:
    """Result of ``ScaleQuantizer.forward``."""

    codes: list[Tensor]  # K times [B, n_k] int64, row-major
    latents: Tensor  # [B, C, h, w] sum of all scales; in training mode with the straight-through gradient
    loss: Tensor | None = None  # [] in training mode


class ScaleQuantizer(nn.Module):
    """Quantize feature maps scale by scale. Arithmetic is float32 whatever the dtype of the model.

    Args:
        codebook_size: V.
        codebook_dim: C.
        scales: default (h_k, w_k), the last one is the size of the feature map.
        beta: weight of the commitment term of the loss.
        znorm: look codes up by direction (the un-normalised code is still what is summed).
        phi_ratio: r of ``Phi``; 0 leaves phi out.
        num_phi: kernels shared by the scales; 0 gives every scale its own.
        upsample: ``"bicubic"`` (published), ``"bilinear"`` or ``"nearest"``.
        residual: each scale quantizes what the coarser ones left over, and all are summed (published). Otherwise each
            quantizes the features themselves, shrunk to it, and replaces the coarser ones: a pyramid.
    """

    ema_vocab_hit_SV: Tensor

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        scales: Scales,
        beta: float = 0.25,
        znorm: bool = False,
        phi_ratio: float = 0.5,
        num_phi: int = 4,
        upsample: str = "bicubic",
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.scales, self.beta, self.znorm, self.num_phi, self.upsample = scales, beta, znorm, num_phi, upsample
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        self.quant_resi: nn.Module | None = None
        if abs(phi_ratio) > IDENTITY_PHI:
            if num_phi == 0:
                self.quant_resi = nn.ModuleList(Phi(codebook_dim, phi_ratio) for _ in scales)
            else:
                self.quant_resi = _SharedPhi(codebook_dim, phi_ratio, num_phi)
        # how often each code is taken at each scale, a moving average over training steps; stored in checkpoints
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(scales), codebook_size))
        # a tensor: a number would be a constant of a compiled step, which would be compiled anew in every step
        self._num_records = torch.zeros((), dtype=torch.int64, device="cpu")

    def phi(self, h: Tensor, k: int, num_scales: int) -> Tensor:
        """Apply the kernel of scale k of K."""
        if self.quant_resi is None:
            return h
        num_phi = self.num_phi or len(self.scales)
        return self.quant_resi[phi_index(num_scales, num_phi)[k]](h)  # type: ignore[index]

    @property
    def codebook(self) -> Tensor:
        """``[V, C]`` all code vectors, read by a call of the table so that hooks around it fire."""
        return self.embedding(torch.arange(self.embedding.num_embeddings, device=execution_device(self.embedding)))

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes ``[...]`` to vectors ``[..., C]`` float32."""
        return self.embedding(codes).float()

    def nearest(self, vectors: Tensor) -> Tensor:
        """Nearest code of each row ``[n, C]``: ``[n]`` int64, the first on ties."""
        x, codebook = vectors.detach().float(), self.codebook.detach().float()
        if self.znorm:
            return (F.normalize(x, dim=-1) @ F.normalize(codebook, dim=-1).T).argmax(-1)
        return nearest_code(x, codebook)

    def enlarge(self, vectors: Tensor, k: int, scales: Scales) -> Tensor:
        """Vectors of scale k, ``[B, n_k, C]``, to their part of the sum, ``[B, C, h, w]``."""
        h = rearrange(vectors, "b (h w) c -> b c h w", h=scales[k][0])
        if k < len(scales) - 1:  # the last scale is not interpolated; the others are, even at full size
            align = {} if self.upsample == "nearest" else {"align_corners": False}
            h = F.interpolate(h, size=scales[-1], mode=self.upsample, **align)
        return self.phi(h, k, len(scales))

    def accumulate(self, total: Tensor, vectors: Tensor, k: int, scales: Scales) -> Tensor:
        """Add the vectors ``[B, n_k, C]`` of scale k to the sum of the coarser ones, ``[B, C, h, w]``."""
        part = self.enlarge(vectors, k, scales)
        return total + part if self.residual else part

    @staticmethod
    def shrink(features: Tensor, size: tuple[int, int]) -> Tensor:
        """Average a map ``[B, C, h, w]`` over the cells of a scale and flatten it: ``[B, n_k, C]``."""
        if size != tuple(features.shape[-2:]):
            features = F.interpolate(features, size=size, mode="area")
        return rearrange(features, "b c h w -> b (h w) c")

    def forward(self, features: Tensor, scales: Scales | None = None) -> ScaleQuantizerOutput:
        """Quantize ``[B, C, h, w]``; in training mode also measure the loss and record the use of codes.

        The loss is the mean over scales of ``beta * |sg(sum_k) - f|^2 + |sum_k - sg(f)|^2``; it alone moves codes and phi.
        """
        scales = self.scales if scales is None else scales
        with torch.autocast(features.device.type, enabled=False):
            f = features.float()
            rest, total = f.detach(), torch.zeros_like(f)
            codes, loss = [], f.new_zeros(())
            for k, size in enumerate(scales):
                z = self.shrink(rest, size)
                picked = self.nearest(z.flatten(0, 1)).view(z.shape[:2])
                part = self.enlarge(self.lookup(picked), k, scales)
                total = total + part if self.residual else part
                rest = rest - part.detach() if self.residual else rest
                codes.append(picked)
                if self.training:
                    loss = loss + self.beta * F.mse_loss(total.detach(), f) + F.mse_loss(total, f.detach())
            if not self.training:
                return ScaleQuantizerOutput(codes, total.to(features.dtype))
            self._record(codes)
            straight = total.detach() - f.detach() + f
        return ScaleQuantizerOutput(codes, straight.to(features.dtype), loss / len(scales))

    @torch.no_grad()
    def _record(self, codes: list[Tensor]) -> None:
        count = self._num_records
        keep = torch.where(count == 0, 0.0, torch.where(count < 100, 0.9, 0.99)).to(self.ema_vocab_hit_SV)
        for k, picked in enumerate(codes[: len(self.ema_vocab_hit_SV)]):
            hits = torch.zeros_like(self.ema_vocab_hit_SV[k])
            hits.scatter_add_(0, picked.flatten(), torch.ones_like(picked.flatten(), dtype=hits.dtype))
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(hits)
            self.ema_vocab_hit_SV[k].mul_(keep).add_(hits * (1 - keep))
        self._num_records += 1

    def residuals(self, features: Tensor, exact: bool = False) -> list[Tensor]:
        """What each default scale has to quantize, ``[n, C]`` float32; ``exact`` pretends that codes lose nothing."""
        rest, found = features.detach().float(), []
        for k, size in enumerate(self.scales):
            z = self.shrink(rest, size)
            found.append(z.flatten(0, 1))
            vectors = z if exact else self.lookup(self.nearest(found[-1])).view_as(z)
            rest = rest - self.enlarge(vectors, k, self.scales) if self.residual else rest
        return found
