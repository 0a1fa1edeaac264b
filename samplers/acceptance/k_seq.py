"""K-SEQ (SpecTr: Sun et al., 2023, arXiv:2310.15141): independent siblings, tested without updates between them.

p is the target distribution, q the draft's. Letters: b rows, V codes, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vargen.kernels.tree.lantern import Relaxation
from vargen.kernels.tree.reference import Progress, Siblings, normalized, target_of, verify_tree_reference
from vargen.kernels.tree.types import AcceptedPath, TreeProposals
from vargen.kernels.warp import WarpSettings
from vargen.random import Stream, uniform
from vargen.samplers.acceptance.base import Noise, Rows
from vargen.samplers.acceptance.tree import TreeRule
from vargen.samplers.drafters.tree import TreeDraft

KSEQ_STEPS = 40  # halvings of [1, K]: the root to double precision of what the test can see


@dataclass(frozen=True)
class KSeq(TreeRule):
    """Exact for siblings drawn with replacement; in plain PyTorch, it has no kernel."""

    def find_path(self, rows: Rows, draft: TreeDraft, noise: Noise) -> AcceptedPath:
        """Test from the root on."""
        if draft.distributions is not None and not draft.replacement:
            raise ValueError("K-SEQ is exact for independent draws only, got siblings drawn without replacement")
        uniforms = uniform(noise.keys, rows.positions[:, :1], draft.tree.num_nodes, Stream.ACCEPT)[:, 0]
        target = target_of(rows.logits, WarpSettings(**rows.warp))
        return verify_tree_reference(
            target, draft.proposals, uniforms, limit=rows.num_rows, forced=rows.forced, visit=visit_k_seq
        )


def k_seq_factor(p: Tensor, q: Tensor, count: Tensor) -> Tensor:
    """Division factor rho of K-SEQ (SpecTr: Sun et al., 2023, arXiv:2310.15141), from the valid side of the root.

    Args:
        p: ``[b, V]`` target distributions.
        q: ``[b, V]`` draft distributions.
        count: ``[b]`` int64 K, independent candidates of each row.

    Returns:
        ``[b]`` float64 in [1, K].
    """
    p, q, most = p.double(), q.double(), count.double().clamp(min=1.0)
    low, high = torch.ones_like(most), most
    for _ in range(KSEQ_STEPS):
        middle = 0.5 * (low + high)
        beta = torch.minimum(q, p / middle[:, None]).sum(-1)
        invalid = 1.0 - (1.0 - beta).clamp(min=0.0) ** most > middle * beta
        low, high = middle.where(invalid, low), high.where(invalid, middle)
    return high


def k_seq_residual(p: Tensor, q: Tensor, count: Tensor, rho: Tensor) -> Tensor:
    """Unnormalised distribution when none of K candidates passed ``u * rho * q < p``: ``[b, V]`` float64."""
    p, q = p.double(), q.double()
    common = torch.minimum(q, p / rho[:, None])
    beta = common.sum(-1)
    factor = torch.where(beta > 0, (1.0 - (1.0 - beta).clamp(min=0.0) ** count.double()) / beta, 0.0)
    return (p - common * factor[:, None]).clamp(min=0.0)


def visit_k_seq(
    progress: Progress, siblings: Siblings, draft: TreeProposals, relaxation: Relaxation | None
) -> tuple[Tensor, Tensor]:
    """Test the children without updates between them; a ``Visit``."""
    p, q = siblings.p, siblings.q
    child = torch.full_like(siblings.images, -1)
    if q is None:  # nothing is proposed behind the last slot
        return child, p
    number = (siblings.codes >= 0).sum(-1)
    rho = k_seq_factor(p, q, number)
    for j in range(siblings.kids.shape[1]):
        code, testing = siblings.tested(j, child)
        own = p.gather(1, code[:, None])[:, 0]
        share = (rho * q.gather(1, code[:, None])[:, 0]).to(p.dtype)
        kept = progress.test(siblings.images, testing, own, own, share)
        child = torch.where(kept, siblings.kids[:, j], child)
    left = normalized(k_seq_residual(p, q, number, rho).to(p.dtype), p)
    return child, torch.where((number > 0)[:, None], left, p)
