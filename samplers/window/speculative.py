"""Speculative decoding with a drafter: chains and trees of proposals, scored by the target in one forward pass.

Leviathan et al., 2023, arXiv:2211.17192 and Chen et al., 2023, arXiv:2302.01318 for chains; SpecInfer (arXiv:2305.09781),
SpecTr (arXiv:2310.15141) and EAGLE (arXiv:2401.15077) for trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

from vargen.outputs import Guarantee
from vargen.protocols import Backbone
from vargen.samplers.acceptance.base import Rule
from vargen.samplers.acceptance.greedy import Greedy
from vargen.samplers.acceptance.k_seq import KSeq
from vargen.samplers.acceptance.recursive import Recursive
from vargen.samplers.acceptance.rejection import Rejection
from vargen.samplers.acceptance.shared_noise import SharedNoise
from vargen.samplers.acceptance.shared_noise_tree import SharedNoiseTree
from vargen.samplers.acceptance.typical import Typical
from vargen.samplers.base import MAX_DRAFTS, Run
from vargen.samplers.drafters.base import check_drafter
from vargen.samplers.drafters.chain import ChainDrafter
from vargen.samplers.drafters.row import RowDrafts, proposes_rows
from vargen.samplers.drafters.tree_run import TreeRun
from vargen.samplers.registry import RULES, find_drafter
from vargen.samplers.window.controller import AutoController, ByDepth, WidthController
from vargen.samplers.window.decoder import WindowInputs, WindowState
from vargen.samplers.window.layout import SlotLayout
from vargen.samplers.window.trees import MAX_NODES, TreeSampler
from vargen.samplers.window.widths import Widths, check_rule, open_widths, read_widths, widest
from vargen.validation.checks import check_choice, check_integer, check_number


def fills_trees(drafter: Any) -> bool:
    """Whether a drafter proposes trees, of which a chain is one: EAGLE, and drafters with a table."""
    return hasattr(drafter, "open_drafts") or hasattr(drafter, "lookup")


class _Guarantee:
    """``SpeculativeSampler.guarantee``: of an instance by its rule, of the class the one of its default."""

    def __get__(self, sampler: SpeculativeSampler | None, owner: type) -> Guarantee:
        return "heuristic" if sampler is not None and sampler.rule == "typical" else "exact"


@dataclass(frozen=True, kw_only=True)
class SpeculativeSampler(TreeSampler):
    """Let a drafter propose codes, keep what the target confirms. Exact for every drafter; a good one makes it fast.

    ``drafter=`` of ``sample`` (the pipeline's own) is a small backbone over the same codes, an ``EagleDrafter`` or a
    ``RowDrafter`` (chains) of the backbone, or a drafter without a model: ``"row-above"`` and ``CopyDrafter`` (chains), ``"token-recycling"`` and ``"ngram"``
    (chains and trees, which learn while they draw).

    Args:
        rule: ``"shared-noise"`` draws every code with the noise of its position and keeps the proposals that equal it:
            the result is, code for code, that of ``NextTokenSampler`` with the same seed. ``"rejection"`` is the
            published test ``u q < p`` of chains, which passes somewhat more proposals; ``"recursive"`` takes what a
            rejection leaves to the next sibling of a tree; ``"k-seq"`` (SpecTr) tests independent draws without updates;
            ``"typical"`` (Medusa) keeps whatever is likely enough and is heuristic. At temperature 0 all are greedy.
        tree: ``"chain"``, one proposal a slot; ``"siblings"``, proposals for one slot; ``"dynamic"``, the likeliest paths
            under the drafter (EAGLE-2); or one of the published shapes ``"naive_extend_57"``, ``"mc_sim_7b_63"``,
            ``"mc_sim_7b_63_balanced"``, ``"reverse_balanced_25"``, ``"medusa_2_7b_63"``.
        num_draft_tokens: codes proposed for one forward pass of the target; published shapes have their own number. For
            chains under "shared-noise" also ``"auto"``, a list (``stats.widths``, each less 1) or a controller, as ``window``
            of ``SpeculativeJacobiSampler``.
        depth: longest path of a dynamic tree.
        branching: children of a node of a dynamic tree.
        proposal: how siblings are chosen: drawn ``"without_replacement"``, drawn ``"with_replacement"``, or ``"top"``,
            the likeliest; ``"auto"`` takes what the rule and the tree need, else the first.
        typical_epsilon: of "typical", threshold of peaked distributions.
        typical_alpha: of "typical", share of the typical probability of flat ones.
    """

    guarantee: ClassVar[Guarantee] = _Guarantee()  # type: ignore[assignment]

    rule: str = "shared-noise"
    num_draft_tokens: int | str | Sequence[int] | WidthController = 4
    typical_epsilon: float = 0.09
    typical_alpha: float = 0.3

    def check(self) -> None:
        """Check every setting and how they go together."""
        check_choice("rule", self.rule, RULES)
        super().check()
        self._check_number()
        check_number("typical_epsilon", self.typical_epsilon, low=0.0, high=1.0, open_low=True)
        check_number("typical_alpha", self.typical_alpha, low=0.0, open_low=True)
        if self.rule == "rejection" and self.tree != "chain":
            raise ValueError(f"rule 'rejection' is for tree='chain', got {self.tree!r}; take rule='recursive'")
        if self.rule == "k-seq" and self.temperature > 0 and self.chosen_proposal != "with_replacement":
            raise ValueError(f"rule 'k-seq' needs proposal='with_replacement', got {self.chosen_proposal!r}")
        if self.rule == "typical" and self.temperature == 0:
            raise ValueError("rule 'typical' needs a temperature above 0, got 0")

    def _check_number(self) -> None:
        most = None if self.fits_window else MAX_DRAFTS if self.tree == "chain" else MAX_NODES - 1
        number = self.num_draft_tokens
        if isinstance(number, Integral):
            check_integer("num_draft_tokens", number, low=1, high=most)  # a window ends with the image
            return
        object.__setattr__(self, "num_draft_tokens", read_widths("num_draft_tokens", number, low=0))
        check_rule("num_draft_tokens", self.num_draft_tokens, self.rule)
        if self.tree != "chain":
            raise ValueError(f"num_draft_tokens must be a number for trees, got tree={self.tree!r}; take tree='chain'")

    @property
    def chain_length(self) -> int:
        """Proposals of a chain."""
        return widest(self.num_draft_tokens, extra=1) - 1

    @property
    def num_siblings(self) -> int:
        """Proposals of "siblings"."""
        return self.chain_length

    @property
    def most_nodes(self) -> int:
        """Proposals of a dynamic tree and the last permanent code."""
        return self.chain_length + 1

    @property
    def chosen_proposal(self) -> str:
        """``proposal`` with "auto" decided."""
        if self.rule == "typical":
            return "top"
        drawn = self.proposal == "auto" and self.rule == "k-seq" and self.temperature > 0 and self.tree != "dynamic"
        return "with_replacement" if drawn else super().chosen_proposal

    @property
    def fits_window(self) -> bool:
        """Whether rule and tree leave it to the drafter to propose a window."""
        return self.tree == "chain" and self.rule in ("shared-noise", "rejection")

    def in_window(self, drafter: Any) -> bool:
        """Whether proposals are a window, not a tree: chains of all drafters but those that only fill trees."""
        return self.fits_window and not fills_trees(drafter)

    def make_widths(self, run: Run, layout: SlotLayout) -> Widths | None:
        """Who chooses, unless the number of drafts is given."""
        slots, codes = layout.num_slots, int(run.backbone.codebook_size)
        auto = AutoController(
            ByDepth(), known=run.backbone, kind=(int(run.condition.branches), type(run.drafter).__name__)
        )
        return open_widths("num_draft_tokens", self.num_draft_tokens, auto, run, slots, codes, extra=1)

    def begin(self, run: Run, inputs: WindowInputs) -> WindowState:
        """Commit the first code and draft the first proposals."""
        return super().begin(run.with_drafter(find_drafter(run.drafter)), inputs)

    def check_proposer(self, backbone: Backbone, drafter: Any) -> None:
        """Raise ``ValueError`` unless ``drafter`` can draft for the backbone."""
        if not isinstance(self.num_draft_tokens, int) and fills_trees(drafter):
            raise ValueError(
                f"num_draft_tokens must be a number for {type(drafter).__name__}, which fills trees; 'auto', lists and "
                "controllers are for drafters of chains"
            )
        if proposes_rows(drafter):
            drafter.check_backbone(backbone)
        if hasattr(drafter, "guess") or proposes_rows(drafter):
            if not self.fits_window:
                raise ValueError(
                    f"{type(drafter).__name__} proposes chains for the rules 'shared-noise' and 'rejection', got "
                    f"tree {self.tree!r} and rule {self.rule!r}"
                )
        elif hasattr(drafter, "lookup"):
            self._check_lookup(backbone, drafter)
        elif drafter is not None and self.in_window(drafter):
            check_drafter(type(self).__name__, backbone, drafter)
        else:
            if self.tree == "chain":
                check_integer("num_draft_tokens", self.chain_length, low=1, high=MAX_DRAFTS)
            super().check_proposer(backbone, drafter)

    def _check_lookup(self, backbone: Backbone, drafter: Any) -> None:
        if self.rule != "shared-noise" and self.temperature > 0:
            raise ValueError(
                f"{type(drafter).__name__} remembers earlier pictures, so only rule='shared-noise' gives one seed one picture, "
                f"got {self.rule!r}"
            )

    def make_rule(self, run: Run, inputs: Any) -> Rule:
        """The rule of that name, for a window or for a tree."""
        if self.in_window(run.drafter):
            return SharedNoise() if self.rule == "shared-noise" else Rejection()
        if self.rule == "shared-noise":
            return SharedNoiseTree()
        if self.temperature == 0:
            return Greedy()
        if self.rule == "typical":
            return Typical(self.typical_epsilon, self.typical_alpha)
        return KSeq() if self.rule == "k-seq" else Recursive()

    def reads_hidden(self, drafter: Any) -> bool:
        """EAGLE and row drafters stand on hidden states."""
        return proposes_rows(drafter) or super().reads_hidden(drafter)

    def make_drafter(self, state: WindowState, drafter: Any, condition: Any) -> Any:
        """Open the drafter for one run."""
        if hasattr(drafter, "guess"):
            return drafter.begin(state)
        if proposes_rows(drafter):
            return RowDrafts(drafter, state, self.warp)
        if hasattr(drafter, "lookup"):
            return TreeRun(self, drafter.begin(state), learns=drafter.watches_logits)
        if not self.in_window(drafter):
            return super().make_drafter(state, drafter, condition)
        prepared = drafter.prepare(condition, guidance_scale=self.guidance_scale)
        return ChainDrafter(self, drafter, prepared, state.width if state.widths is None else state.widths.most)
