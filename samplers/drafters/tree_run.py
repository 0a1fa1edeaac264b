"""The drafter of one run of tree decoding: feeds the draft model what became permanent and asks it for the next tree.

Letters: A images, G guidance branches, V codes, n nodes, w slots an iteration may decide, T condition positions, D width.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vargen.features import Feature
from vargen.kernels.verify.types import VerifyOutcome
from vargen.kernels.warp import combine, warp_logits
from vargen.protocols import Backbone
from vargen.random import Stream, gumbel, uniform
from vargen.samplers.acceptance.tree import TreeOutcome
from vargen.samplers.drafters.base import check_drafter
from vargen.samplers.drafters.tree import Tree, TreeDraft
from vargen.samplers.drafters.tree_drafts import BackboneDrafts, DraftModel, draft_fixed, draft_likeliest


def check_draft_model(sampler: Any, backbone: Backbone, drafter: Any) -> None:
    """Raise ``ValueError`` unless ``drafter`` can draft for the backbone."""
    if drafter is None:
        raise ValueError(
            f"{type(sampler).__name__} needs drafter=, an EagleDrafter of the backbone (pipe.eagle) or a small backbone over "
            "the same codes (pipe.drafter)"
        )
    if hasattr(drafter, "open_drafts"):
        drafter.check_backbone(backbone)
        return
    check_drafter(type(sampler).__name__, backbone, drafter)
    if sampler.tree != "chain" and sampler.reach > 2 and Feature.TREE_MASK not in drafter.features:
        raise ValueError(
            f"tree {sampler.tree!r} needs a drafter with tree_mask, which {type(drafter).__name__} does not offer; "
            "take tree='chain'"
        )


def open_draft_model(sampler: Any, state: Any, drafter: Any, condition: Any) -> DraftModel:
    """Start the drafting side of a run."""
    nodes = sampler.num_rows if sampler.tree != "dynamic" else sampler.branching * sampler.depth
    if hasattr(drafter, "open_drafts"):
        options = {"branches": state.hidden.shape[0], "batch": len(state.rows), "max_nodes": nodes}
        return drafter.open_drafts(state.backbone, **options)
    window = max(nodes, sampler.reach)
    return BackboneDrafts(drafter, condition, sampler.guidance_scale, window, sampler.tree == "chain")


class TreeRun:
    """Proposes a tree for every image; holds the draft model and the counts of a run."""

    in_tree = True  # what it proposes is scored as a tree

    def __init__(self, sampler: Any, model: DraftModel, learns: bool = False) -> None:
        self.sampler, self.model, self.learns = sampler, model, learns
        self.shapes: dict[int, Tree] = {}
        self.trees = torch.zeros(sampler.reach + 1, dtype=torch.int64)  # by number of proposals kept
        self.tests = torch.zeros(2, dtype=torch.int64)  # made, passed by relaxation only
        self.drafted: TreeDraft | None = None  # what was proposed last, for drafters that learn from its scores

    @property
    def num_forwards(self) -> int:
        """Forward passes of the draft model."""
        return self.model.num_forwards

    def commit(self, count: Tensor) -> None:
        """Nothing yet: ``propose`` reads what became permanent from the outcome."""

    def select(self, rows: Tensor) -> None:
        """Keep these images."""
        self.model.select(rows)
        self.drafted = None if self.drafted is None else self.drafted.select(rows)

    def propose(self, state: Any, logits: Tensor, outcome: Any, slots: Tensor, num_rows: Tensor) -> TreeDraft:
        """Extend the draft model by the permanent codes and fill a tree behind them."""
        if self.drafted is not None:
            self.model.watch(self.drafted, combine(logits, self.sampler.guidance_scale, 0))  # type: ignore[attr-defined]
        draft = self._fill(state, outcome)
        if self.learns:
            self.drafted = replace(draft, tokens=torch.cat([state.last_codes(), draft.tokens[:, 1:]], dim=1))
        return draft

    def _fill(self, state: Any, outcome: Any) -> TreeDraft:
        if state.width == 1:  # the last slot of all images: nothing will be decided behind it
            return TreeDraft(self._shape(1, state.keys.device), state.last_codes())
        root = self.model.extend(*self._news(state, outcome))
        s = self.sampler
        if s.tree == "dynamic":
            return self._likeliest(state, root)
        return draft_fixed(
            self.model,
            root,
            self._shape(state.width, state.keys.device),
            warp=self._warp,
            proposal=s.chosen_proposal,
            noise=lambda level, count: self._noise(state, level, count),
            forced=None if state.forced is None else state.forced.gather(1, state.next_slots()),
        )

    def count(self, outcome: TreeOutcome) -> None:
        """Add the outcome of an iteration to the statistics."""
        device, live = outcome.path.device, outcome.num_committed > 0
        if self.trees.device != device:
            self.trees, self.tests = self.trees.to(device), self.tests.to(device)
        self.trees += F.one_hot(outcome.num_accepted, len(self.trees)).masked_fill(~live[:, None], 0).sum(0)
        self.tests += torch.stack([outcome.num_tests.sum(), outcome.num_relaxed.sum()])

    def summary(self) -> dict[str, Any]:
        """Plain numbers for ``stats.extra``.

        ``mean_accepted``: proposals kept an iteration and image. ``acceptance_by_depth``: entry d, of the trees that
        reached depth d how many went on. ``num_tests``: proposals tested. ``relaxed_share``: of the proposals kept, those
        that the exact rule would have rejected with the same numbers.
        """
        trees = self.trees.tolist()
        kept = sum(n * count for n, count in enumerate(trees))
        reached = [sum(trees[d:]) for d in range(len(trees))]
        ratios = [after / before for before, after in pairwise(reached) if before]
        tests, relaxed = self.tests.tolist()
        return {
            "mean_accepted": kept / max(sum(trees), 1),
            "acceptance_by_depth": ratios[: self.sampler.reach - 1],
            "num_tests": tests,
            "relaxed_share": relaxed / max(kept, 1),
        }

    def _news(self, state: Any, outcome: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        """Permanent codes ``[A, w]``, the hidden states before them ``[G, A, w, D]`` and how many count ``[A]``."""
        num = outcome.num_committed
        if not isinstance(outcome, VerifyOutcome):
            hidden = outcome.hidden.permute(2, 0, 1, 3) if self.model.reads_hidden else None
            return outcome.tokens, hidden, num
        codes = outcome.tokens[:, :1]  # of the prefill
        if not self.model.reads_hidden:
            return codes, None, num
        hidden, state.hidden = state.hidden, None
        before = hidden.shape[2] - 1  # condition positions in front of the last have no code behind them
        return F.pad(codes, (before, 0)), hidden, num + before

    def _shape(self, width: int, device: torch.device) -> Tree:
        """The part of the tree that ``width`` slots can use."""
        if width not in self.shapes:
            full: Tree = Tree.chain(1) if self.sampler.tree == "dynamic" else self.sampler.shape
            used = int((full.depth[0] < width).sum())
            self.shapes[width] = full.narrow(used).to(device)
        return self.shapes[width]

    def _likeliest(self, state: Any, root: Tensor) -> TreeDraft:
        s = self.sampler
        size = min(s.branching, root.shape[-1])
        depth = state.width - 1
        draft = draft_likeliest(
            self.model,
            root,
            warp=self._warp,
            depth=depth,
            branching=size,
            num_nodes=min(s.most_nodes, 1 + size + (depth - 1) * size * size),
            limit=state.layout.num_slots - state.length,
            leaf_order=s.temperature == 0,
        )
        if state.forced is None:
            return draft
        code = state.forced.gather(1, state.next_slots()).gather(1, (draft.tree.depth - 1).clamp(min=0))
        fits = (code < 0) | (code == draft.tokens)  # others cannot be accepted; verification passes them by
        return TreeDraft(draft.tree, draft.tokens.where(fits, -1))

    def _warp(self, raw: Tensor) -> Tensor:
        return warp_logits(raw, **self.sampler.warp)  # temperature 0: guided logits, nothing removed

    def _noise(self, state: Any, level: int, count: int) -> Tensor:
        """Noise of the slot of a level; a slot is looked at in one iteration only, so it needs no number of that."""
        slot = state.next_slots()[:, level, None]
        position = state.layout.code_index[slot]  # A 1
        if self.sampler.chosen_proposal == "with_replacement":
            return uniform(state.keys, position, count, Stream.DRAFT)[:, 0]
        if state.noise is not None:
            return state.noise.rows(position)[:, 0]
        return gumbel(state.keys, position, int(state.backbone.codebook_size))[:, 0]
