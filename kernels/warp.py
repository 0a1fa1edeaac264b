"""From raw logits to the distribution that is sampled: guidance, temperature, top-k, top-p, in this order, in float32.

Ties with the k-th value are kept; top-p keeps the token at which the cumulative probability crosses p (the rules of
LlamaGen's sampler, arXiv:2406.06525). Letters: G guidance branches (conditional first), B images, W positions, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vargen.kernels import device as row_functions
from vargen.kernels.language import jit, launch_options, tl, use_triton

NEG_INF = float("-inf")


@dataclass(frozen=True)
class WarpSettings:
    """The settings of ``warp_logits``; temperature 0 is greedy, a negative ``top_k`` counts after top-p."""

    guidance_scale: float | Tensor = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def flat(self, device: torch.device) -> tuple[float, Tensor | None, float, int, float]:
        """Arguments of an operator: scale, scales (None if there is one for all), temperature, top-k, top-p."""
        scale = self.guidance_scale
        of_all, each = (1.0, scale.to(device)) if isinstance(scale, Tensor) else (float(scale), None)
        return of_all, each, float(self.temperature), self.top_k, float(self.top_p)

    @classmethod
    def of_flat(
        cls, scale: float, scales: Tensor | None, temperature: float, top_k: int, top_p: float
    ) -> WarpSettings:
        """Inverse of ``flat``."""
        return cls(scale if scales is None else scales, temperature, top_k, top_p)

    def row_arguments(self, logits: Tensor) -> dict[str, Any]:
        """Arguments of kernels that read rows of ``logits [G, B, W, V]``, whose codes lie next to each other."""
        num_codes, scale = logits.shape[-1], self.guidance_scale
        per_image = isinstance(scale, Tensor)
        scales = scale.float().contiguous() if isinstance(scale, Tensor) else logits
        inverse = 1.0 / self.temperature if self.temperature else 1.0
        return {
            "logits": row_functions.Logits(logits, *logits.stride()[:3]),
            "warp": row_functions.Warp(scales, 1.0 if per_image else scale, inverse, self.top_p, num_codes),
            "GUIDED": logits.shape[0] == 2,
            "PER_IMAGE": per_image,
            **launch_options(num_codes),
        }

    def search_arguments(self, num_codes: int) -> dict[str, Any]:
        """Further arguments of those that look for thresholds."""
        sampled = self.temperature > 0
        return {
            "k": self.top_k,
            "SPARSE": sampled and 0 < abs(self.top_k) < num_codes,
            "NUCLEUS": sampled and self.top_p < 1,
        }


def dense_rows(logits: Tensor) -> Tensor:
    """The same logits with codes next to each other."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def warp_logits(
    logits: Tensor,
    *,
    guidance_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Log-weights of the distribution that is sampled.

    Args:
        logits: ``[G, B, W, V]`` of any floating type; G = 1 without, 2 with guidance.
        guidance_scale: s in ``u + s * (c - u)``; a number or ``[B]``. Ignored when G = 1.
        temperature: positive; 0 keeps the guided logits as they are (callers take the argmax).
        top_k: how many codes to keep, 0 for all.
        top_p: probability mass to keep, in (0, 1].

    Returns:
        ``[B, W, V]`` float32, removed codes at -inf.
    """
    settings = WarpSettings(guidance_scale, temperature, top_k, top_p)
    if not (use_triton(logits) or torch.compiler.is_compiling()):
        return _warp_reference(logits, settings)
    return _warp(logits, *settings.flat(logits.device))


def _warp_reference(logits: Tensor, settings: WarpSettings) -> Tensor:
    z = combine(logits, settings.guidance_scale, settings.temperature)
    tau = threshold(z, settings.top_k, settings.top_p) if settings.temperature else None
    return z if tau is None else z.masked_fill(z < tau[..., None], NEG_INF)


def combine(logits: Tensor, guidance_scale: float | Tensor, temperature: float) -> Tensor:
    """Guidance and temperature only: ``[G, B, ..., V]`` -> ``[B, ..., V]`` float32 (a new tensor unless it is a no-op)."""
    z = logits[0].float()
    if logits.shape[0] == 2:
        u = logits[1].float()
        scale: float | Tensor
        if isinstance(guidance_scale, Tensor):
            scale = guidance_scale.to(z).view(-1, *[1] * (z.ndim - 1))
        else:
            scale = guidance_scale
        guided = (z - u).mul_(scale).add_(u)
        # a code masked in both branches gives -inf - -inf; masked in the conditional one means removed
        z = guided.masked_fill_(z == NEG_INF, NEG_INF) if _any_masked(z) else guided
    if temperature not in (0, 1):
        z = z * (1.0 / temperature)
    return z


def _any_masked(z: Tensor) -> bool:
    return z.is_cuda or not bool(z.amin() > NEG_INF)  # NaN elsewhere must not hide a mask


def threshold(z: Tensor, top_k: int, top_p: float) -> Tensor | None:
    """Smallest value kept, ``[...]`` float32 for ``z [..., V]``, or ``None`` when nothing is removed.

    ``top_k = -k`` measures top-p on the whole distribution and keeps of its codes the k likeliest.
    """
    num_codes, top_p_first, top_k = z.shape[-1], top_k < 0, abs(top_k)
    sparse = 0 < top_k < num_codes
    if not sparse and top_p >= 1:
        return None
    if top_p >= 1:
        return _kth_largest(z, top_k)
    ordered = _descending(z)
    if sparse:
        ordered, cut = ordered[..., :top_k], ordered[..., top_k - 1, None]
        kept = z if top_p_first else z.masked_fill(z < cut, NEG_INF)
    else:
        kept = z
    total = torch.logsumexp(
        kept, -1, keepdim=True
    )  # ties with the k-th value count, though `ordered` ends before them
    before = (ordered - total).exp_().cumsum_(-1).roll(1, -1)
    before[..., 0] = 0.0
    last = (before <= top_p).sum(-1, keepdim=True) - 1  # `before` rises, so these form a prefix
    return ordered.gather(-1, last.clamp_(min=0)).squeeze(-1)


def _kth_largest(z: Tensor, k: int) -> Tensor:
    if z.is_cuda:
        return torch.topk(z, k, sorted=False).values.amin(-1)
    # numpy selects with vector instructions: 10 to 20 times faster than torch.topk on a CPU
    place = z.shape[-1] - k
    return torch.from_numpy(np.partition(z.detach().numpy(), place, axis=-1)[..., place].copy())


def _descending(z: Tensor) -> Tensor:
    if z.is_cuda:
        return z.sort(-1, descending=True).values
    return torch.from_numpy(np.sort(z.detach().numpy(), axis=-1)).flip(-1)


@jit(do_not_specialize=["k"])
def _warp_kernel(
    logits,  # device.Logits
    warp,  # device.Warp
    k,
    out_ptr,  # B W V
    W,
    GUIDED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    SPARSE: tl.constexpr,
    NUCLEUS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    w = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    row = row_functions.row_at(logits, warp, b, w, PER_IMAGE)
    z = row_functions.load_tile(row, 0, GUIDED, BLOCK)
    tau, _ = row_functions.row_stats(z, row, k, warp.top_p, GUIDED, SPARSE, NUCLEUS, BLOCK, TILES)
    for piece in range(PIECES):
        x = row_functions.load_tile(row, piece, GUIDED, PIECE)
        code = piece * PIECE + tl.arange(0, PIECE)
        tl.store(out_ptr + (b * W + w) * warp.V + code, tl.where(x >= tau, x, float("-inf")), mask=code < warp.V)


@torch.library.custom_op("vargen::warp", mutates_args=())
def _warp(logits: Tensor, scale: float, scales: Tensor | None, temperature: float, top_k: int, top_p: float) -> Tensor:
    settings = WarpSettings.of_flat(scale, scales, temperature, top_k, top_p)
    if not use_triton(logits):
        z = _warp_reference(logits, settings)
        return z.clone() if z.data_ptr() == logits.data_ptr() else z  # an operator may not return its argument
    _, batch, window, num_codes = logits.shape
    out = torch.empty(batch, window, num_codes, dtype=torch.float32, device=logits.device)
    arguments = settings.row_arguments(dense_rows(logits)) | settings.search_arguments(num_codes)
    _warp_kernel[(window, batch)](out_ptr=out, W=window, **arguments)
    return out


@_warp.register_fake
def _(logits: Tensor, *settings: Any) -> Tensor:
    return logits.new_empty(logits.shape[1:], dtype=torch.float32)
