"""The state of a decode whose rows have prompts of different length.

Letters: B images, G guidance branches, R = G * B rows, S stream slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vargen.adapters.cache import RaggedCache
from vargen.adapters.prompts import PackedPrompts
from vargen.backbones.decoding.window import WindowSession
from vargen.backbones.layers.cache.kv_cache import Plan
from vargen.protocols import Layout


class PromptSession(WindowSession):
    """A window session over right-padded prompts.

    Slot ``s`` of the stream of row r lies behind that row's prompt, at cache slot ``starts[r] + s``; padding is
    overwritten by the stream, so committed slots are always dense and no forward needs a padding mask.

    Args:
        past: the cache of R rows, prompts already in it.
        condition: the prompts.
        layout: the stream.
        static: fixed shapes at every step, see ``WindowSession``.
    """

    def __init__(self, past: RaggedCache, condition: PackedPrompts, layout: Layout, static: bool) -> None:
        super().__init__(past.store, condition.branches, 0, padded=False, static=static)
        self.past, self.starts, self.layout, self.mix = past, condition.lengths, layout, condition.mix
        self.forced = layout.forced.to(self.starts.device)
        self.has_forced = bool((layout.forced >= 0).any())
        self.cache.lengths.copy_(self.starts)
        low, high = (int(x) for x in self.starts.aminmax())
        self.uniform = low if low == high else None

    @property
    def length(self) -> Tensor:
        """[B] int64 committed stream slots."""
        batch = len(self.starts) // self.branches
        return (self.cache.lengths - self.starts)[:batch]

    @property
    def capacity(self) -> int:
        """Stream slots that fit behind the longest prompt."""
        return self.cache.capacity - int(self.starts.max())

    def plan_at(self, slots: Tensor, starts: int | Tensor | None = None) -> Plan:
        """As in ``WindowSession``; a row's slots lie behind its own prompt."""
        return super().plan_at(slots, self.starts[:, None] if starts is None else starts)

    def select(self, rows: Tensor) -> None:
        """Keep the images ``rows`` [B'] int64, in this order."""
        batch = len(self.starts) // self.branches
        kept = (torch.arange(self.branches, device=rows.device)[:, None] * batch + rows).flatten()
        self.cache.select(kept)
        self.starts = self.starts[kept]
        self.advance(torch.zeros_like(rows))  # the rows that are left may agree in length
