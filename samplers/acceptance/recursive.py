"""Recursive rejection: siblings are tested one after the other on what each rejection leaves of the distribution.

Exact; with a relaxation it is LANTERN (arXiv:2410.03355), see ``vargen.kernels.tree.lantern`` for what that promises.
"""

from __future__ import annotations

from dataclasses import dataclass

from vargen.kernels.tree.verify import AcceptedPath, Relaxation, verify_tree
from vargen.random import Stream, uniform
from vargen.samplers.acceptance.base import Noise, Rows
from vargen.samplers.acceptance.tree import TreeRule
from vargen.samplers.drafters.tree import TreeDraft


@dataclass(frozen=True)
class Recursive(TreeRule):
    """The rule over trees, decided by the kernel ``verify_tree``."""

    relaxation: Relaxation | None = None

    def find_path(self, rows: Rows, draft: TreeDraft, noise: Noise) -> AcceptedPath:
        """Test from the root on."""
        uniforms = uniform(noise.keys, rows.positions[:, :1], draft.tree.num_nodes, Stream.ACCEPT)[:, 0]
        return verify_tree(
            rows.logits,
            draft.proposals,
            uniforms,
            positions=rows.positions,
            limit=rows.num_rows,
            relaxation=self.relaxation,
            forced=rows.forced,
            **rows.warp,
        )
