"""The window session over the item primitive: condition in, windows of codes scored, prefixes or tree paths committed.

Rows of different length live in one batch: each row has its own committed length, rolling back is not advancing it.
Raster stamps (stamp = slot), so that a rejected proposal is hidden by being later than everything that looks.

Letters: B images, G guidance branches, R = G * B rows, T condition positions, N codes, W window, D width, V codes.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from vargen.backbones.decoding.condition import ConditionedBackbone, PreparedCondition
from vargen.backbones.decoding.row_invariant import RowInvariant
from vargen.backbones.layers.cache.kv_cache import NOCACHE, UNWRITTEN, KVCache, Plan
from vargen.features import Feature
from vargen.hooks import compute_dtype, runs_as_forward
from vargen.protocols import Layout, StepOut


class WindowSession:
    """The state of one decode: the cache, and how far each image is.

    Args:
        cache: of R rows; its ``lengths`` count condition slots and committed codes.
        branches: G.
        offset: T.
        padded: some condition slots are padding, so that no forward can do without a mask.
        static: never specialise on lengths: the same shapes and no host reads at every step (torch.compile, CUDA
            graphs), at the price of attending over the whole capacity.
    """

    def __init__(self, cache: KVCache, branches: int, offset: int, padded: bool, static: bool) -> None:
        self.cache, self.branches, self.offset, self.padded, self.static = cache, branches, offset, padded, static
        self.exact: Any = None  # a RowInvariant, where passes run in fixed shapes
        self.width = 0  # W of the last window; 0 after a commit
        self.uniform: int | None = offset  # slots committed in every row, where the host knows and they agree

    @property
    def length(self) -> Tensor:
        """[B] int64 committed codes."""
        return self.cache.lengths[: self.cache.num_rows // self.branches] - self.offset

    @property
    def capacity(self) -> int:
        """Stream slots that fit."""
        return self.cache.capacity - self.offset

    def plan(self, width: int, mask: Tensor | None) -> Plan:
        """Plan W slots behind the committed ones, in every row."""
        # static first: a compiled step must not be guarded by the lengths
        if not self.static and not self.padded and mask is None and self.uniform is not None:
            return self.cache.plan_span(self.uniform, width)
        lengths = self.cache.lengths
        slots = lengths[:, None] + torch.arange(width, device=lengths.device)  # R W
        trim = not self.static and lengths.device.type == "cpu"
        extent = int(lengths.max()) + width if trim else self.cache.capacity
        if mask is None:
            return self.cache.plan(slots, extent=extent)
        if mask.ndim == 3:
            mask = mask.repeat(self.branches, 1, 1)
        # the committed slots are visible, of the window only what the mask says
        nu = (lengths[:, None] - 1).expand(-1, width)
        return self.cache.plan(slots, nu=nu, window_mask=mask.bool(), extent=extent)

    def plan_at(self, slots: Tensor, starts: int | Tensor | None = None) -> Plan:
        """Plan ``[B, w]`` code slots in any order, -1 = nothing; each sees the written slots before it in raster order.

        ``starts`` (the offset; ``[R, 1]`` where rows differ) is where slot 0 lies in the cache.
        """
        starts = self.offset if starts is None else starts
        slots = slots.repeat(self.branches, 1)
        target = torch.where(slots < 0, NOCACHE, starts + slots)
        nu = torch.where(slots < 0, starts - 1, target)  # what is nothing sees the condition, so that it stays finite
        return self.cache.plan(target, tau=torch.where(slots < 0, UNWRITTEN, target), nu=nu)

    def advance(self, n: int | Tensor) -> None:
        """Move the pointer by ``n`` slots, equal or per image."""
        on_host = isinstance(n, int) or n.device.type == "cpu"
        if not isinstance(n, int) and on_host and bool((n == n[0]).all()):
            n = int(n[0])
        if isinstance(n, int):
            self.cache.lengths += n
            self.uniform = None if self.uniform is None else self.uniform + n
        else:
            self.cache.lengths += n.to(self.cache.lengths).repeat(self.branches)
            self.uniform = None
        if self.uniform is None and self.cache.device.type == "cpu":
            low, high = (int(x) for x in self.cache.lengths.aminmax())
            self.uniform = low if low == high else None
        self.width = 0


class WindowBackbone(ConditionedBackbone):
    """Mixin: the ``Backbone`` protocol for causal code models whose condition stands before the codes.

    The module provides ``cls_embedding`` (a condition embedding), ``tok_embeddings``, ``norm``, ``output``,
    ``rope_table`` (rows: T condition positions, N codes, NULL) and ``grid_size``.
    """

    features = frozenset(
        {
            Feature.WINDOW,
            Feature.RAGGED,
            Feature.TREE_MASK,
            Feature.ANY_SLOT,
            Feature.HIDDEN,
            Feature.STATIC,
            Feature.ROW_INVARIANT,
        }
    )
    grid_size: tuple[int, int]

    def layout(self, height: int | None = None, width: int | None = None) -> Layout:
        """The raster stream of this model; height and width, in codes, can only confirm its grid."""
        asked = (height or self.grid_size[0], width or self.grid_size[1])
        if asked != self.grid_size:
            raise ValueError(
                f"this model was trained for a grid of {self.grid_size} codes (height, width), got {asked}"
            )
        return Layout.raster(self.grid_size)

    @runs_as_forward
    @torch.no_grad()
    def open(
        self,
        condition: PreparedCondition,
        *,
        max_window: int = 1,
        layout: Layout | None = None,
        dtype: torch.dtype | None = None,
        hidden: bool = False,
        static: bool | None = None,
        reuse: WindowSession | None = None,
        row_invariant: bool = False,
    ) -> tuple[WindowSession, StepOut]:
        """Run the condition and return a session with the logits of slot 0.

        Args:
            condition: from ``prepare``.
            max_window: largest W of this session; a window may overshoot the end by W - 1 slots.
            layout: accepted for the protocol; this model has one.
            dtype: dtype of cached keys and values (None = the model's).
            hidden: return hidden states, here of all T condition positions: [G, B, T, D].
            static: fixed shapes at every step, see ``WindowSession``; None = where the blocks are compiled
                (``compile_repeated_blocks``), which would compile anew for every length.
            row_invariant: run all passes in fixed shapes, see ``RowInvariant``; excludes ``static``.
            reuse: a finished session of the same batch, window and dtype: its buffers serve again at their addresses.
        """
        if self.training:
            raise ValueError("the model is in training mode and its dropout would disturb decoding; call model.eval()")
        if max_window < 1:
            raise ValueError(f"max_window must be at least 1, got {max_window}")
        exact: Any = (
            RowInvariant(condition.embeddings.shape[1] + self.num_codes, self.output.weight) if row_invariant else None
        )
        x = condition.embeddings
        rows, length = x.shape[:2]
        capacity = length + self.num_codes + max_window
        if reuse is not None and reuse.cache.num_rows == rows and reuse.cache.capacity >= capacity:
            cache = reuse.cache
            cache.reset()
        else:
            cache = KVCache(rows, capacity, len(self.layers), device=x.device, dtype=dtype)
        padded = condition.padded
        index = torch.arange(length, device=x.device)
        if padded:
            assert condition.mask is not None
            plan = cache.plan(index, tau=torch.where(condition.mask, index, UNWRITTEN), nu=index, extent=length)
        else:
            plan = cache.plan_span(0, length)
        compiled = any(getattr(layer, "_compiled_call_impl", None) is not None for layer in self.layers)
        # a prefill runs once, with a shape of its own: compiling it would cost more than it saves
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), exact or nullcontext():
            h = self.forward_items(x, cache=cache, plan=plan, positions=index)
        cache.lengths.fill_(length)
        session = WindowSession(cache, condition.branches, length, padded, compiled if static is None else static)
        session.exact = exact
        with exact or nullcontext():
            return session, self._score(h if hidden else h[:, -1:], condition.branches, hidden, last=True)

    @runs_as_forward
    @torch.no_grad()
    def step(
        self,
        session: WindowSession,
        codes: Tensor,
        *,
        slots: Tensor | None = None,
        mask: Tensor | None = None,
        hidden: bool = False,
    ) -> StepOut:
        """Score a window: codes [B, W] int64 to logits [G, B, W, V]; see ``vargen.protocols.Backbone``."""
        width = codes.shape[1]
        if slots is None:
            slots = session.length[:, None] + torch.arange(width, device=codes.device)
        # entries behind the last code exist only because windows have one width: any position will do
        positions = session.offset + slots.clamp(0, self.num_codes - 1)
        if positions.ndim == 2:
            positions = positions.repeat(session.branches, 1)
        x = self.embed(codes).repeat(session.branches, 1, 1)
        with session.exact or nullcontext():
            h = self.forward_items(x, cache=session.cache, plan=session.plan(width, mask), positions=positions)
            session.width = width
            return self._score(h, session.branches, hidden)

    @runs_as_forward
    @torch.no_grad()
    def step_at(self, session: WindowSession, codes: Tensor, slots: Tensor, *, hidden: bool = False) -> StepOut:
        """Score codes [B, w] at any code slots [B, w] (-1 = no entry); they are permanent, ``commit`` plays no part.

        An entry sees the written slots before its own in raster order. A slot may be written again; within one call
        the slots of an image differ.
        """
        positions = session.offset + slots.clamp(0, self.num_codes - 1).repeat(session.branches, 1)
        x = self.embed(codes).repeat(session.branches, 1, 1)
        with session.exact or nullcontext():
            h = self.forward_items(x, cache=session.cache, plan=session.plan_at(slots), positions=positions)
            return self._score(h, session.branches, hidden)

    @torch.no_grad()
    def commit(self, session: WindowSession, n: int | Tensor, path: Tensor | None = None) -> None:
        """Make the first n entries of the last window permanent.

        Args:
            session: advanced in place.
            n: one number for all images, or [B] int64. A number (or a tensor on the CPU) lets a GPU session stay on its
                unmasked path as long as all images are equally far; a tensor on the GPU is never read back.
            path: [B, K] accepted entries of a tree window, see ``vargen.protocols.Backbone``.

        Raises:
            ValueError: n outside 0..W, where the host can tell.
        """
        if isinstance(n, int) or n.device.type == "cpu":
            low, high = (n, n) if isinstance(n, int) else (int(n.min()), int(n.max()))
            if low < 0 or high > session.width:
                raise ValueError(f"n must be in 0..{session.width}, the last window's width, got {low}..{high}")
        if path is not None:
            session.cache.compact(path.repeat(session.branches, 1))
        session.advance(n)

    @torch.no_grad()
    def rewind(self, session: WindowSession, n: int | Tensor) -> None:
        """Take back the last n committed entries, one number for all images or [B] int64; they may be fed anew."""
        session.advance(-n)

    @torch.no_grad()
    def select(self, session: WindowSession, rows: Tensor) -> None:
        """Keep the images ``rows`` [B'] int64, in this order."""
        batch = session.cache.num_rows // session.branches
        branches = torch.arange(session.branches, device=rows.device)[:, None] * batch
        session.cache.select((branches + rows).flatten())
        session.advance(torch.zeros_like(rows))  # the rows that are left may agree in length

    @runs_as_forward
    @torch.no_grad()
    def head_logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` float32 of states ``[..., D]`` as they enter the head; drafters guess such states."""
        return self.output(hidden.to(compute_dtype(self.output))).float()

    def _score(self, h: Tensor, branches: int, hidden: bool, last: bool = False) -> StepOut:
        h = self.norm(h)
        logits = self.output(h[:, -1:] if last else h).float()
        return StepOut(logits.unflatten(0, (branches, -1)), h.unflatten(0, (branches, -1)) if hidden else None)
