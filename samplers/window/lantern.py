"""LANTERN: relaxed speculative decoding of trees of proposals (Jang et al., 2025, arXiv:2410.03355; LANTERN++: Park et al.,
2025, arXiv:2502.06352), and the exact tree decoding that it relaxes.

A drafter proposes a tree of codes, the backbone scores all of it in one forward pass, and a walk from the root keeps what
passes. Without relaxation that is lossless; LANTERN lets the nearest codes of the codebook count for a proposal.

Letters: A images, G guidance branches, S slots, V codes, n nodes of a tree, w slots an iteration may decide, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vargen.kernels.draw import draw, raise_bad_rows
from vargen.kernels.warp import combine
from vargen.outputs import Guarantee, SamplerOutput
from vargen.random import Stream, uniform
from vargen.samplers.acceptance.codebook_neighbors import neighbor_table
from vargen.samplers.acceptance.greedy import walk_greedy, walk_typical
from vargen.samplers.acceptance.lantern import Relaxation
from vargen.samplers.acceptance.recursive import Walk, walk_logits
from vargen.samplers.base import MAX_DRAFTS, Inputs, Run
from vargen.samplers.drafters.tree import NAMED_TREES, Tree, TreeDraft
from vargen.samplers.drafters.tree_run import TreeRun, TreeVerdict, check_draft_model, open_draft_model
from vargen.samplers.window.decoder import WindowInputs, WindowSampler, WindowState
from vargen.validation.checks import check_choice, check_integer, check_number

RELAXATIONS = ("none", "lantern", "lantern++")
RESIDUALS = ("paper", "optimal", "upstream")
PROPOSALS = ("auto", "without_replacement", "with_replacement", "top")
ACCEPTANCES = ("recursive", "k-seq", "typical")
MAX_NODES = 4096  # of a tree: its mask has the square of them
MAX_NEIGHBORS = 2**16  # of a code, each of them kept for every code
MOST_OPTIMAL_K = 16  # the optimal residual looks at the neighbours of every code


@dataclass(frozen=True, kw_only=True, eq=False)
class LanternInputs(WindowInputs):
    """What a call may give.

    Args:
        neighbors: ``[V, K]`` integers, nearest first, in place of the tokenizer's; K >= k (k + 1 for "upstream").
    """

    neighbors: Tensor | None = None


class _Guarantee:
    """``LanternSampler.guarantee``: of an instance by its settings, of the class the one of its defaults."""

    def __get__(self, sampler: LanternSampler | None, owner: type) -> Guarantee:
        if sampler is None:
            return "relaxed"
        if sampler.acceptance == "typical":
            return "heuristic"
        if sampler.relaxation == "none":
            return "exact"
        return "heuristic" if sampler.residual == "upstream" else "relaxed"


@dataclass(frozen=True, kw_only=True)
class LanternSampler(WindowSampler):
    """Draft a tree of codes, verify it in one forward pass, relaxed or exact.

    ``drafter=`` of ``sample`` is an ``EagleDrafter`` of the backbone (``pipe.eagle``), or a small backbone over the same codes
    (``pipe.drafter``). The neighbours come from the codebook of ``tokenizer=``, or as ``neighbors=``, a table ``[V, K]``.

    What the relaxed law ``out`` of a code keeps of the target's law ``p``, given the codes before it, with the residuals
    "paper" and "optimal", whatever the drafter proposes: LANTERN++ emits no code more than ``lam`` times as often,
    ``out <= lam * p``, hence ``TV <= 1 - 1 / lam``; LANTERN emits no code more than ``num_siblings * delta`` above its
    probability, and for deterministic proposals ``TV <= num_siblings * delta``. With ``temperature=0`` a code is emitted
    only if ``p`` of it is at least the largest divided by ``lam``, or the largest less ``delta``.

    Args:
        relaxation: ``"none"`` is exact. ``"lantern"`` lets neighbours count up to a mass of ``delta``, ``"lantern++"`` up to
            ``lam`` times the code's own probability.
        k: most neighbours that count. Published: 1000 with delta, 5 or 10 with lam.
        delta: in [0, 1), of "lantern". Published: 0.05 to 0.4.
        lam: at least 1, of "lantern++". Published: 5 to 20.
        residual: what remains of the law when a proposal is rejected: ``"paper"``, ``"optimal"`` (closest to the target;
            k <= 16), or ``"upstream"``, the released code, for which no bound holds.
        tree: ``"chain"``, one proposal a slot: what relaxation accepts anyway needs no siblings, and depth pays. Or
            ``"naive_extend_57"`` (the published one of LANTERN++), ``"mc_sim_7b_63"``, ``"mc_sim_7b_63_balanced"``,
            ``"reverse_balanced_25"``, ``"medusa_2_7b_63"``, ``"siblings"`` (``branching`` proposals for one slot), or
            ``"dynamic"``, the likeliest paths under the drafter (EAGLE-2).
        depth: longest path of proposals, of "chain" and "dynamic". Published: 5.
        branching: children of a node, of "siblings" and "dynamic".
        num_nodes: of "dynamic", the last permanent code included.
        proposal: how siblings are chosen: drawn ``"without_replacement"``, drawn ``"with_replacement"``, or ``"top"``, the
            likeliest; ``"auto"`` takes the likeliest for "dynamic" and for temperature 0, else the first.
        acceptance: ``"recursive"`` takes what a rejection leaves to the next sibling; ``"k-seq"`` (SpecTr) tests
            independent draws without updates; ``"typical"`` (Medusa) keeps whatever is likely enough and is heuristic.
        typical_epsilon: of "typical", threshold of peaked laws.
        typical_alpha: of "typical", share of the typical probability of flat ones.
    """

    required_features: ClassVar[frozenset[str]] = frozenset({"window", "ragged"})
    inputs_type: ClassVar[type[Inputs]] = LanternInputs
    preferred_drafter: ClassVar[str] = "eagle"  # among those that a pipeline has stored by name
    guarantee: ClassVar[Guarantee] = _Guarantee()  # type: ignore[assignment]

    relaxation: Literal["none", "lantern", "lantern++"] = "lantern++"
    k: int = 10
    delta: float = 0.1
    lam: float = 5.0
    residual: Literal["paper", "optimal", "upstream"] = "paper"
    tree: str = "chain"
    depth: int = 8
    branching: int = 10
    num_nodes: int = 59
    proposal: Literal["auto", "without_replacement", "with_replacement", "top"] = "auto"
    acceptance: Literal["recursive", "k-seq", "typical"] = "recursive"
    typical_epsilon: float = 0.09
    typical_alpha: float = 0.3

    def check(self) -> None:
        """Check every setting and how they go together."""
        super().check()
        check_choice("relaxation", self.relaxation, RELAXATIONS)
        check_choice("residual", self.residual, RESIDUALS)
        check_choice("tree", self.tree, (*NAMED_TREES, "chain", "siblings", "dynamic"))
        check_choice("proposal", self.proposal, PROPOSALS)
        check_choice("acceptance", self.acceptance, ACCEPTANCES)
        check_integer("k", self.k, low=1, high=MAX_NEIGHBORS)
        check_integer("depth", self.depth, low=1, high=MAX_DRAFTS)
        check_integer("branching", self.branching, low=1, high=MAX_NODES)
        check_integer("num_nodes", self.num_nodes, low=2, high=MAX_NODES)
        check_number("delta", self.delta, low=0.0, high=1.0)
        check_number("lam", self.lam, low=1.0, hint="1 relaxes nothing")
        check_number("typical_epsilon", self.typical_epsilon, low=0.0, high=1.0, open_low=True)
        check_number("typical_alpha", self.typical_alpha, low=0.0, open_low=True)
        if self.delta == 1:
            raise ValueError("delta must be less than 1, got 1: any code would do")
        self._check_together()

    def _check_together(self) -> None:
        if self.tree == "dynamic" and self.depth * self.branching > MAX_NODES:
            raise ValueError(
                f"a dynamic tree may have depth * branching = {MAX_NODES}, got {self.depth} * {self.branching}"
            )
        if self.relaxation != "none" and self.acceptance != "recursive":
            raise ValueError(
                f"acceptance {self.acceptance!r} cannot be relaxed; take relaxation='none' or acceptance='recursive'"
            )
        if self.relaxation != "none" and self.residual == "optimal" and self.k > MOST_OPTIMAL_K:
            raise ValueError(
                f"residual 'optimal' needs k at most {MOST_OPTIMAL_K}, got {self.k}; take residual='paper' for more"
            )
        if self.tree == "dynamic" and self.proposal not in ("auto", "top"):
            raise ValueError(
                f"a dynamic tree holds the likeliest codes: proposal must be 'top', got {self.proposal!r}"
            )
        if self.acceptance == "k-seq" and self.proposal != "with_replacement":
            raise ValueError(f"acceptance 'k-seq' needs proposal='with_replacement', got {self.proposal!r}")
        if self.acceptance == "typical" and self.temperature == 0:
            raise ValueError("acceptance 'typical' needs a temperature above 0, got 0")

    @property
    def num_rows(self) -> int:
        """Nodes of the tree: codes scored in one forward pass."""
        if self.tree == "dynamic":
            return min(self.num_nodes, 1 + self.branching + (self.depth - 1) * self.branching**2)
        return self.shape.num_nodes

    @property
    def reach(self) -> int:
        """Codes that the deepest path makes permanent, the one behind it included."""
        return 1 + (self.depth if self.tree == "dynamic" else self.shape.max_depth)

    @property
    def shape(self) -> Tree:
        """The shape of a tree that is not dynamic."""
        return _shape(self.tree, self.depth, self.branching)

    @property
    def chosen_proposal(self) -> str:
        """``proposal`` with "auto" decided."""
        if self.temperature == 0 or self.tree == "dynamic" or self.acceptance == "typical":
            return "top"
        return "without_replacement" if self.proposal == "auto" else self.proposal

    @torch.no_grad()
    def begin(self, run: Run, inputs: LanternInputs) -> WindowState:  # type: ignore[override]
        """Commit the first code and draft the first tree."""
        backbone = run.backbone
        if self.num_rows > self.reach and "tree_mask" not in backbone.features:
            raise ValueError(
                f"tree {self.tree!r} needs a backbone with tree_mask, which {type(backbone).__name__} does not offer; "
                "take tree='chain'"
            )
        check_draft_model(self, backbone, run.drafter)
        relaxation = self._relaxation(backbone, run.tokenizer, inputs.neighbors)
        state = super().begin(run, inputs)
        state.drafter.relaxation = relaxation
        return state

    def make_drafter(self, state: WindowState, drafter: Any, condition: Any) -> Any:
        """Open the draft model."""
        return TreeRun(self, open_draft_model(self, state, drafter, condition))

    def reads_hidden(self, drafter: Any) -> bool:
        """EAGLE drafters stand on hidden states."""
        return hasattr(drafter, "open_drafts")

    def finish(self, state: WindowState) -> SamplerOutput:
        """Collect codes and statistics; ``stats.extra`` says how many proposals were kept, and why."""
        output = super().finish(state)
        run: Any = state.drafter
        output.stats.extra.update(run.summary())
        return output

    def _relaxation(self, backbone: Any, tokenizer: Any, neighbors: Tensor | None) -> Relaxation | None:
        if self.relaxation == "none":
            return None
        num_codes, needed = int(backbone.codebook_size), self.k + (self.residual == "upstream")
        if needed >= num_codes:
            raise ValueError(f"k must be less than {num_codes - needed + self.k}, the codebook is small, got {self.k}")
        if neighbors is None:
            codebook = getattr(tokenizer, "codebook", None)
            if codebook is None:
                raise ValueError(
                    f"relaxation {self.relaxation!r} needs the codebook: pass tokenizer=, or a table as neighbors="
                )
            if len(codebook) != num_codes:
                raise ValueError(
                    f"tokenizer and backbone must have the same codebook size, got {len(codebook)} and {num_codes}"
                )
            neighbors = neighbor_table(codebook, needed)
        elif neighbors.shape[0] != num_codes or neighbors.shape[1] < needed or neighbors.is_floating_point():
            raise ValueError(
                f"neighbors must be integers [{num_codes}, {needed} or more], got {list(neighbors.shape)} {neighbors.dtype}"
            )
        limit = {"delta": self.delta} if self.relaxation == "lantern" else {"lam": self.lam}
        return Relaxation(neighbors.to(backbone.device), self.k, residual=self.residual, **limit)

    def _score(self, state: WindowState) -> Tensor:
        """Feed the tree: logits ``[G, A, n, V]``, one row a node."""
        draft: Any = state.draft
        codes = torch.cat([state.last_codes(), draft.tokens[:, 1:].clamp(min=0)], dim=1)
        options: dict[str, Any] = {"hidden": True} if state.drafter.model.reads_hidden else {}  # type: ignore[union-attr]
        if self.tree != "chain":  # whose order is causal
            options["slots"] = state.length[:, None] - 1 + draft.tree.depth
            options["mask"] = draft.tree.mask if len(draft.tree.mask) > 1 else draft.tree.mask[0]
        out = state.backbone.step(state.session, codes, **options)
        state.hidden = out.hidden
        return out.logits

    def _keep(self, state: WindowState, verdict: Any) -> None:
        state.backbone.commit(state.session, verdict.num_committed, path=verdict.path)

    def _verify(self, state: WindowState, logits: Tensor, slots: Tensor, num_rows: Tensor) -> Any:
        if state.num_forwards == 0:
            return super()._verify(state, logits, slots, num_rows)  # nothing is drafted for slot 0
        inside = slots.clamp(max=state.layout.num_slots - 1)
        positions = state.layout.code_index[inside]  # A w
        forced = None if state.forced is None else state.forced.gather(1, inside)
        draft: Any = state.draft
        walk = self._walk(state, logits, draft, positions, num_rows, forced)
        run: Any = state.drafter
        run.count(walk, num_rows)
        tokens = walk.tokens
        if self.temperature > 0:
            # drawn by its own noise: that of the tests and of the proposals is spent
            last = walk.num_accepted.clamp(max=slots.shape[1] - 1)[:, None]
            rows = walk.law.log()[None, :, None]
            code = draw(rows, seeds=state.keys, positions=positions.gather(1, last), stream=Stream.RESIDUAL)
            column = torch.arange(slots.shape[1], device=slots.device)
            tokens = torch.where(column == walk.num_accepted[:, None], code, tokens)
        committed = torch.minimum(walk.num_accepted + 1, num_rows)
        return TreeVerdict.gather(tokens, committed, walk.path, state.hidden)

    def _walk(
        self,
        state: WindowState,
        logits: Tensor,
        draft: TreeDraft,
        positions: Tensor,
        limit: Tensor,
        forced: Tensor | None,
    ) -> Walk:
        run: Any = state.drafter
        if self.temperature == 0:
            guided = combine(logits, self.guidance_scale, 0)
            if guided.device.type == "cpu":  # an argmax does not mind NaN
                slot = positions.gather(1, draft.tree.depth.expand(len(positions), -1))
                raise_bad_rows(~guided.amax(-1).isfinite(), slot)
            return walk_greedy(guided, draft, limit=limit, relaxation=run.relaxation, forced=forced)
        if self.acceptance == "typical":
            guided = combine(logits, self.guidance_scale, 0)
            cut = {"epsilon": self.typical_epsilon, "alpha": self.typical_alpha}
            return walk_typical(guided, draft, temperature=self.temperature, limit=limit, forced=forced, **cut)
        uniforms = uniform(state.keys, positions[:, :1], draft.tree.num_nodes, Stream.ACCEPT)[:, 0]
        return walk_logits(
            logits,
            draft,
            uniforms,
            positions=positions,
            limit=limit,
            relaxation=run.relaxation,
            forced=forced,
            k_seq=self.acceptance == "k-seq",
            **self.warp,
        )


@lru_cache(maxsize=64)
def _shape(name: str, depth: int, branching: int) -> Tree:
    if name == "chain":
        return Tree.chain(depth)
    if name == "siblings":
        return Tree.from_paths([[i] for i in range(branching)])
    return Tree.named(name)
