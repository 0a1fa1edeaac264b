"""Walk down a tree of proposals: which of them become permanent, and from which law the code behind them is drawn.

Sampling tests the children of a node one after the other and takes what each rejection leaves of the law to the next:
recursive rejection, exact for deterministic proposals, for independent draws (SpecInfer, arXiv:2305.09781) and for draws
without replacement (arXiv:2402.14160, arXiv:2401.15077); with a relaxation it is LANTERN. K-SEQ (SpecTr,
arXiv:2310.15141) tests independent draws without updates between them.

Nothing here draws a random number or reads a device back; on the CPU, rows that are done are left out.

p is the target law, q the draft law. Letters: G guidance branches (conditional first), B images, n nodes, D depth,
C children of a node, V codes, U uniforms given, b rows of a level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vargen.kernels.language import use_triton
from vargen.kernels.tree.verify import walk_on_chip
from vargen.kernels.warp import warp_logits
from vargen.samplers.acceptance.lantern import (
    Relaxation,
    after_rejection,
    aggregate,
    k_seq_factor,
    k_seq_residual,
    normalized,
    passes,
)
from vargen.samplers.drafters.tree import TreeDraft

Law = Callable[[Tensor, Tensor], Tensor]  # (images [b], nodes [b]) -> probabilities [b, V] of the code behind the node


@dataclass
class Walk:
    """What a walk found. Slot 0 is the first one that the tree decides."""

    path: Tensor  # [B, D + 1] int64 nodes from node 0 down, 0 behind the last
    tokens: Tensor  # [B, D + 1] int64 codes of the nodes below node 0, shifted to the slots they fill; -1 behind them
    num_accepted: Tensor  # [B] int64 proposals kept
    law: Tensor  # [B, V] float32 law of the code behind them; a point for a finished image
    num_uniforms: Tensor  # [B] int64 tests made
    num_relaxed: Tensor  # [B] int64 proposals kept that the exact rule would have rejected
    chances: Tensor | None = None  # [B, U] float32 in [0, 1] chance of each test made, for enumeration


def laws_of(logits: Tensor, **warp: Any) -> Law:
    """Target laws of nodes from logits ``[G, B, n, V]`` and the settings of ``warp_logits``."""
    scale = warp.pop("guidance_scale", 1.0)

    def law(images: Tensor, nodes: Tensor) -> Tensor:
        per_row = scale[images] if isinstance(scale, Tensor) else scale
        z = warp_logits(logits[:, images, nodes][:, :, None], guidance_scale=per_row, **warp)
        return z[:, 0].softmax(-1)

    return law


def walk_logits(
    logits: Tensor,
    draft: TreeDraft,
    uniforms: Tensor,
    *,
    positions: Tensor,
    limit: Tensor,
    relaxation: Relaxation | None = None,
    forced: Tensor | None = None,
    k_seq: bool = False,
    **warp: Any,
) -> Walk:
    """``walk_tree`` over the laws of ``logits [G, B, n, V]``: one kernel where kernels run, else plain PyTorch.

    Args:
        logits, draft, uniforms, limit, relaxation, forced, k_seq: as there.
        positions: ``[B, D + 1]`` int64 code positions of the slots, named when a row is bad.
        warp: the settings of ``warp_logits``.
    """
    if k_seq or draft.probs is not None or not use_triton(logits):
        law = laws_of(logits, **warp)
        return walk_tree(law, draft, uniforms, limit=limit, relaxation=relaxation, forced=forced, k_seq=k_seq)
    levels = draft.tree.max_depth + 1
    found = walk_on_chip(
        logits,
        draft.tokens,
        draft.tree.children,
        uniforms,
        levels=levels,
        positions=positions[:, :levels],
        limit=limit,
        laws=draft.laws,
        law_of=draft.law_of,
        replacement=draft.replacement,
        relaxation=relaxation,
        forced=None if forced is None else forced[:, :levels],
        **warp,
    )
    return Walk(*found)


def walk_tree(
    law: Law,
    draft: TreeDraft,
    uniforms: Tensor,
    *,
    limit: Tensor | None = None,
    relaxation: Relaxation | None = None,
    forced: Tensor | None = None,
    k_seq: bool = False,
    record: bool = False,
) -> Walk:
    """Test proposals from the root on, in the order of the children.

    Args:
        law: target law behind a node, see ``laws_of``.
        draft: proposals.
        uniforms: ``[B, U]`` float32 in [0, 1), used one a test in order; U >= n - 1.
        limit: ``[B]`` int64 slots left, 0 for a finished image; None = more than D. The last slot left is never proposed
            for, whatever the tree holds, so that an image does not depend on how deep the others of its batch may go.
        relaxation: LANTERN; None is exact.
        forced: ``[B, D + 1]`` int64 code that a slot must hold, -1 where free.
        k_seq: test the children of a node as K-SEQ does; needs independent draws.
        record: also return the chances.
    """
    if k_seq and draft.laws is not None and not (draft.replacement and relaxation is None):
        raise ValueError("K-SEQ is exact and tests independent draws: it takes no relaxation and no other proposals")
    state = _Progress.start(draft, uniforms, limit, record)
    for level in range(state.path.shape[1]):
        images = state.waiting(level)
        if not len(images):
            break
        nodes = state.path[images, level]
        p = law(images, nodes)
        if state.law is None:
            state.law = torch.zeros(len(draft.tokens), p.shape[-1], dtype=p.dtype, device=p.device)
            state.law[:, 0] = 1.0
        if forced is not None:
            code = forced[images, level, None]
            p = torch.where(code >= 0, torch.zeros_like(p).scatter_(1, code.clamp(min=0), 1.0), p)
        live = state.alive[images]
        visit = _visit_k_seq if k_seq else _visit
        kids, codes = _children(draft, images, nodes)
        codes = codes.where((level + 1 < state.limit[images])[:, None], -1)
        child, p = visit(state, images, kids, codes, live, p, _draft_law(draft, images, nodes), draft, relaxation)
        state.move(images, level, child, live, p, draft.tokens)
    law_behind = state.uniforms[:, :0] if state.law is None else state.law  # None: no image had a slot left
    return Walk(
        state.path, state.tokens, state.count, law_behind, state.used, state.relaxed, state.chances if record else None
    )


@dataclass
class _Progress:
    path: Tensor
    tokens: Tensor
    count: Tensor
    alive: Tensor
    limit: Tensor
    used: Tensor
    relaxed: Tensor
    uniforms: Tensor
    chances: Tensor | None
    law: Tensor | None = None

    @classmethod
    def start(cls, draft: TreeDraft, uniforms: Tensor, limit: Tensor | None, record: bool) -> _Progress:
        batch, device = len(draft.tokens), draft.tokens.device
        deepest = draft.tree.max_depth
        none = torch.zeros(batch, dtype=torch.int64, device=device)
        limit = torch.full_like(none, deepest + 1) if limit is None else limit
        path = torch.zeros(batch, deepest + 1, dtype=torch.int64, device=device)
        chances = torch.zeros_like(uniforms) if record else None
        tokens = torch.full_like(path, -1)
        return cls(path, tokens, none, limit > 0, limit, none.clone(), none.clone(), uniforms, chances)

    def waiting(self, level: int) -> Tensor:
        """Images to look at: those still walking on the CPU, all of them where asking would stop the device."""
        if self.alive.device.type == "cpu":
            return self.alive.nonzero().flatten()
        return torch.arange(len(self.alive), device=self.alive.device)

    def test(self, images: Tensor, testing: Tensor, mass: Tensor, own: Tensor, q: Tensor) -> Tensor:
        """Spend one uniform on every row of ``testing [b]``; return which pass."""
        at = self.used[images]
        u = self.uniforms[images, at]
        kept = testing & (q > 0) & passes(mass, q, u)
        if self.chances is not None:
            chance = torch.where(q > 0, (mass / q.clamp(min=1e-30)).clamp(max=1.0), 0.0)
            self.chances[images, at] = chance.where(testing, self.chances[images, at])
        self.used[images] = at + testing
        self.relaxed[images] += kept & ~passes(own, q, u)
        return kept

    def move(self, images: Tensor, level: int, child: Tensor, live: Tensor, p: Tensor, tokens: Tensor) -> None:
        """Step to the accepted children, or stop with the law that is left."""
        assert self.law is not None
        went = child >= 0
        self.law[images] = torch.where((live & ~went)[:, None], p, self.law[images])
        if level + 1 < self.path.shape[1]:
            self.path[images, level + 1] = child.clamp(min=0).where(went, self.path[images, level + 1])
        code = tokens[images, child.clamp(min=0)]
        self.tokens[images, level] = code.where(went, self.tokens[images, level])
        self.count = self.count.index_add(0, images, went.long())
        self.alive[images] = went


def _children(draft: TreeDraft, images: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Children ``[b, C]`` of nodes and their codes, -1 where there is none."""
    tree = draft.tree
    kids = tree.children[images if len(tree.children) > 1 else torch.zeros_like(images), nodes]
    codes = draft.tokens[images[:, None], kids.clamp(min=0)].where(kids >= 0, -1)
    return kids, codes


def _draft_law(draft: TreeDraft, images: Tensor, nodes: Tensor) -> Tensor | None:
    if draft.laws is None:
        return None
    assert draft.law_of is not None
    return draft.laws[images, draft.law_of[nodes].clamp(min=0)]


def _visit(
    state: _Progress,
    images: Tensor,
    kids: Tensor,
    codes: Tensor,
    live: Tensor,
    p: Tensor,
    q: Tensor | None,
    draft: TreeDraft,
    relaxation: Relaxation | None,
) -> tuple[Tensor, Tensor]:
    """Test the children of one node an image; return the accepted child (-1 if none) and the law that is left."""
    fallback, child = p, torch.full_like(images, -1)
    if relaxation is not None and relaxation.residual.startswith("upstream"):
        fallback = torch.full_like(p, 1.0 / p.shape[-1])
    for j in range(kids.shape[1]):
        code = codes[:, j].clamp(min=0)
        testing = live & (child < 0) & (codes[:, j] >= 0)
        if not draft.replacement and j > 0:
            testing = testing & (codes[:, :j] != codes[:, j, None]).all(-1)
        if testing.device.type == "cpu" and not bool(testing.any()):
            continue
        found = aggregate(p, code, relaxation)
        if draft.probs is not None:
            share = draft.probs[images, kids[:, j].clamp(min=0)]
        else:
            share = torch.ones_like(found.own) if q is None else q.gather(1, code[:, None])[:, 0]
        kept = state.test(images, testing, found.mass, found.own, share)
        missed = testing & ~kept & (share > 0)
        if missed.device.type != "cpu" or bool(missed.any()):
            left = normalized(after_rejection(p, q, code, found, relaxation), fallback)
            p = torch.where(missed[:, None], left, p)
        child = torch.where(kept, kids[:, j], child)
        if q is not None and not draft.replacement:
            q = q.scatter(1, code[:, None], 0.0).where(testing[:, None], q)
            q = q / q.sum(-1, keepdim=True).clamp(min=1e-30)
    return child, p


def _visit_k_seq(
    state: _Progress,
    images: Tensor,
    kids: Tensor,
    codes: Tensor,
    live: Tensor,
    p: Tensor,
    q: Tensor | None,
    draft: TreeDraft,
    relaxation: Relaxation | None,
) -> tuple[Tensor, Tensor]:
    child = torch.full_like(images, -1)
    if q is None:  # nothing is proposed behind the last slot
        return child, p
    number = (codes >= 0).sum(-1)
    rho = k_seq_factor(p, q, number)
    for j in range(kids.shape[1]):
        code = codes[:, j].clamp(min=0)
        own = p.gather(1, code[:, None])[:, 0]
        share = (rho * q.gather(1, code[:, None])[:, 0]).to(p.dtype)
        kept = state.test(images, live & (child < 0) & (codes[:, j] >= 0), own, own, share)
        child = torch.where(kept, kids[:, j], child)
    left = normalized(k_seq_residual(p, q, number, rho).to(p.dtype), p)
    return child, torch.where((number > 0)[:, None], left, p)
