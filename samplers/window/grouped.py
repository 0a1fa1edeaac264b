"""Grouped speculative decoding (GSD, So et al., 2025, arXiv:2508.07747): accept a draft by the mass of its neighbours.

Many codes look alike, so a draft stands for the group of codes that are about as likely and about as near. A group is
accepted more often than a single code, and the price is the distribution: the code that comes out of an accepted group is
distributed like the draft, not like the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from vargen.kernels.verify.types import GroupSpec
from vargen.outputs import Guarantee
from vargen.samplers.acceptance.base import Rule
from vargen.samplers.acceptance.rejection import Rejection
from vargen.samplers.base import Run
from vargen.samplers.drafters.base import Drafter
from vargen.samplers.drafters.jacobi import INITS, Init, JacobiDrafter
from vargen.samplers.window.decoder import WindowSampler, WindowState
from vargen.validation.checks import check_choice, check_integer, check_number

RULES = ("independent", "maximal")
MAX_GROUP = 4096  # codes of a group, all of them looked at for every row


@dataclass(frozen=True, kw_only=True)
class GroupedSpeculativeSampler(WindowSampler):
    """Speculative Jacobi decoding with grouped acceptance. The distribution changes with the size of the groups, without a bound.

    Codes that top-k or top-p removed are never emitted: their drafts are rejected, unlike in the released code.

    Args:
        window: W, codes scored in one forward pass.
        group_size: an even number of codes next to the draft in the order of the target's probabilities.
        prob_threshold: codes whose probability differs from the draft's by this much leave the group.
        distance_threshold: codes whose input embedding is this far away (squared) leave the group; None keeps all. The
            released 0.5 fits its own codebook; where no two codes lie so near, nothing is grouped and this is plain rejection.
        rule: ``"independent"`` (the published rule) or ``"maximal"`` (see ``SpeculativeJacobiSampler``).
        init: first guess for a slot that enters the window.
    """

    guarantee: ClassVar[Guarantee] = "heuristic"
    replayable: ClassVar[bool] = True

    window: int = 16  # this, the group's size and the first threshold are those of the released code
    group_size: int = 14
    prob_threshold: float = 0.15
    distance_threshold: float | None = None
    rule: Literal["independent", "maximal"] = "independent"
    init: Init = "uniform"

    def check(self) -> None:
        """Check the shared settings and the groups."""
        super().check()
        check_integer("window", self.window, low=1, hint="1 is next-token sampling")
        check_integer("group_size", self.group_size, low=2, high=MAX_GROUP)
        if self.group_size % 2:
            raise ValueError(f"group_size must be even, got {self.group_size}; try {self.group_size + 1}")
        check_number("prob_threshold", self.prob_threshold, low=0.0, high=1.0)
        if self.distance_threshold is not None:
            check_number("distance_threshold", self.distance_threshold, low=0.0, hint="None is off")
        check_choice("rule", self.rule, RULES)
        check_choice("init", self.init, INITS)

    @property
    def num_rows(self) -> int:
        """W."""
        return self.window

    def make_rule(self, run: Run, inputs: Any) -> Rule:
        """Read the input embeddings of all codes, unless distance does not matter."""
        embeddings, backbone = None, run.backbone
        if self.distance_threshold is not None and self.window > 1:
            with torch.no_grad():
                embeddings = backbone.embed(torch.arange(int(backbone.codebook_size), device=backbone.device)).float()
        group = GroupSpec(
            size=self.group_size,
            prob_threshold=self.prob_threshold,
            distance_threshold=self.distance_threshold or 0.0,
            embeddings=embeddings,
        )
        return Rejection(self.rule, group)

    def make_drafter(self, state: WindowState, drafter: Any, condition: Any) -> Drafter:
        """Draft from the previous iteration."""
        return JacobiDrafter(self.init)
