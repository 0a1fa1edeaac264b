"""Rules over trees of proposals: find the path to keep, then choose the token behind it.

Letters: A images, G guidance branches, V codes, n nodes, w slots that may be decided, D width of hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vargen.kernels.draw import draw, raise_bad_rows
from vargen.kernels.tree.types import AcceptedPath
from vargen.kernels.warp import combine
from vargen.random import Stream
from vargen.samplers.acceptance.base import Noise, Rows
from vargen.samplers.acceptance.shared_noise import SharedNoise
from vargen.samplers.drafters.tree import TreeDraft


@dataclass(frozen=True)
class TreeOutcome:
    """Outcome of one tree: what becomes permanent, and the states of the nodes that it goes on from."""

    tokens: Tensor  # [A, w] int64
    num_committed: Tensor  # [A] int64
    path: Tensor  # [A, w] int64 nodes from node 0 down
    hidden: Tensor  # [A, w, G, D] hidden states of those nodes; [A, 0] where nobody reads them
    num_accepted: Tensor  # [A] int64 proposals on the path
    num_tests: Tensor  # [A] int64 random tests made
    num_relaxed: Tensor  # [A] int64 proposals kept that the exact rule would have rejected


@dataclass(frozen=True)
class TreeRule:
    """Base of the rules over trees."""

    head: ClassVar[str] = "categorical"

    @property
    def first(self) -> SharedNoise:
        """Slot 0 is drawn with the noise of its position."""
        return SharedNoise()

    def decide(self, rows: Rows, draft: TreeDraft, noise: Noise) -> TreeOutcome:
        """Decide a tree."""
        found = self.find_path(rows, draft, noise)
        tokens = self.choose_behind(found, rows, noise)
        committed = torch.minimum(found.num_accepted + 1, rows.num_rows)
        states = tokens[:, :0]
        if rows.hidden is not None:
            index = found.path[None, :, :, None].expand(rows.hidden.shape[0], -1, -1, rows.hidden.shape[-1])
            states = rows.hidden.gather(2, index).permute(1, 2, 0, 3)
        counts = (found.num_accepted, found.num_uniforms, found.num_relaxed)
        return TreeOutcome(tokens, committed, found.path, states, *counts)

    def find_path(self, rows: Rows, draft: TreeDraft, noise: Noise) -> AcceptedPath:
        """Find the path of proposals that are kept."""
        raise NotImplementedError

    def choose_behind(self, found: AcceptedPath, rows: Rows, noise: Noise) -> Tensor:
        """``[A, w]`` tokens of the path with the one behind it, drawn from the distribution that is left.

        It has noise of its own: that of the tests and of the proposals is spent.
        """
        w = rows.positions.shape[1]
        last = found.num_accepted.clamp(max=w - 1)[:, None]
        left = found.distribution.log()[None, :, None]
        code = draw(left, seeds=noise.keys, positions=rows.positions.gather(1, last), stream=Stream.RESIDUAL)
        column = torch.arange(w, device=code.device)
        return torch.where(column == found.num_accepted[:, None], code, found.tokens)


def guided(rows: Rows, draft: TreeDraft) -> Tensor:
    """Guided logits ``[A, n, V]`` of all nodes, checked where an argmax would hide NaN."""
    logits = combine(rows.logits, rows.warp["guidance_scale"], 0)
    if logits.device.type == "cpu":
        slot = rows.positions.gather(1, draft.tree.depth.expand(len(rows.positions), -1))
        raise_bad_rows(~logits.amax(-1).isfinite(), slot)
    return logits
