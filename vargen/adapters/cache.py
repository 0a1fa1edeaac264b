"""The library's key-value cache behind transformers' cache interface.

A transformers body writes keys and values through ``past_key_values.update`` and reads back what it attends over.
``RaggedCache`` routes both to ``vargen.backbones.layers.cache.kv_cache.KVCache``: rows of different length live in one batch, rolling
back moves a pointer, buffers are allocated lazily on the device of each layer (so ``device_map`` needs no description).

Letters: R rows, H key-value heads, w items of one forward, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vargen.backbones.layers.cache.kv_cache import KVCache, Plan
from vargen.validation.extras import extra

with extra("transformers", "an image model of transformers"):
    from transformers.cache_utils import Cache, CacheLayerMixin

MASKED_IMPLEMENTATIONS = ("sdpa", "eager")  # take a 4-D mask; for a ragged forward of another one sdpa stands in


class RaggedLayer(CacheLayerMixin):
    """One layer of a ``RaggedCache``.

    Args:
        store: the cache that holds the buffers.
        index: number of the layer.
    """

    is_sliding = False
    is_compileable = True  # shapes and addresses stay, see KVCache

    def __init__(self, store: KVCache, index: int) -> None:
        super().__init__()
        self.store, self.index = store, index
        self.plan: Plan | None = None
        self.is_initialized = True  # the buffers are the store's

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the store allocates at the first write."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write ``[R, H, w, d]`` at the planned slots; return the keys and values that may be attended."""
        assert self.plan is not None, "a RaggedCache is written through RaggedCache.planned"
        keys, values = self.store.update(self.index, key_states, value_states, self.plan)
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that ``update`` returns, and the slot of the first one."""
        return (query_length if self.plan is None else self.plan.extent), 0

    def get_seq_length(self) -> int:
        """Slots before the planned ones; only read where every row has the same, since otherwise a mask is given."""
        return 0 if self.plan is None or self.plan.span is None else self.plan.span[0]

    def get_max_length(self) -> int:
        """Slots a row can hold."""
        return self.store.capacity

    def get_max_cache_shape(self) -> int:
        """``get_max_length`` under the name that transformers 5.10 asks for."""
        return self.store.capacity


class RaggedCache(Cache):
    """What a transformers body receives as ``past_key_values``.

    Args:
        store: the cache that holds the buffers, one layer for each of the body's.
    """

    def __init__(self, store: KVCache) -> None:
        super().__init__(layers=[RaggedLayer(store, i) for i in range(len(store.keys))])
        self.store = store

    @contextmanager
    def planned(self, plan: Plan) -> Iterator[RaggedCache]:
        """Write and read by ``plan`` during one forward pass."""
        for layer in self.layers:
            layer.plan = plan
        try:
            yield self
        finally:
            for layer in self.layers:
                layer.plan = None


def attention_mask(plan: Plan, implementation: str, dtype: torch.dtype) -> Tensor | None:
    """The plan's mask as an attention implementation wants it.

    Args:
        plan: of the coming forward pass.
        implementation: ``config._attn_implementation`` of the body.
        dtype: of the hidden states; eager attention adds the mask to its scores.

    Returns:
        ``None`` where plain causal order says everything (and always for flash and flex attention, which take no such
        mask and order consecutive slots themselves), else ``[R or 1, 1, w, extent]``: bool (True = attend), for eager
        attention 0 and the smallest float, because it would add a bool mask as 0 and 1 and be silently wrong.
    """
    if plan.mask is None or implementation not in MASKED_IMPLEMENTATIONS:
        return None
    if implementation == "sdpa":
        return plan.mask
    return torch.zeros_like(plan.mask, dtype=dtype).masked_fill_(~plan.mask, torch.finfo(dtype).min)
