"""Nearest codebook entry: the argmin of vector quantisation without the matrix of distances.

``d = |x|^2 + |c|^2 - 2 x.c`` in float32, as in the quantisers of VQGAN and LlamaGen (arXiv:2406.06525); the first
minimum on ties. Letters: n vectors, V codes, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vargen.kernels.language import jit, tl, triton, use_triton

_CHUNK = 1 << 21  # distances held at a time by the reference: 8 MB


def nearest_code(x: Tensor, codebook: Tensor, l2_norm: bool = False) -> Tensor:
    """Index of the codebook entry nearest to every vector.

    Args:
        x: ``[n, C]`` of any floating type; computed in float32.
        codebook: ``[V, C]``.
        l2_norm: divide the vectors and the entries by their norms first.

    Returns:
        ``[n]`` int64 in [0, V); the first of equally near entries.

    Raises:
        ValueError: ``x`` and ``codebook`` are not matrices with the same number of channels.
    """
    if x.ndim != 2 or codebook.ndim != 2 or x.shape[1] != codebook.shape[1]:
        raise ValueError(f"need x [n, C] and codebook [V, C], got {list(x.shape)} and {list(codebook.shape)}")
    if use_triton(x) or torch.compiler.is_compiling():
        return _nearest(x, codebook, l2_norm)
    return _nearest_reference(x, codebook, l2_norm)


def _prepared(x: Tensor, l2_norm: bool) -> tuple[Tensor, Tensor]:
    x = x.detach().float()
    if l2_norm:
        x = torch.nn.functional.normalize(x, dim=-1)  # x / max(|x|, 1e-12)
    return x, x.square().sum(-1)


def _nearest_reference(x: Tensor, codebook: Tensor, l2_norm: bool) -> Tensor:
    x, size = _prepared(x, l2_norm)
    codebook, sizes = _prepared(codebook, l2_norm)
    nearest = torch.empty(len(x), dtype=torch.int64, device=x.device)
    step = max(1, _CHUNK // max(len(codebook), 1))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        distance = (size[part, None] + sizes).sub_(x[part] @ codebook.T, alpha=2)
        nearest[part] = distance.argmin(-1)
    return nearest


@jit
def _nearest_kernel(
    x_ptr,  # n C
    size_ptr,  # n
    codebook_ptr,  # V C
    sizes_ptr,  # V
    nearest_ptr,  # n
    n,
    V: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    size = tl.load(size_ptr + row, mask=row < n, other=0.0)
    best = tl.full([ROWS], float("inf"), tl.float32)
    nearest = tl.zeros([ROWS], tl.int64)
    for start in range(0, V, CODES):
        code = start + tl.arange(0, CODES)
        dot = tl.zeros([ROWS, CODES], tl.float32)
        for first in range(0, C, CHANNELS):
            at = first + channel
            x = tl.load(x_ptr + row[:, None] * C + at[None, :], mask=(row[:, None] < n) & (at[None, :] < C), other=0.0)
            c = tl.load(
                codebook_ptr + code[None, :] * C + at[:, None], mask=(code[None, :] < V) & (at[:, None] < C), other=0.0
            )
            dot += tl.dot(x, c, input_precision="ieee")
        distance = size[:, None] + tl.load(sizes_ptr + code, mask=code < V, other=float("inf"))[None, :] - 2.0 * dot
        value, place = tl.min(distance, 1, return_indices=True)  # the first of equals
        closer = value < best
        best = tl.where(closer, value, best)
        nearest = tl.where(closer, start + place, nearest)
    tl.store(nearest_ptr + row, nearest, mask=row < n)


@torch.library.custom_op("vargen::nearest", mutates_args=())
def _nearest(x: Tensor, codebook: Tensor, l2_norm: bool) -> Tensor:
    if not use_triton(x):
        return _nearest_reference(x, codebook, l2_norm)
    x, size = _prepared(x, l2_norm)
    codebook, sizes = _prepared(codebook, l2_norm)
    nearest = torch.empty(len(x), dtype=torch.int64, device=x.device)
    rows, codes = 64, 64
    _nearest_kernel[(triton.cdiv(len(x), rows),)](
        x.contiguous(),
        size,
        codebook.contiguous(),
        sizes,
        nearest,
        len(x),
        V=len(codebook),
        C=x.shape[1],
        ROWS=rows,
        CODES=codes,
        CHANNELS=min(max(triton.next_power_of_2(x.shape[1]), 16), 32),
        num_warps=8,
    )
    return nearest


@_nearest.register_fake
def _(x: Tensor, codebook: Tensor, l2_norm: bool) -> Tensor:
    return x.new_empty(len(x), dtype=torch.int64)
