"""Typical acceptance (Medusa: Cai et al., 2024, arXiv:2401.10774): keep what is likely enough; heuristic.

Letters: B images, n nodes, D depth, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vargen.kernels.tree.types import AcceptedPath
from vargen.kernels.warp import combine
from vargen.samplers.acceptance.base import Noise, Rows
from vargen.samplers.acceptance.greedy import longest_path
from vargen.samplers.acceptance.tree import TreeRule
from vargen.samplers.drafters.tree import TreeDraft

ENTROPY_FLOOR = 1e-5  # of the probability inside the logarithm, as released


@dataclass(frozen=True)
class Typical(TreeRule):
    """The thresholds are those of ``verify_typical``."""

    epsilon: float = 0.09
    alpha: float = 0.3

    def find_path(self, rows: Rows, draft: TreeDraft, noise: Noise) -> AcceptedPath:
        """Find the longest path of likely proposals."""
        return verify_typical(
            combine(rows.logits, rows.warp["guidance_scale"], 0),
            draft,
            temperature=rows.warp["temperature"],
            epsilon=self.epsilon,
            alpha=self.alpha,
            limit=rows.num_rows,
            forced=rows.forced,
        )


def verify_typical(
    logits: Tensor,
    draft: TreeDraft,
    *,
    temperature: float = 1.0,
    epsilon: float = 0.09,
    alpha: float = 0.3,
    limit: Tensor | None = None,
    forced: Tensor | None = None,
) -> AcceptedPath:
    """Keep the longest path of proposals with ``p(x) > min(epsilon, alpha * exp(-entropy))``.

    Args:
        logits: ``[B, n, V]`` guided logits.
        draft: proposals of a deterministic drafter.
        temperature: divides the logits; positive.
        epsilon: threshold of peaked distributions.
        alpha: share of the typical probability of flat ones.
        limit, forced: as in ``verify_greedy``.

    Returns:
        The path; the distribution of the code behind it is cut at the same threshold.
    """
    p = (logits / temperature).softmax(-1)
    if forced is not None:
        code = forced.gather(1, draft.tree.depth.expand(len(forced), -1))[..., None]
        p = torch.where(code >= 0, torch.zeros_like(p).scatter_(-1, code.clamp(min=0), 1.0), p)
    entropy = -(p * (p + ENTROPY_FLOOR).log()).sum(-1)
    threshold = (alpha * (-entropy).exp()).clamp(max=epsilon)  # B n
    above = draft.tree.parents.clamp(min=0).expand_as(draft.tokens)
    own = p.gather(1, above[..., None].expand_as(p)).gather(-1, draft.tokens.clamp(min=0)[..., None])[..., 0]
    accepted = (own > threshold.gather(1, above)) & (draft.tokens >= 0)
    score = own.log().masked_fill(draft.tree.parents.expand_as(own) < 0, 0.0)
    seen = draft.tree.mask.expand(len(score), -1, -1)
    found = longest_path(draft, accepted, accepted, None, limit, torch.where(seen, score[:, None], 0.0).sum(-1))
    node = found.path.gather(1, found.num_accepted.clamp(max=found.path.shape[1] - 1)[:, None])
    left = p.gather(1, node[..., None].expand(-1, -1, p.shape[-1]))[:, 0]
    typical = left > threshold.gather(1, node)
    left = torch.where(typical.any(-1, keepdim=True), left * typical, left)
    found.distribution = left / left.sum(-1, keepdim=True)
    return found
