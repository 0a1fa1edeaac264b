"""From raw logits to the law that is sampled: guidance, temperature, top-k, top-p, in this order, in float32.

Ties with the k-th value are kept; top-p keeps the token at which the cumulative probability crosses p (the rules of
LlamaGen's sampler, arXiv:2406.06525). Letters: G guidance branches (conditional first), B images, W positions, V codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vargen.kernels import device as rows
from vargen.kernels.language import jit, launch_options, tl, use_triton

NEG_INF = float("-inf")


def warp_logits(
    logits: Tensor,
    *,
    guidance_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Log-weights of the law that is sampled.

    Args:
        logits: ``[G, B, W, V]`` of any floating type; G = 1 without, 2 with guidance.
        guidance_scale: s in ``u + s * (c - u)``; a number or ``[B]``. Ignored when G = 1.
        temperature: positive; 0 keeps the guided logits as they are (callers take the argmax).
        top_k: how many codes to keep, 0 for all.
        top_p: probability mass to keep, in (0, 1].

    Returns:
        ``[B, W, V]`` float32, removed codes at -inf.
    """
    if not (use_triton(logits) or torch.compiler.is_compiling()):
        return _warp_twin(logits, guidance_scale, temperature, top_k, top_p)
    per_image = guidance_scale.to(logits.device) if isinstance(guidance_scale, Tensor) else None
    scale = 1.0 if isinstance(guidance_scale, Tensor) else float(guidance_scale)
    return _warp(logits, scale, per_image, float(temperature), top_k, float(top_p))


def _warp_twin(logits: Tensor, guidance_scale: float | Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    z = combine(logits, guidance_scale, temperature)
    tau = threshold(z, top_k, top_p) if temperature else None
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
    """Smallest value kept, ``[...]`` float32 for ``z [..., V]``, or ``None`` when nothing is removed."""
    num_codes = z.shape[-1]
    sparse = 0 < top_k < num_codes
    if not sparse and top_p >= 1:
        return None
    if top_p >= 1:
        return _kth_largest(z, top_k)
    ordered = _descending(z)
    if sparse:
        ordered, kept = ordered[..., :top_k], z.masked_fill(z < ordered[..., top_k - 1, None], NEG_INF)
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
    logits_ptr,  # G B W V
    stride_g,
    stride_b,
    stride_w,
    scales_ptr,  # B, if PER_IMAGE
    scale,
    inv_t,
    k,
    top_p,
    V,
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
    if PER_IMAGE:
        scale = tl.load(scales_ptr + b)
    cond = logits_ptr + b * stride_b + w * stride_w
    uncond = cond + stride_g
    z = rows.load_tile(cond, uncond, scale, inv_t, 0, V, GUIDED, BLOCK)
    tau, _ = rows.row_stats(z, cond, uncond, scale, inv_t, V, k, top_p, GUIDED, SPARSE, NUCLEUS, BLOCK, TILES)
    for piece in range(PIECES):
        x = rows.load_tile(cond, uncond, scale, inv_t, piece, V, GUIDED, PIECE)
        code = piece * PIECE + tl.arange(0, PIECE)
        tl.store(out_ptr + (b * W + w) * V + code, tl.where(x >= tau, x, float("-inf")), mask=code < V)


@torch.library.custom_op("vargen::warp", mutates_args=())
def _warp(logits: Tensor, scale: float, scales: Tensor | None, temperature: float, top_k: int, top_p: float) -> Tensor:
    if not use_triton(logits):
        z = _warp_twin(logits, scale if scales is None else scales, temperature, top_k, top_p)
        return z.clone() if z.data_ptr() == logits.data_ptr() else z  # an operator may not return its argument
    branches, batch, window, num_codes = logits.shape
    out = torch.empty(batch, window, num_codes, dtype=torch.float32, device=logits.device)
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    _warp_kernel[(window, batch)](
        logits,
        *logits.stride()[:3],
        logits if scales is None else scales.float().contiguous(),
        scale,
        1.0 / temperature if temperature else 1.0,
        top_k,
        top_p,
        num_codes,
        out,
        window,
        GUIDED=branches == 2,
        PER_IMAGE=scales is not None,
        SPARSE=temperature > 0 and 0 < top_k < num_codes,
        NUCLEUS=temperature > 0 and top_p < 1,
        **launch_options(num_codes),
    )
    return out


@_warp.register_fake
def _(logits: Tensor, *settings: Any) -> Tensor:
    return logits.new_empty(logits.shape[1:], dtype=torch.float32)
