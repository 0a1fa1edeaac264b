"""Draw codes from logits: guidance, temperature, top-k, top-p and a Gumbel argmax in one operation.

The noise is the counter-based Gumbel row of ``vargen.random``, so a draw depends on the image's seed and the code's
position only. Letters: G guidance branches (conditional first), B images, W positions, V codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vargen.kernels import device as rows
from vargen.kernels.language import jit, tl, use_triton
from vargen.kernels.warp import NEG_INF, WarpSettings, combine, dense_rows, threshold
from vargen.random import Stream, gumbel

NO_ERROR = (1 << 62) - 1  # what an entry of an error record holds while all rows were good


def _draw_reference(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    settings: WarpSettings,
    stream: int,
    iteration: Tensor | None,
    noise: Tensor | None,
) -> Tensor:
    z = combine(logits, settings.guidance_scale, settings.temperature)
    if settings.temperature == 0:
        best, codes = z.max(-1)
    else:
        tau = threshold(z, settings.top_k, settings.top_p)
        if noise is None:
            score = gumbel(seeds, positions, z.shape[-1], stream, iteration).add_(z)
        else:
            score = z + noise
        if tau is not None:
            score.masked_fill_(z < tau[..., None], NEG_INF)
        best, codes = score.max(-1)
    raise_bad_rows(~best.isfinite(), positions)
    return codes


@jit(do_not_specialize=["k", "stream"])
def _draw_kernel(
    logits,  # device.Logits
    warp,  # device.Warp
    k,
    seeds_ptr,  # B
    positions_ptr,  # B W
    stream,
    iteration_ptr,  # B, if STEPPED
    noise_ptr,  # B W V, if GIVEN
    codes_ptr,  # B W
    errors_ptr,  # B
    W,
    GUIDED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    SPARSE: tl.constexpr,
    NUCLEUS: tl.constexpr,
    GREEDY: tl.constexpr,
    STEPPED: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    w = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    row = rows.row_at(logits, warp, b, w, PER_IMAGE)
    position = tl.load(positions_ptr + b * W + w)
    z = rows.load_tile(row, 0, GUIDED, BLOCK)
    tau, lse = rows.row_stats(z, row, k, warp.top_p, GUIDED, SPARSE, NUCLEUS, BLOCK, TILES)
    best = float("-inf")
    code = 0
    for piece in range(PIECES):
        x = rows.load_tile(row, piece, GUIDED, PIECE)
        if not GREEDY:
            if GIVEN:
                at = piece * PIECE + tl.arange(0, PIECE)
                g = tl.load(noise_ptr + (b * W + w) * warp.V + at, mask=at < warp.V, other=0.0)
            else:
                step = position * 0
                if STEPPED:
                    step = tl.load(iteration_ptr + b)
                g = rows.gumbel_tile(tl.load(seeds_ptr + b), position, stream, step, piece, PIECE)
            x = tl.where(x >= tau, x + g, float("-inf"))
        best, code = rows.better(best, code, x, piece, PIECE)
    tl.store(codes_ptr + b * W + w, code)
    if (lse == float("inf")) | (lse == float("-inf")):
        tl.atomic_min(errors_ptr + b, position)


def draw(
    logits: Tensor,
    *,
    seeds: Tensor,
    positions: Tensor,
    guidance_scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stream: Stream | int = Stream.GUMBEL,
    iteration: Tensor | None = None,
    noise: Tensor | None = None,
    errors: Tensor | None = None,
) -> Tensor:
    """Draw one code per row.

    Args:
        logits: ``[G, B, W, V]``, float32, float16 or bfloat16; any strides, contiguous in V.
        seeds: ``[B]`` int64.
        positions: ``[B, W]`` int64, the code position that each row predicts.
        guidance_scale, temperature, top_k, top_p: as in :func:`vargen.kernels.warp.warp_logits`; temperature 0 takes
            the argmax of the guided logits.
        stream: stream of the noise.
        iteration: ``[B]`` int64 where the stream has iterations.
        noise: ``[B, W, V]`` float32 Gumbel noise to use in place of Philox.
        errors: record from :func:`new_errors`. On a CUDA device bad rows are noted there (and draw code 0) without
            waiting for the device; ask it with :func:`raise_errors` when the decode ends. Without a record, and on the
            CPU, a bad row raises at once.

    Returns:
        ``[B, W]`` int64 codes.

    Raises:
        ValueError: a row is NaN, infinite or -inf everywhere (names image and position).
    """
    check_logits(logits)
    settings = WarpSettings(guidance_scale, temperature, top_k, top_p)
    noised = (int(stream), iteration, noise)
    # an operator's bookkeeping costs tens of microseconds
    if not (use_triton(logits) or torch.compiler.is_compiling()):
        return _draw_reference(logits, seeds, positions, settings, *noised)
    record = new_errors(logits.shape[1], logits.device) if errors is None else errors
    codes = _draw(logits, seeds, positions, record, *settings.flat(logits.device), *noised)
    if errors is None and use_triton(logits):
        raise_errors(record)
    return codes


@torch.library.custom_op("vargen::draw", mutates_args=("errors",))
def _draw(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    errors: Tensor,
    scale: float,
    scales: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    stream: int,
    iteration: Tensor | None,
    noise: Tensor | None,
) -> Tensor:
    settings = WarpSettings.of_flat(scale, scales, temperature, top_k, top_p)
    if not use_triton(logits):
        return _draw_reference(logits, seeds, positions, settings, stream, iteration, noise)
    _, batch, window, num_codes = logits.shape
    codes = torch.empty(batch, window, dtype=torch.int64, device=logits.device)
    _draw_kernel[(window, batch)](
        seeds_ptr=seeds.contiguous(),
        positions_ptr=positions.contiguous(),
        stream=stream,
        iteration_ptr=seeds if iteration is None else iteration.contiguous(),
        noise_ptr=logits if noise is None else noise.float().contiguous(),
        codes_ptr=codes,
        errors_ptr=errors,
        W=window,
        GREEDY=temperature == 0,
        STEPPED=iteration is not None,
        GIVEN=noise is not None,
        **settings.row_arguments(dense_rows(logits)),
        **settings.search_arguments(num_codes),
    )
    return codes


@_draw.register_fake
def _(logits: Tensor, seeds: Tensor, positions: Tensor, errors: Tensor, *settings: Any) -> Tensor:
    return torch.empty_like(positions)


def new_errors(batch: int, device: torch.device | str | None = None) -> Tensor:
    """Record ``[B]`` int64 of the first position of every image at which a row was bad; none so far."""
    return torch.full((batch,), NO_ERROR, dtype=torch.int64, device=device)


def raise_errors(errors: Tensor) -> None:
    """Raise for the first bad row in a record; waits for the device."""
    bad = errors < NO_ERROR
    if bad.any():
        image = int(bad.nonzero()[0])
        _raise_bad_row(image, int(errors[image]))


def raise_bad_rows(bad: Tensor, positions: Tensor) -> None:
    """Raise for the first row ``[B, W]`` marked bad."""
    if bad.any():
        image, column = bad.nonzero()[0].tolist()
        _raise_bad_row(image, int(positions[image, column]))


def _raise_bad_row(image: int, position: int) -> None:
    raise ValueError(
        f"logits of image {image} at position {position} are NaN, infinite or -inf everywhere; "
        "check the weights, the precision and the guidance scale"
    )


def check_logits(logits: Tensor) -> None:
    """Check rank, branches and type of ``[G, B, W, V]`` logits."""
    if logits.ndim != 4 or logits.shape[0] not in (1, 2):
        raise ValueError(f"logits must be [G, B, W, V] with G = 1 or 2, got {list(logits.shape)}")
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"logits must be float32, float16 or bfloat16, got {logits.dtype}")
