"""Memory of a decode: from sizes alone, no model is built.

Letters: R rows (images times guidance branches), L all positions, n_k positions of scale k, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeBytes:
    """Peak bytes of a decode beside the weights."""

    cache: int  # keys and values of all layers
    logits: int  # float32, of the largest forward pass


def scale_decode_bytes(
    sizes: Sequence[int],
    *,
    num_layers: int,
    dim: int,
    num_logits: int,
    num_rows: int = 2,
    cached: bool = True,
    num_bytes: int = 2,
) -> DecodeBytes:
    """Peak bytes of cache and logits of a next-scale decode.

    Args:
        sizes: n_k.
        num_layers: blocks.
        dim: D, of keys and of values.
        num_logits: logits of a position: V, or two a bit.
        num_rows: R.
        cached: whether scales attend to coarser ones.
        num_bytes: of a number in the cache; 2 in half precision.

    Example:
        >>> scale_decode_bytes([1, 4, 16], num_layers=2, dim=8, num_logits=6)
        DecodeBytes(cache=3200, logits=768)
    """
    from vargen.backbones.layers.cache.kv_cache import CAPACITY_MULTIPLE

    slots = -(-sum(sizes) // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE + 1
    cache = num_rows * slots * 2 * dim * num_bytes * num_layers if cached else 0
    return DecodeBytes(cache, num_rows * max(sizes) * num_logits * 4)


def text_to_image_bytes(num_rows: int = 2) -> dict[str, DecodeBytes]:
    """Cache and logits of the published next-scale models that read captions, half precision, at their largest square picture."""
    from vargen.backbones.infinity.sizes import SIZES, scales_of
    from vargen.backbones.switti.sizes import DEPTH
    from vargen.backbones.switti.sizes import SIZES as SWITTI
    from vargen.backbones.var.sizes import HEAD_DIM

    found = {}
    squares = [h * w for h, w in scales_of("1:1", "1M")]
    for name, (layers, dim, _, bits) in SIZES.items():
        if not name.startswith("layer"):  # those were never released
            found[f"Infinity-{name.upper()}, 1024 px"] = scale_decode_bytes(
                squares, num_layers=layers, dim=dim, num_logits=2 * bits, num_rows=num_rows
            )
    for name, (scales, autoregressive) in SWITTI.items():
        side, _, kind = name.partition("-")
        found[f"Switti{'-AR' if kind else ''}, {side} px"] = scale_decode_bytes(
            [n * n for n in scales],
            num_layers=DEPTH,
            dim=DEPTH * HEAD_DIM,
            num_logits=4096,
            num_rows=num_rows,
            cached=autoregressive,
        )
    return found
