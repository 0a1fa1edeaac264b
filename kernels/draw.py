"""Draw codes from logits: guidance, temperature, top-k, top-p and a Gumbel argmax in one operation.

The noise is the counter-based Gumbel row of ``vargen.random``, so a draw depends on the image's seed and the code's
position only. Letters: G guidance branches (conditional first), B images, W positions, V codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vargen.kernels.warp import NEG_INF, combine, threshold
from vargen.random import Stream, gumbel


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

    Returns:
        ``[B, W]`` int64 codes.

    Raises:
        ValueError: a row is NaN, infinite or -inf everywhere (names image and position).
    """
    check_logits(logits)
    return _draw_twin(
        logits, seeds, positions, guidance_scale, temperature, top_k, top_p, int(stream), iteration, noise
    )


def _draw_twin(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    guidance_scale: float | Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    stream: int,
    iteration: Tensor | None,
    noise: Tensor | None,
) -> Tensor:
    z = combine(logits, guidance_scale, temperature)
    if temperature == 0:
        best, codes = z.max(-1)
    else:
        tau = threshold(z, top_k, top_p)
        if noise is None:
            score = gumbel(seeds, positions, z.shape[-1], stream, iteration).add_(z)
        else:
            score = z + noise
        if tau is not None:
            score.masked_fill_(z < tau[..., None], NEG_INF)
        best, codes = score.max(-1)
    raise_bad_rows(~best.isfinite(), positions)
    return codes


def raise_bad_rows(bad: Tensor, positions: Tensor) -> None:
    """Raise for the first row ``[B, W]`` marked bad."""
    if bad.any():
        image, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"logits of image {image} at position {int(positions[image, column])} are NaN, infinite or -inf everywhere; "
            "check the weights, the precision and the guidance scale"
        )


def check_logits(logits: Tensor) -> None:
    """Check rank, branches and type of ``[G, B, W, V]`` logits."""
    if logits.ndim != 4 or logits.shape[0] not in (1, 2):
        raise ValueError(f"logits must be [G, B, W, V] with G = 1 or 2, got {list(logits.shape)}")
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"logits must be float32, float16 or bfloat16, got {logits.dtype}")
