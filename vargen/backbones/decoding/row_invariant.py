"""Forward passes whose results do not depend on how many rows, images or slots share them.

Products, attention and the head of a library choose other kernels for other shapes, and those add up in other orders: the same
row comes out with other last bits. Here every product sees ``TILE`` rows, every attention ``TILE`` queries over one number of keys,
and the head works in float32. What is left to trust is that one shape means one order of additions, which holds on a CPU; on a GPU
it is untested.

The price: rows are padded to a tile, tiles are multiplied one after the other, and attention always reads all slots.

Letters: R rows, w items, D width, V codes, S keys.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

TILE = 16  # rows of a product and queries of an attention
KEYS = 64  # keys are padded to a multiple of it


class RowInvariant(TorchFunctionMode):
    """Within ``with RowInvariant(...):`` products and attention run in fixed shapes.

    Args:
        num_keys: slots of the stream, condition included; attention reads so many, rounded up, whatever is written yet. Slots
            behind are only seen by entries that overshoot the end.
        head: weight ``[V, D]`` of the last product, which runs in float32.
    """

    def __init__(self, num_keys: int, head: Tensor | None = None) -> None:
        super().__init__()
        self.num_keys = -(-num_keys // KEYS) * KEYS
        self.head, self.wide = head, None if head is None else head.float()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over products and attention; all else is left alone."""
        kwargs = kwargs or {}
        if func is F.linear:
            return self.linear(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        return func(*args, **kwargs)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[..., D]`` to ``[..., O]``, tile by tile."""
        if weight is self.head and self.wide is not None:
            input, weight = input.float(), self.wide
        rows = input.flatten(0, -2)
        tiles = [F.linear(tile, weight, bias) for tile in _padded(rows, 0).split(TILE)]
        return torch.cat(tiles)[: len(rows)].unflatten(0, input.shape[:-1])

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention of ``query [R, H, w, d]`` over ``key, value [R, H, S, d]``, tile by tile of queries."""
        width, extent = query.shape[-2], key.shape[-2]
        if attn_mask is None:
            attn_mask = torch.ones(1, 1, width, extent, dtype=torch.bool, device=query.device)
            attn_mask = attn_mask.tril() if is_causal else attn_mask
        mask = _padded(_keys(attn_mask.expand(-1, -1, width, -1), self.num_keys, -1), -2)
        mask[..., width:, 0] = True  # a query that sees nothing would be NaN
        key, value = (_keys(part, self.num_keys, -2) for part in (key, value))
        pairs = zip(_padded(query, -2).split(TILE, -2), mask.split(TILE, -2), strict=True)
        parts = [F.scaled_dot_product_attention(q, key, value, attn_mask=m, enable_gqa=enable_gqa) for q, m in pairs]
        return torch.cat(parts, dim=-2)[..., :width, :]


def _padded(x: Tensor, dim: int) -> Tensor:
    """Zeros behind ``dim`` up to whole tiles."""
    return _keys(x, -(-x.shape[dim] // TILE) * TILE, dim)


def _keys(x: Tensor, count: int, dim: int) -> Tensor:
    """``x`` with ``count`` entries along ``dim``: cut, or filled with zeros; always a copy."""
    shape = list(x.shape)
    shape[dim] = count
    out = x.new_zeros(shape)
    kept = min(count, x.shape[dim])
    out.narrow(dim, 0, kept).copy_(x.narrow(dim, 0, kept))
    return out
