"""Fill trees of proposals from a draft model: fixed shapes with sampled codes, or the likeliest paths (EAGLE-2).

A draft model is anything with ``extend`` and ``expand`` as below: the drafter of EAGLE (arXiv:2401.15077), or a small
backbone behind ``BackboneDrafts``.

Siblings are drawn with the noise of their slot, which all nodes of a level share: verification looks at one node a level, so what
it sees is as independent as with noise of its own, and a slot proposed again after a rejection was never looked at before.

Letters: A images, G guidance branches, V codes, n nodes, w nodes of a level, C children, K children and frontier of EAGLE-2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vargen.protocols import Backbone
from vargen.samplers.drafters.tree import Tree, TreeDraft

Proposal = Literal["without_replacement", "with_replacement", "top"]
PROPOSALS = ("without_replacement", "with_replacement", "top")

Warp = Callable[[Tensor], Tensor]  # raw logits [G, A, w, V] -> log-weights [A, w, V]
LevelNoise = Callable[[int, int], Tensor]  # (level, C) -> Gumbel rows [A, V], or uniforms [A, C] with replacement


class DraftModel(Protocol):
    """The drafting side of one decode."""

    num_forwards: int
    reads_hidden: bool  # whether ``extend`` needs the target's hidden states

    def extend(self, codes: Tensor, hidden: Tensor | None, num: Tensor) -> Tensor:
        """Append the first ``num [A]`` of the permanent ``codes [A, w]``; return raw logits ``[G, A, V]`` behind them."""
        ...

    def expand(self, codes: Tensor, parents: Tensor) -> Tensor:
        """Read drafted nodes ``codes [A, w]``; return raw logits ``[G, A, w, V]`` behind them.

        ``parents [A, w]`` number the nodes read since ``extend``, -1 is the last permanent code.
        """
        ...

    def select(self, rows: Tensor) -> None:
        """Keep these images."""
        ...


class BackboneDrafts:
    """A small causal backbone as draft model.

    Nodes are read together with all nodes before them, which needs no more than the window session.

    Args:
        backbone: the small model; without tree masks it can draft chains only.
        condition: as for the target.
        guidance_scale: of the sampler; decides the branches.
        max_nodes: most codes read in one forward.
        chain: nodes form a chain, so that causal order says everything.
    """

    reads_hidden = False

    def __init__(self, backbone: Backbone, condition: Any, guidance_scale: Any, max_nodes: int, chain: bool) -> None:
        self.backbone, self.chain = backbone, chain
        prepared = backbone.prepare(condition, guidance_scale=guidance_scale)
        self.session, _ = backbone.open(prepared, max_window=max_nodes)
        self.num_forwards = 1
        self.codes = self.mask = torch.empty(0)

    def extend(self, codes: Tensor, hidden: Tensor | None, num: Tensor) -> Tensor:
        """Feed permanent codes."""
        out = self.backbone.step(self.session, codes.clamp(min=0))
        self.backbone.commit(self.session, num)
        self.num_forwards += 1
        self.codes = codes[:, :0]
        self.mask = torch.zeros(len(codes), 0, 0, dtype=torch.bool, device=codes.device)
        last = (num - 1).clamp(min=0)[None, :, None, None]
        return out.logits.gather(2, last.expand(out.logits.shape[0], -1, 1, out.logits.shape[-1]))[:, :, 0]

    def expand(self, codes: Tensor, parents: Tensor) -> Tensor:
        """Feed all nodes since ``extend`` under the mask of their tree."""
        before, width = self.codes.shape[1], codes.shape[1]
        above = F.pad(self.mask, (0, width, 1, 0))
        grown = above.gather(1, (parents + 1)[..., None].expand(-1, -1, before + width))
        grown[:, :, before:] |= torch.eye(width, dtype=torch.bool, device=codes.device)
        self.mask = torch.cat([above[:, 1:], grown], dim=1)
        self.codes = torch.cat([self.codes, codes.clamp(min=0)], dim=1)
        if self.chain:
            out = self.backbone.step(self.session, self.codes)
        else:
            slots = self.session.length[:, None] + self.mask.sum(-1) - 1
            out = self.backbone.step(self.session, self.codes, slots=slots, mask=self.mask)
        self.num_forwards += 1
        return out.logits[:, :, before:]

    def select(self, rows: Tensor) -> None:
        """Keep these images."""
        self.backbone.select(self.session, rows)
        self.codes, self.mask = self.codes[rows], self.mask[rows]


def draft_fixed(
    model: DraftModel,
    root: Tensor,
    tree: Tree,
    *,
    warp: Warp,
    proposal: Proposal,
    noise: LevelNoise | None = None,
    forced: Tensor | None = None,
) -> TreeDraft:
    """Put codes on a shared tree, level by level.

    Args:
        model: draft model, its last verified code is node 0.
        root: ``[G, A, V]`` raw logits behind node 0.
        tree: the shape.
        warp: the sampler's guidance, temperature and truncation.
        proposal: how siblings are chosen: drawn with or without replacement, or the likeliest ("top", then the draft has
            no distributions).
        noise: of a level; not read for "top".
        forced: ``[A, D + 1]`` int64 code that a slot must hold, -1 where free.
    """
    images = root.shape[1]
    tokens = torch.full((images, tree.num_nodes), -1, device=root.device)
    tokens[:, 0] = 0
    probs: list[Tensor] = []
    row_of = torch.full((tree.num_nodes,), -1)
    number: dict[int, int] = {}  # node -> its place among the nodes read
    children, parents = tree.children[0].tolist(), tree.parents[0].tolist()
    for level, nodes in enumerate(tree.inner()):
        raw = root[:, :, None]
        if level > 0:
            above = torch.tensor([number.get(parents[node], -1) for node in nodes], device=root.device)
            raw = model.expand(tokens[:, nodes].clamp(min=0), above.expand(images, -1))
            number.update({node: len(number) + i for i, node in enumerate(nodes)})
        z = warp(raw)  # A w V
        code = None if forced is None else forced[:, level]
        if code is not None:
            point = torch.full_like(z, float("-inf")).scatter_(
                2, code.clamp(min=0)[:, None, None].expand(-1, len(nodes), 1), 0.0
            )
            z = torch.where((code >= 0)[:, None, None], point, z)
        count = max(len([kid for kid in children[node] if kid >= 0]) for node in nodes)
        drawn, q = _siblings(z, count, proposal, None if noise is None else noise(level, count))
        for i, node in enumerate(nodes):
            kids = [kid for kid in children[node] if kid >= 0]
            tokens[:, kids] = drawn[:, i, : len(kids)].where(tokens[:, node, None] >= 0, -1)
        if q is not None:
            row_of[nodes] = torch.arange(len(nodes)) + sum(part.shape[1] for part in probs)
            probs.append(q)
    sampled = proposal != "top"
    return TreeDraft(
        tree,
        tokens,
        torch.cat(probs, dim=1) if sampled and probs else None,
        row_of.to(root.device) if sampled else None,
        replacement=proposal == "with_replacement",
    )


def _siblings(z: Tensor, count: int, proposal: Proposal, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Codes ``[A, w, C]`` of siblings, -1 where the support ends, and the distributions ``[A, w, V]`` of drawn ones."""
    if proposal == "top":
        return _pad(*z.topk(min(count, z.shape[-1]), dim=-1), count), None
    assert noise is not None
    q = z.softmax(-1)
    if proposal == "with_replacement":
        mass = q.double().cumsum(-1)
        point = noise.double()[:, None] * mass[..., -1:]
        codes = torch.searchsorted(mass, point.expand(-1, z.shape[1], -1).contiguous(), right=True)
        return codes.clamp(max=z.shape[-1] - 1), q
    score = z + noise[:, None]  # Gumbel-top-k draws without replacement, in this order
    return _pad(*score.topk(min(count, z.shape[-1]), dim=-1), count), q


def _pad(best: Tensor, codes: Tensor, count: int) -> Tensor:
    return F.pad(codes.where(best > float("-inf"), -1), (0, count - codes.shape[-1]), value=-1)


def draft_likeliest(
    model: DraftModel,
    root: Tensor,
    *,
    warp: Warp,
    depth: int,
    branching: int,
    num_nodes: int,
    limit: Tensor | None = None,
    leaf_order: bool = False,
) -> TreeDraft:
    """Grow a tree towards the likeliest paths and keep its best nodes (EAGLE-2, arXiv:2406.16858).

    Args:
        model, root, warp: as in ``draft_fixed``.
        depth: longest path of proposals.
        branching: K, children looked at of every node and nodes read a level.
        num_nodes: n, node 0 included.
        limit: ``[A]`` int64 slots left of each image; deeper paths than those take no nodes from others.
        leaf_order: see ``Tree.from_parents``.
    """
    size = branching
    score, code = warp(root[:, :, None])[:, 0].log_softmax(-1).topk(size, dim=-1)  # A K
    device, images = root.device, root.shape[1]
    scores, codes, above = [score], [code], [torch.full_like(code, -1)]
    ids = torch.arange(size, device=device).expand(images, -1)  # of the frontier in the list of all nodes looked at
    reads = torch.full_like(code, -1)  # number of the read node above each frontier node
    for step in range(depth - 1):
        log_q = warp(model.expand(code, reads)).log_softmax(-1)  # A K V
        best, found = log_q.topk(size, dim=-1)
        grown = (score[..., None] + best).flatten(1)  # A K*K
        if limit is not None:
            grown = grown.masked_fill((step + 2 >= limit)[:, None], float("-inf"))
        scores.append(grown)
        codes.append(found.flatten(1))
        above.append(ids.repeat_interleave(size, dim=1))
        score, place = grown.topk(size, dim=-1)
        code = codes[-1].gather(1, place)
        ids = size + size * size * step + place
        reads = size * step + place // size
    return _best_nodes(torch.cat(scores, 1), torch.cat(codes, 1), torch.cat(above, 1), depth, num_nodes, leaf_order)


def _best_nodes(
    scores: Tensor, codes: Tensor, above: Tensor, depth: int, num_nodes: int, leaf_order: bool
) -> TreeDraft:
    """Keep the nodes of the highest scores; parents never score less than their children, and stand before them."""
    images, total = scores.shape
    kept = min(num_nodes - 1, total)
    ids = scores.sort(dim=-1, descending=True, stable=True).indices[:, :kept].sort(-1).values
    node_of = torch.zeros(images, total, dtype=torch.int64, device=scores.device)
    node_of.scatter_(1, ids, torch.arange(1, kept + 1, device=scores.device).expand(images, -1))
    over = above.gather(1, ids)
    parents = torch.where(over >= 0, node_of.gather(1, over.clamp(min=0)), 0)
    parents = F.pad(parents, (1, 0), value=-1)
    tokens = codes.gather(1, ids).where(scores.gather(1, ids) > float("-inf"), -1)
    most = min(kept, codes.shape[1])
    tree = Tree.from_parents(parents, depth, max_children=most if most < 10 else 10, leaf_order=leaf_order)
    return TreeDraft(tree, F.pad(tokens, (1, 0)))
