"""Greedy decoding of trees, with LANTERN's aggregated mass where it is relaxed (arXiv:2410.03355).

Every proposal is looked at on its own, and the longest accepted path is kept.

Letters: B images, n nodes, D depth, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vargen.kernels.tree.lantern import Relaxation, aggregate
from vargen.kernels.tree.types import AcceptedPath
from vargen.samplers.acceptance.base import Noise, Rows
from vargen.samplers.acceptance.tree import TreeRule, guided
from vargen.samplers.drafters.tree import Tree, TreeDraft

BATCH_CODES = 1 << 22  # probabilities looked at together


@dataclass(frozen=True)
class Greedy(TreeRule):
    """Keep what the target would choose itself."""

    relaxation: Relaxation | None = None

    def find_path(self, rows: Rows, draft: TreeDraft, noise: Noise) -> AcceptedPath:
        """Find the longest path of choices."""
        return verify_greedy(
            guided(rows, draft), draft, limit=rows.num_rows, relaxation=self.relaxation, forced=rows.forced
        )

    def choose_behind(self, found: AcceptedPath, rows: Rows, noise: Noise) -> Tensor:
        """The token behind the path is chosen already."""
        return found.tokens


def verify_greedy(
    logits: Tensor,
    draft: TreeDraft,
    *,
    limit: Tensor | None = None,
    relaxation: Relaxation | None = None,
    forced: Tensor | None = None,
) -> AcceptedPath:
    """Keep the longest path of proposals that the target would choose itself.

    A proposal is accepted when it is the most likely code behind its parent, with its own entry replaced by the aggregated
    mass. The code behind the path is the most likely one, unrelaxed.

    Args:
        logits: ``[B, n, V]`` guided logits; temperature and truncation do not touch an argmax.
        draft: proposals.
        limit: ``[B]`` int64 slots left, see ``vargen.kernels.tree.verify``; None = more than D.
        relaxation: LANTERN; None is exact.
        forced: ``[B, D + 1]`` int64 code that a slot must hold, -1 where free.
    """
    best = logits.argmax(-1)  # B n
    if forced is not None:
        code = forced.gather(1, draft.tree.depth.expand(len(forced), -1))
        best = code.where(code >= 0, best)
    above = draft.tree.parents.clamp(min=0).expand_as(draft.tokens)
    accepted = draft.tokens == best.gather(1, above)
    if relaxation is not None:
        fits = _largest_when_aggregated(logits, draft, above, relaxation)
        if forced is not None:
            fits = fits & (code.gather(1, above) < 0)
        accepted = accepted | fits
    exact = draft.tokens == best.gather(1, above)
    return longest_path(draft, accepted & (draft.tokens >= 0), exact, best, limit)


def _largest_when_aggregated(logits: Tensor, draft: TreeDraft, above: Tensor, relaxation: Relaxation) -> Tensor:
    batch, n, num_codes = logits.shape
    rows = torch.arange(batch * n, device=logits.device)
    flat, parent = draft.tokens.clamp(min=0).flatten(), (above + torch.arange(batch, device=rows.device)[:, None] * n)
    fits = []
    for part in rows.split(max(1, BATCH_CODES // num_codes)):
        p = logits.flatten(0, 1)[parent.flatten()[part]].softmax(-1)
        mass = aggregate(p, flat[part], relaxation).mass
        fits.append(p.scatter(1, flat[part, None], mass[:, None]).argmax(-1) == flat[part])
    return torch.cat(fits).view(batch, n)


def longest_path(
    draft: TreeDraft,
    accepted: Tensor,
    exact: Tensor,
    best: Tensor | None,
    limit: Tensor | None,
    score: Tensor | None = None,
) -> AcceptedPath:
    """The deepest node whose whole path is accepted; the highest score, then the earliest path, among equals."""
    tree: Tree = draft.tree
    batch, n = draft.tokens.shape
    root = (tree.parents < 0).expand(batch, -1)
    mask, depth = tree.mask.expand(batch, -1, -1), tree.depth.expand(batch, -1)
    reached = ((accepted | root)[:, None] | ~mask).all(-1)
    limit = torch.full_like(draft.tokens[:, 0], tree.max_depth + 1) if limit is None else limit
    reached = reached & (depth < limit[:, None].clamp(min=1))  # the last slot left is never proposed for
    reached = reached & (depth == torch.where(reached, depth, -1).amax(-1, keepdim=True))
    if score is not None:
        reached = reached & (score == torch.where(reached, score, float("-inf")).amax(-1, keepdim=True))
    end = torch.where(reached, tree.order.expand(batch, -1), torch.iinfo(torch.int64).max).argmin(-1)  # B
    on_path = mask[torch.arange(batch, device=end.device), end]  # B n
    width = tree.max_depth + 1
    place = torch.where(on_path, depth, width)
    path = torch.zeros(batch, width + 1, dtype=torch.int64, device=end.device)
    path = path.scatter(1, place, torch.arange(n, device=end.device).expand(batch, -1))[:, :width]
    count = depth.gather(1, end[:, None])[:, 0]
    column = torch.arange(width, device=end.device)
    tokens = draft.tokens.gather(1, path).roll(-1, 1).where(column < count[:, None], -1)
    relaxed = (on_path & ~exact & ~root).sum(-1)
    nothing = torch.zeros(batch, 0, device=end.device)
    if best is not None:  # the choice behind the path
        choice = best.gather(1, end[:, None])
        tokens = torch.where(column == count[:, None], choice, tokens)
    return AcceptedPath(path, tokens, count, nothing, torch.zeros_like(count), relaxed)
