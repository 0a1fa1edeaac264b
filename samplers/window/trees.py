"""Trees of proposals in the window loop: a drafter proposes a tree of codes, the backbone scores all of it in one forward.

Letters: A images, G guidance branches, V codes, n nodes of a tree, w slots an iteration may decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.outputs import SamplerOutput
from vargen.protocols import Backbone
from vargen.samplers.base import MAX_DRAFTS, Run
from vargen.samplers.drafters.tree import NAMED_TREES, Tree
from vargen.samplers.drafters.tree_run import TreeRun, check_draft_model, open_draft_model
from vargen.samplers.window.decoder import WindowInputs, WindowSampler, WindowState
from vargen.validation.checks import check_choice, check_integer

MAX_NODES = 4096  # of a tree: its mask has the square of them
TREES = (*NAMED_TREES, "chain", "siblings", "dynamic")
PROPOSALS = ("auto", "without_replacement", "with_replacement", "top")


@dataclass(frozen=True, kw_only=True)
class TreeSampler(WindowSampler):
    """Base of the samplers whose proposals may form a tree; concrete ones have the sizes of the tree as settings."""

    preferred_drafter: ClassVar[str | None] = "eagle"  # among those that a pipeline has stored by name

    tree: str = "chain"
    depth: int = 8
    branching: int = 10
    proposal: str = "auto"

    def check(self) -> None:
        """Check the shared settings and the tree."""
        super().check()
        check_choice("tree", self.tree, TREES)
        check_choice("proposal", self.proposal, PROPOSALS)
        check_integer("depth", self.depth, low=1, high=MAX_DRAFTS)
        check_integer("branching", self.branching, low=1, high=MAX_NODES)
        if self.tree == "dynamic" and self.depth * self.branching > MAX_NODES:
            raise ValueError(
                f"a dynamic tree may have depth * branching = {MAX_NODES}, got {self.depth} * {self.branching}"
            )
        if self.tree == "dynamic" and self.proposal not in ("auto", "top"):
            raise ValueError(
                f"a dynamic tree holds the likeliest codes: proposal must be 'top', got {self.proposal!r}"
            )

    @property
    def chain_length(self) -> int:
        """Proposals of a chain."""
        return self.depth

    @property
    def num_siblings(self) -> int:
        """Proposals of "siblings"."""
        return self.branching

    @property
    def most_nodes(self) -> int:
        """Nodes of a dynamic tree, the last permanent code included."""
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        """Nodes of the tree: codes scored in one forward pass."""
        if self.tree == "dynamic":
            return min(self.most_nodes, 1 + self.branching + (self.depth - 1) * self.branching**2)
        return 1 + self.chain_length if self.tree == "chain" else self.shape.num_nodes

    @property
    def reach(self) -> int:
        """Codes that the deepest path makes permanent, the one behind it included."""
        if self.tree == "dynamic":
            return 1 + self.depth
        return 1 + (self.chain_length if self.tree == "chain" else self.shape.max_depth)

    @property
    def shape(self) -> Tree:
        """The shape of a tree that is not dynamic."""
        return _shape(self.tree, self.chain_length, self.num_siblings)

    @property
    def chosen_proposal(self) -> str:
        """``proposal`` with "auto" decided."""
        if self.temperature == 0 or self.tree == "dynamic":
            return "top"
        return "without_replacement" if self.proposal == "auto" else self.proposal

    def begin(self, run: Run, inputs: WindowInputs) -> WindowState:
        """Commit the first code and draft the first tree."""
        if self.num_rows > self.reach and Feature.TREE_MASK not in run.backbone.features:
            raise ValueError(
                f"tree {self.tree!r} needs a backbone with tree_mask, which {type(run.backbone).__name__} does not "
                "offer; take tree='chain'"
            )
        self.check_proposer(run.backbone, run.drafter)
        return super().begin(run, inputs)

    def check_proposer(self, backbone: Backbone, drafter: Any) -> None:
        """Raise ``ValueError`` unless ``drafter`` can draft for the backbone."""
        check_draft_model(self, backbone, drafter)

    def make_drafter(self, state: WindowState, drafter: Any, condition: Any) -> Any:
        """Open the draft model."""
        return TreeRun(self, open_draft_model(self, state, drafter, condition))

    def reads_hidden(self, drafter: Any) -> bool:
        """EAGLE drafters stand on hidden states."""
        return hasattr(drafter, "open_drafts")

    def finish(self, state: WindowState) -> SamplerOutput:
        """Collect codes and statistics; ``stats.extra`` says how many proposals of trees were kept, and why."""
        if state.drafter is not None and state.drafter.in_tree:
            state.counts.update(state.drafter.summary())
        return super().finish(state)

    def _score(self, state: WindowState) -> Tensor:
        """Feed the tree: logits ``[G, A, n, V]``, one row a node."""
        if not state.drafter.in_tree:
            return super()._score(state)
        draft: Any = state.draft
        codes = torch.cat([state.last_codes(), draft.tokens[:, 1:].clamp(min=0)], dim=1)
        options: dict[str, Any] = {"hidden": True} if state.drafter.model.reads_hidden else {}
        if self.tree != "chain":  # whose order is causal
            options["slots"] = state.length[:, None] - 1 + draft.tree.depth
            options["mask"] = draft.tree.mask if len(draft.tree.mask) > 1 else draft.tree.mask[0]
        out = state.backbone.step(state.session, codes, **options)
        state.hidden = out.hidden
        return out.logits

    def _keep(self, state: WindowState, outcome: Any) -> None:
        if not state.drafter.in_tree:
            super()._keep(state, outcome)
            return
        state.drafter.count(outcome)
        state.backbone.commit(state.session, outcome.num_committed, path=outcome.path)


@lru_cache(maxsize=64)
def _shape(name: str, length: int, siblings: int) -> Tree:
    if name == "chain":
        return Tree.chain(length)
    if name == "siblings":
        return Tree.from_paths([[i] for i in range(siblings)])
    return Tree.named(name)
