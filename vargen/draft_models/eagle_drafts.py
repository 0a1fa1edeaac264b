"""The drafter's side of one decode: EAGLE's pairs in a key-value cache, and the nodes drafted behind them.

Letters: B images, G guidance branches, R = G * B rows (branch-major), D width, V codes of the codebook, w pairs of one
forward, n nodes drafted since the last verified pair.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vargen.backbones.layers.cache.kv_cache import KVCache, Plan


class EagleDrafts:
    """The drafter's side of one decode: a cache of verified pairs, and the nodes drafted behind them.

    Verified pairs stay; drafted nodes lie behind them in the cache and are overwritten by what comes next.
    """

    reads_hidden = True  # the target must return hidden states

    def __init__(self, drafter: Any, backbone: Any, branches: int, batch: int, max_nodes: int) -> None:
        self.drafter, self.backbone, self.branches = drafter, backbone, branches
        capacity = drafter.num_pairs + max_nodes + 1
        device = drafter.device
        self.cache = KVCache(branches * batch, capacity, len(drafter.layers), device=device)
        self.num_forwards = 0
        self.features = torch.empty(0)  # [G, B, 1 + n, D] of the last verified pair and of the nodes
        self.ancestors = torch.empty(0)  # [B, n, n] bool, ancestor-or-self

    @property
    def lengths(self) -> Tensor:
        """[B] int64 verified pairs."""
        return self.cache.lengths[: self.cache.num_rows // self.branches]

    @torch.no_grad()
    def extend(self, codes: Tensor, hidden: Tensor, num: Tensor) -> Tensor:
        """Append verified pairs, forget the nodes.

        Args:
            codes: [B, w] int64 codes that became permanent (placeholders: any code), -1 behind the last.
            hidden: [G, B, w, D] hidden states of the positions before them.
            num: [B] int64 pairs that count, 0 for images that are complete.

        Returns:
            [G, B, V] float32 logits of the code behind the last one.
        """
        width = codes.shape[1]
        index = torch.arange(width, device=codes.device)
        slots = self.cache.lengths[:, None] + index  # R w
        keys = torch.arange(self._extent(width), device=codes.device)
        x = self._run(codes, hidden, slots, slots, keys <= slots[..., None])
        self.cache.lengths += num.repeat(self.branches)
        last = (num - 1).clamp(min=0)[None, :, None, None].expand(self.branches, -1, 1, x.shape[-1])
        self.features = x.gather(2, last)
        self.ancestors = torch.zeros(len(codes), 0, 0, dtype=torch.bool, device=codes.device)
        return self._score(self.features)[:, :, 0]

    @torch.no_grad()
    def expand(self, codes: Tensor, parents: Tensor) -> Tensor:
        """Read nodes behind the verified pairs.

        Args:
            codes: [B, w] int64 codes of the nodes.
            parents: [B, w] int64 number of the node above, counted since ``extend``; -1 for the last verified code.

        Returns:
            [G, B, w, V] float32 logits of the codes behind the nodes.
        """
        width, before = codes.shape[1], self.ancestors.shape[-1]
        above = F.pad(self.ancestors, (0, width, 1, 0))  # row 0: the verified code, which has no ancestor here
        grown = above.gather(1, (parents + 1)[..., None].expand(-1, -1, before + width))
        own = (
            torch.arange(before + width, device=codes.device)
            == torch.arange(before, before + width, device=codes.device)[:, None]
        )
        grown = grown | own
        self.ancestors = torch.cat([above[:, 1:], grown], dim=1)
        lengths = self.cache.lengths[:, None]
        slots = lengths + torch.arange(before, before + width, device=codes.device)
        keys = torch.arange(self._extent(before + width), device=codes.device)
        node = keys - lengths[:, :1]  # R extent: number of the node in a slot, negative for verified pairs
        inside = (node >= 0) & (node < before + width)
        seen = grown.repeat(self.branches, 1, 1).gather(
            2, node.clamp(0, before + width - 1)[:, None].expand(-1, width, -1)
        )
        visible = (node < 0)[:, None] | (seen & inside[:, None])
        positions = lengths + grown.sum(-1).repeat(self.branches, 1) - 1
        index = (parents + 1)[None, :, :, None].expand(self.branches, -1, -1, self.features.shape[-1])
        x = self._run(codes, self.features.gather(2, index), slots, positions, visible)
        self.features = torch.cat([self.features, x], dim=2)
        return self._score(x)

    @torch.no_grad()
    def select(self, rows: Tensor) -> None:
        """Keep the images ``rows`` (int64), in that order."""
        batch = self.cache.num_rows // self.branches
        self.cache.select((torch.arange(self.branches, device=rows.device)[:, None] * batch + rows).flatten())
        self.features, self.ancestors = self.features[:, rows], self.ancestors[rows]

    def _run(self, codes: Tensor, hidden: Tensor, slots: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        embeddings = self.drafter.embed(codes.clamp(min=0), self.backbone).repeat(self.branches, 1, 1)
        target = torch.where(slots >= self.cache.capacity, self.cache.capacity, slots)
        plan = Plan(target, None, visible.shape[-1], visible[:, None])
        attends = [self.cache.layer(i, plan) for i in range(len(self.drafter.layers))]
        self.num_forwards += 1
        return self.drafter.run(hidden.flatten(0, 1), embeddings, positions, attends).unflatten(0, (self.branches, -1))

    def _score(self, features: Tensor) -> Tensor:
        return self.backbone.head_logits(features)

    def _extent(self, width: int) -> int:
        if self.cache.device.type != "cpu":
            return self.cache.capacity  # a length on the device: reading it would stop the stream
        return min(int(self.cache.lengths.max()) + width, self.cache.capacity)
