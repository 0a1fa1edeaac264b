"""The key-value cache of the library: fixed buffers, one time stamp for every slot, per-row lengths.

One mask rule serves every decoding order: item i of row r may attend to slot s iff ``stamp[r, s] <= view[r, i]``, and an
item always sees itself. Slots that were never written, that were erased, or that hold padding carry the stamp
``UNWRITTEN`` (later than every view). Raster decoding stamps a slot with its index; NAR with its diagonal, NBP and PAR
with their block, next-scale models with their scale.

Rolling back is moving a pointer (``lengths``) or resetting stamps; keys and values never move, except when a tree path
is compacted. Nothing here reads a value back to the host unless the cache lives on the CPU, where that costs nothing and
lets attention stop at the last written slot.

Letters: R rows (guidance branches x images), S slots, w items of one forward, H key-value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

UNWRITTEN = torch.iinfo(torch.int64).max  # the stamp "never": later than any view
NOCACHE = -1  # slot of an item that reads the cache and leaves no key or value behind
CAPACITY_MULTIPLE = 8  # attention kernels like key counts that are multiples of 8

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Attend with softmax weights; key-value heads are shared by consecutive groups of query heads.

    Args:
        query: [R, H_q, w, d].
        key: [R, H, S, d] with H dividing H_q.
        value: [R, H, S, d].
        mask: broadcastable to [R, H_q, w, S], True = attend.
        is_causal: w = S and lower-triangular; excludes ``mask``.

    Returns:
        [R, H_q, w, d].
    """
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)


@dataclass(frozen=True)
class Plan:
    """Where the items of one forward are written and what they see; computed once, read by every layer."""

    slots: Tensor  # [R, w] int64; NOCACHE items point at the spare slot behind the last one
    span: tuple[int, int] | None  # the same consecutive slots in every row, known on the host
    extent: int  # keys 0..extent-1 are read
    mask: Tensor | None  # [R or 1, 1, w, extent] bool, None = everything below extent is visible
    is_causal: bool = False  # extent = w and plain causal order


def write(keys: Tensor, values: Tensor, plan: Plan, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Write one layer's items into its buffers ``[R, H, S + 1, d]``; return the part that is read."""
    if plan.span is not None:
        keys[:, :, slice(*plan.span)] = key
        values[:, :, slice(*plan.span)] = value
    else:
        index = plan.slots.to(key.device)[:, None, :, None].expand_as(key)
        keys.scatter_(2, index, key.to(keys.dtype))
        values.scatter_(2, index, value.to(values.dtype))
    return keys[:, :, : plan.extent], values[:, :, : plan.extent]


def attend_over(keys: Tensor, values: Tensor, plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Write one layer's items into its buffers and attend over them: ``[R, H_q, w, d]``."""
    keys, values = write(keys, values, plan, key, value)
    mask = None if plan.mask is None else plan.mask.to(query.device)
    return attention(query, keys.to(query.dtype), values.to(query.dtype), mask, plan.is_causal)


class KVCache:
    """Static key-value buffers of a transformer, for any decoding order.

    Buffers are allocated at the first write of each layer, from the shape, dtype and device of what is written, so
    grouped-query models and models spread over devices need no description.

    Args:
        num_rows: R.
        capacity: slots per row; rounded up to a multiple of 8.
        num_layers: layers that write.
        device: where stamps and lengths live.
        dtype: dtype of the buffers; None keeps the dtype of the keys.
    """

    def __init__(
        self,
        num_rows: int,
        capacity: int,
        num_layers: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.capacity = -(-capacity // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        self.dtype = dtype
        self.keys: list[Tensor | None] = [None] * num_layers  # each [R, H, S + 1, d], the last slot is never read
        self.values: list[Tensor | None] = [None] * num_layers
        self.stamps = torch.full((num_rows, self.capacity + 1), UNWRITTEN, device=device)  # [R, S + 1]
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)  # [R] committed slots, window decoders
        self._written = 0  # slots below it may hold something; kept on CPU only

    @property
    def num_rows(self) -> int:
        """Rows of the cache, R."""
        return self.stamps.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of stamps and lengths."""
        return self.stamps.device

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values allocated so far."""
        return sum(t.numel() * t.element_size() for t in [*self.keys, *self.values] if t is not None)

    def plan(
        self,
        slots: Tensor,
        *,
        tau: Tensor | None = None,
        nu: Tensor | None = None,
        window_mask: Tensor | None = None,
        extent: int | None = None,
        all_visible: bool = False,
    ) -> Plan:
        """Stamp the slots of w items and build their mask. Shapes without R hold for every row.

        Args:
            slots: [w] or [R, w] int64, unique in a row; ``NOCACHE`` items see the cache but are never seen.
            tau: [w] or [R, w] stamps to write; default the slots. ``UNWRITTEN`` marks padding.
            nu: [w] or [R, w] view times; default ``tau``.
            window_mask: [w, w] or [R, w, w] bool, True where item i may see item j; adds to what ``nu`` shows.
            extent: bound on the slots anyone may see (all written slots if None); reading stops there.
            all_visible: promise that every slot below ``extent`` is visible to every item: no mask is built.

        Returns:
            The plan to hand to ``update`` or ``layer``.
        """
        slots = slots.expand(self.num_rows, -1)
        tau = slots if tau is None else tau.expand(self.num_rows, -1)
        nu = tau if nu is None else nu.expand(self.num_rows, -1)
        extent = self._extent(slots) if extent is None else extent
        if extent > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} slots, {extent} are asked for; open a larger session")
        target = torch.where((slots < 0) | (slots >= self.capacity), self.capacity, slots)
        self.stamps.scatter_(1, target, tau)
        if all_visible:
            return Plan(target, None, extent, None)
        visible = self.stamps[:, None, :extent] <= nu[:, :, None]  # R w extent
        visible = visible | (target[:, :, None] == torch.arange(extent, device=self.device))
        if window_mask is not None:
            window_mask = window_mask.expand(self.num_rows, -1, -1)
            index = target[:, None, :].expand_as(window_mask)
            seen = F.pad(visible, (0, self.capacity + 1 - extent))
            visible = seen.scatter(2, index, seen.gather(2, index) | window_mask)[:, :, :extent]
        return Plan(target, None, extent, visible[:, None])

    def plan_span(self, start: int, width: int) -> Plan:
        """Plan consecutive slots in causal order, equal in every row, when all earlier slots are visible.

        The fast path: slots are known on the host, writing is a slice copy, and one item (or a first block) needs no
        mask.
        """
        stop = start + width
        if stop > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} slots, the window ends at {stop}; open a larger session"
            )
        index = torch.arange(stop, device=self.device)
        self.stamps[:, start:stop] = index[start:]
        self._written = max(self._written, stop)
        mask = None
        if width > 1 and start > 0:
            mask = (index <= index[start:, None])[None, None]
        return Plan(index[start:].expand(self.num_rows, -1), (start, stop), stop, mask, start == 0 and width > 1)

    def plan_block(self, start: int, stamps: Tensor) -> Plan:
        """Plan consecutive slots with the given stamps ``[w]``, equal in every row and not below those written before.

        One stamp sees everything so far and needs no mask; several see each other block by block.
        """
        stop = start + len(stamps)
        if stop > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} slots, the block ends at {stop}; open a larger session")
        self.stamps[:, start:stop] = stamps
        self._written = max(self._written, stop)
        one = bool((stamps == stamps[0]).all())
        mask = None if one else (self.stamps[:1, :stop] <= stamps.to(self.device)[:, None])[None, None]
        slots = torch.arange(start, stop, device=self.device).expand(self.num_rows, -1)
        return Plan(slots, (start, stop), stop, mask)

    def update(self, layer: int, key: Tensor, value: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """Write ``[R, H, w, d]`` keys and values; return ``[R, H, extent, d]`` views of the buffers."""
        self._allocate(layer, key, value)
        keys, values = self.keys[layer], self.values[layer]
        assert keys is not None
        assert values is not None
        return write(keys, values, plan, key, value)

    def _allocate(self, layer: int, key: Tensor, value: Tensor) -> None:
        if self.keys[layer] is None:
            shape = (*key.shape[:2], self.capacity + 1, key.shape[3])
            # zeros: a masked slot must be finite, for 0 * inf is NaN
            self.keys[layer] = torch.zeros(shape, dtype=self.dtype or key.dtype, device=key.device)
            self.values[layer] = torch.zeros(shape, dtype=self.dtype or value.dtype, device=value.device)

    def attend(self, layer: int, plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write keys and values of one layer and attend over the cache: ``[R, H_q, w, d]``."""
        self._allocate(layer, key, value)
        keys, values = self.keys[layer], self.values[layer]
        assert keys is not None
        assert values is not None
        return attend_over(keys, values, plan, query, key, value)

    def layer(self, layer: int, plan: Plan) -> Attend:
        """The ``attend(query, key, value)`` function of one layer; once allocated the same for all, but for buffers."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            return partial(self.attend, layer, plan)
        return partial(attend_over, keys, values, plan)

    def erase(self, slots: Tensor) -> None:
        """Hide ``[w]`` or ``[R, w]`` slots (items whose keys must not survive their pass) until written again."""
        slots = slots.expand(self.num_rows, -1)
        target = torch.where((slots < 0) | (slots >= self.capacity), self.capacity, slots)
        self.stamps.scatter_(1, target, UNWRITTEN)

    def rollback(self, lengths: Tensor) -> None:
        """Forget everything behind the first ``lengths [R]`` slots of each row (slots stamped in slot order)."""
        self.lengths.copy_(lengths)
        behind = torch.arange(self.capacity + 1, device=self.device) >= lengths[:, None]
        self.stamps.masked_fill_(behind, UNWRITTEN)

    def compact(self, path: Tensor) -> None:
        """Move the accepted path of a tree window to the front of that window.

        Args:
            path: [R, K] indices into the last window, which starts at slot ``lengths[r]``; entries behind a row's
                accepted depth may hold any index, what they move is hidden by the row's length.
        """
        path = path.clamp(min=0)
        source = (self.lengths[:, None] + path).clamp(max=self.capacity)
        target = (self.lengths[:, None] + torch.arange(path.shape[1], device=self.device)).clamp(max=self.capacity)
        for buffers in (self.keys, self.values):
            for buffer in buffers:
                if buffer is None:
                    continue
                shape = (buffer.shape[0], buffer.shape[1], path.shape[1], buffer.shape[3])
                take = source.to(buffer.device)[:, None, :, None].expand(shape)
                put = target.to(buffer.device)[:, None, :, None].expand(shape)
                buffer.scatter_(2, put, buffer.gather(2, take))

    def select(self, rows: Tensor) -> None:
        """Keep the rows ``[R']`` (in this order, repeats allowed) and free the memory of the others."""
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                if buffer is not None:
                    buffers[i] = buffer.index_select(0, rows.to(buffer.device))
        self.stamps = self.stamps.index_select(0, rows.to(self.device))
        self.lengths = self.lengths.index_select(0, rows.to(self.device))

    def reset(self) -> None:
        """Forget everything; the buffers stay (same addresses, as CUDA graphs need)."""
        self.stamps.fill_(UNWRITTEN)
        self.lengths.zero_()
        self._written = 0

    def _extent(self, slots: Tensor) -> int:
        if self.device.type != "cpu":
            return self.capacity  # a value on the device: reading it would stop the stream
        last = int(slots.max()) + 1
        if last > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} slots, got slot {last - 1}; open a larger session")
        self._written = max(self._written, last)
        return self._written
