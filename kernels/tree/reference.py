"""Reference of ``vargen.kernels.tree.verify`` in PyTorch: the definition that the Triton kernel is tested against.

Nothing here draws a random number or reads a device back; on the CPU, rows that are done are left out.

p is the target distribution, q the draft's. Letters: G guidance branches (conditional first), B images, n nodes, D depth,
C children of a node, V codes, U uniforms given, b rows of a level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vargen.kernels.acceptance import NOTHING_LEFT, accept
from vargen.kernels.tree.lantern import Relaxation, after_rejection, aggregate
from vargen.kernels.tree.types import AcceptedPath, TreeProposals
from vargen.kernels.warp import WarpSettings, warp_logits

# (images [b], nodes [b]) -> probabilities [b, V] of the code behind the node
Target = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Siblings:
    """Children of one node an image, and the distributions that they are tested with.

    Args:
        images: ``[b]`` int64.
        kids, codes: ``[b, C]`` int64 children and their codes, -1 where there is none.
        live: ``[b]`` bool, images that still test.
        p: ``[b, V]`` target distributions of the node.
        q: ``[b, V]`` distributions that the codes were drawn from; None for deterministic ones.
    """

    images: Tensor
    kids: Tensor
    codes: Tensor
    live: Tensor
    p: Tensor
    q: Tensor | None

    def tested(self, j: int, child: Tensor) -> tuple[Tensor, Tensor]:
        """Code ``[b]`` of child j, 0 where there is none, and which images ``[b]`` test it: none before was accepted."""
        return self.codes[:, j].clamp(min=0), self.live & (child < 0) & (self.codes[:, j] >= 0)


class Visit(Protocol):
    """Tests siblings, spending uniforms of ``progress``."""

    def __call__(
        self, progress: Progress, siblings: Siblings, draft: TreeProposals, relaxation: Relaxation | None
    ) -> tuple[Tensor, Tensor]:
        """Return the accepted child ``[b]`` (-1 if none) and the distribution ``[b, V]`` that is left."""
        ...


def target_of(logits: Tensor, settings: WarpSettings | None = None) -> Target:
    """Target distributions of nodes from logits ``[G, B, n, V]``."""
    settings = settings or WarpSettings()
    scale = settings.guidance_scale

    def target(images: Tensor, nodes: Tensor) -> Tensor:
        of_rows = {**vars(settings), "guidance_scale": scale[images] if isinstance(scale, Tensor) else scale}
        return warp_logits(logits[:, images, nodes][:, :, None], **of_rows)[:, 0].softmax(-1)

    return target


def verify_tree_reference(
    target: Target,
    draft: TreeProposals,
    uniforms: Tensor,
    *,
    limit: Tensor | None = None,
    relaxation: Relaxation | None = None,
    forced: Tensor | None = None,
    visit: Visit | None = None,
    record: bool = False,
) -> AcceptedPath:
    """Test proposals from the root on, in the order of the children.

    Args:
        target: distribution behind a node, see ``target_of``.
        draft: proposals.
        uniforms: ``[B, U]`` float32 in [0, 1), used one a test in order; U >= n - 1.
        limit: ``[B]`` int64 slots left, 0 for a finished image; None = more than D. The last slot left is never proposed
            for, whatever the tree holds, so that an image does not depend on how deep the others of its batch may go.
        relaxation: LANTERN; None is exact.
        forced: ``[B, D + 1]`` int64 code that a slot must hold, -1 where free.
        visit: how the children of a node are tested; recursive rejection by default.
        record: also return the chances.
    """
    state = Progress.start(draft, uniforms, limit, record)
    for level in range(draft.depth + 1):
        images = state.waiting(level)
        if not len(images):
            break
        nodes = state.path[images, level]
        p = target(images, nodes)
        if state.distribution is None:
            state.distribution = torch.zeros(len(draft.tokens), p.shape[-1], dtype=p.dtype, device=p.device)
            state.distribution[:, 0] = 1.0
        if forced is not None:
            code = forced[images, level, None]
            p = torch.where(code >= 0, torch.zeros_like(p).scatter_(1, code.clamp(min=0), 1.0), p)
        live = state.alive[images]
        kids, codes = _children(draft, images, nodes)
        codes = codes.where((level + 1 < state.limit[images])[:, None], -1)
        siblings = Siblings(images, kids, codes, live, p, _draft_distribution(draft, images, nodes))
        child, p = (visit or visit_recursive)(state, siblings, draft, relaxation)
        state.move(images, level, child, live, p, draft.tokens)
    return state.found()


@dataclass
class Progress:
    """Where every image is in its tree."""

    path: Tensor
    tokens: Tensor
    count: Tensor
    alive: Tensor
    limit: Tensor
    used: Tensor
    relaxed: Tensor
    uniforms: Tensor
    chances: Tensor | None
    distribution: Tensor | None = None

    @classmethod
    def start(cls, draft: TreeProposals, uniforms: Tensor, limit: Tensor | None, record: bool) -> Progress:
        """All images at node 0."""
        batch, device = len(draft.tokens), draft.tokens.device
        none = torch.zeros(batch, dtype=torch.int64, device=device)
        limit = torch.full_like(none, draft.depth + 1) if limit is None else limit
        path = torch.zeros(batch, draft.depth + 1, dtype=torch.int64, device=device)
        chances = torch.zeros_like(uniforms) if record else None
        tokens = torch.full_like(path, -1)
        return cls(path, tokens, none, limit > 0, limit, none.clone(), none.clone(), uniforms, chances)

    def waiting(self, level: int) -> Tensor:
        """Images to look at: those not done on the CPU, all of them where asking would stop the device."""
        if self.alive.device.type == "cpu":
            return self.alive.nonzero().flatten()
        return torch.arange(len(self.alive), device=self.alive.device)

    def test(self, images: Tensor, testing: Tensor, mass: Tensor, own: Tensor, q: Tensor) -> Tensor:
        """Spend one uniform on every row of ``testing [b]``; return which pass."""
        at = self.used[images]
        u = self.uniforms[images, at]
        kept = testing & (q > 0) & accept.fn(mass, q, u)
        if self.chances is not None:
            chance = torch.where(q > 0, (mass / q.clamp(min=1e-30)).clamp(max=1.0), 0.0)
            self.chances[images, at] = chance.where(testing, self.chances[images, at])
        self.used[images] = at + testing
        self.relaxed[images] += kept & ~accept.fn(own, q, u)
        return kept

    def move(self, images: Tensor, level: int, child: Tensor, live: Tensor, p: Tensor, tokens: Tensor) -> None:
        """Step to the accepted children, or stop with the distribution that is left."""
        assert self.distribution is not None
        went = child >= 0
        self.distribution[images] = torch.where((live & ~went)[:, None], p, self.distribution[images])
        if level + 1 < self.path.shape[1]:
            self.path[images, level + 1] = child.clamp(min=0).where(went, self.path[images, level + 1])
        code = tokens[images, child.clamp(min=0)]
        self.tokens[images, level] = code.where(went, self.tokens[images, level])
        self.count = self.count.index_add(0, images, went.long())
        self.alive[images] = went

    def found(self) -> AcceptedPath:
        """What was found; without a distribution if no image had a slot left."""
        left = self.uniforms[:, :0] if self.distribution is None else self.distribution
        return AcceptedPath(self.path, self.tokens, self.count, left, self.used, self.relaxed, self.chances)


def _children(draft: TreeProposals, images: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Children ``[b, C]`` of nodes and their codes, -1 where there is none."""
    kids = draft.children[images if len(draft.children) > 1 else torch.zeros_like(images), nodes]
    codes = draft.tokens[images[:, None], kids.clamp(min=0)].where(kids >= 0, -1)
    return kids, codes


def _draft_distribution(draft: TreeProposals, images: Tensor, nodes: Tensor) -> Tensor | None:
    if draft.distributions is None:
        return None
    assert draft.row_of is not None
    return draft.distributions[images, draft.row_of[nodes].clamp(min=0)]


def normalized(weights: Tensor, fallback: Tensor) -> Tensor:
    """Divide ``weights [b, V]`` by their sum; ``fallback`` where nothing is left (p <= q in floating point)."""
    total = weights.sum(-1, keepdim=True)
    some = total > NOTHING_LEFT
    return torch.where(some, weights / total.where(some, 1.0), fallback)


def visit_recursive(
    progress: Progress, siblings: Siblings, draft: TreeProposals, relaxation: Relaxation | None
) -> tuple[Tensor, Tensor]:
    """Test each child on what the rejections before it left; a ``Visit``."""
    images, kids, codes, p, q = siblings.images, siblings.kids, siblings.codes, siblings.p, siblings.q
    fallback, child = p, torch.full_like(images, -1)
    if relaxation is not None and relaxation.residual.startswith("upstream"):
        fallback = torch.full_like(p, 1.0 / p.shape[-1])
    for j in range(kids.shape[1]):
        code, testing = siblings.tested(j, child)
        if not draft.replacement and j > 0:
            testing = testing & (codes[:, :j] != codes[:, j, None]).all(-1)
        if testing.device.type == "cpu" and not bool(testing.any()):
            continue
        found = aggregate(p, code, relaxation)
        if draft.probs is not None:
            share = draft.probs[images, kids[:, j].clamp(min=0)]
        else:
            share = torch.ones_like(found.own) if q is None else q.gather(1, code[:, None])[:, 0]
        kept = progress.test(images, testing, found.mass, found.own, share)
        missed = testing & ~kept & (share > 0)
        if missed.device.type != "cpu" or bool(missed.any()):
            left = normalized(after_rejection(p, q, code, found, relaxation), fallback)
            p = torch.where(missed[:, None], left, p)
        child = torch.where(kept, kids[:, j], child)
        if q is not None and not draft.replacement:
            q = q.scatter(1, code[:, None], 0.0).where(testing[:, None], q)
            q = q / q.sum(-1, keepdim=True).clamp(min=1e-30)
    return child, p
