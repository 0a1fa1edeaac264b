"""LANTERN: relaxed speculative decoding of trees of proposals (Jang et al., 2025, arXiv:2410.03355; LANTERN++: Park et al.,
2025, arXiv:2502.06352).

A proposal passes more often because the nearest codes of the codebook count for it. The exact rules are those of
``SpeculativeSampler``.

Letters: V codes, K neighbours held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from vargen.kernels.tree.lantern import Relaxation
from vargen.outputs import Guarantee
from vargen.protocols import Backbone
from vargen.samplers.acceptance.base import Rule
from vargen.samplers.acceptance.codebook_neighbors import neighbor_table
from vargen.samplers.acceptance.greedy import Greedy
from vargen.samplers.acceptance.recursive import Recursive
from vargen.samplers.base import Inputs, Run
from vargen.samplers.window.decoder import WindowInputs
from vargen.samplers.window.trees import MAX_NODES, TreeSampler
from vargen.validation.checks import check_choice, check_integer, check_number

RELAXATIONS = ("lantern", "lantern++")
RESIDUALS = ("paper", "optimal", "upstream")
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
        return "heuristic" if sampler is not None and sampler.residual == "upstream" else "relaxed"


@dataclass(frozen=True, kw_only=True)
class LanternSampler(TreeSampler):
    """Draft codes, verify them in one forward pass with a relaxed rule. ``relaxation="none"`` gives a ``SpeculativeSampler``.

    ``drafter=`` of ``sample`` is an ``EagleDrafter`` of the backbone (``pipe.eagle``), or a small backbone over the same codes
    (``pipe.drafter``). The neighbours come from the codebook of ``tokenizer=``, or as ``neighbors=``, a table ``[V, K]``.

    What the relaxed distribution ``out`` of a code keeps of the target's ``p``, given the codes before it, with the residuals
    "paper" and "optimal", whatever the drafter proposes: LANTERN++ emits no code more than ``lam`` times as often,
    ``out <= lam * p``, hence ``TV <= 1 - 1 / lam``; LANTERN emits no code more than ``num_siblings * delta`` above its
    probability, and for deterministic proposals ``TV <= num_siblings * delta``. With ``temperature=0`` a code is emitted
    only if ``p`` of it is at least the largest divided by ``lam``, or the largest less ``delta``.

    Args:
        relaxation: ``"lantern"`` lets neighbours count up to a mass of ``delta``, ``"lantern++"`` up to
            ``lam`` times the code's own probability.
        k: most neighbours that count. Published: 1000 with delta, 5 or 10 with lam.
        delta: in [0, 1), of "lantern". Published: 0.05 to 0.4.
        lam: at least 1, of "lantern++". Published: 5 to 20.
        residual: what remains of the distribution when a proposal is rejected: ``"paper"``, ``"optimal"`` (closest to the target;
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
    """

    inputs_type: ClassVar[type[Inputs]] = LanternInputs
    guarantee: ClassVar[Guarantee] = _Guarantee()  # type: ignore[assignment]

    relaxation: Literal["lantern", "lantern++"] = "lantern++"
    k: int = 10
    delta: float = 0.1
    lam: float = 5.0
    residual: Literal["paper", "optimal", "upstream"] = "paper"
    num_nodes: int = 59

    def check(self) -> None:
        """Check every setting and how they go together."""
        super().check()
        check_choice("relaxation", self.relaxation, RELAXATIONS)
        check_choice("residual", self.residual, RESIDUALS)
        check_integer("k", self.k, low=1, high=MAX_NEIGHBORS)
        check_integer("num_nodes", self.num_nodes, low=2, high=MAX_NODES)
        check_number("delta", self.delta, low=0.0, high=1.0)
        check_number("lam", self.lam, low=1.0, hint="1 relaxes nothing")
        if self.delta == 1:
            raise ValueError("delta must be less than 1, got 1: any code would do")
        if self.residual == "optimal" and self.k > MOST_OPTIMAL_K:
            raise ValueError(
                f"residual 'optimal' needs k at most {MOST_OPTIMAL_K}, got {self.k}; take residual='paper' for more"
            )

    @property
    def most_nodes(self) -> int:
        """Nodes of a dynamic tree."""
        return self.num_nodes

    def make_rule(self, run: Run, inputs: LanternInputs) -> Rule:
        """Recursive rejection with neighbours, or the choice of the largest at temperature 0."""
        relaxation = self._relaxation(run.backbone, run.tokenizer, inputs.neighbors)
        return Greedy(relaxation) if self.temperature == 0 else Recursive(relaxation)

    def _relaxation(self, backbone: Backbone, tokenizer: Any, neighbors: Tensor | None) -> Relaxation:
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
