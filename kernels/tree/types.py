"""What tree verification reads and returns. Letters: B images, n nodes, C children of a node, D depth, R draft rows, V codes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TreeProposals:
    """Codes on the nodes of a tree, with the distributions from which they were drawn.

    The children of a node are draws from row ``row_of[node]`` of ``distributions``, given the codes on the way to the
    node: without replacement in the order in which they are tested, or independent ones if ``replacement``. Without
    ``distributions`` they are whatever a deterministic drafter proposes.
    """

    tokens: Tensor  # [B, n] int64, -1 where there is no proposal; entry 0 is not read
    children: Tensor  # [B or 1, n, C] int64 in the order in which they are tested, -1 behind the last
    depth: int  # D, or a bound on it
    distributions: Tensor | None = None  # [B, R, V] float32 probabilities
    row_of: Tensor | None = None  # [n] int64, -1 for leaves
    replacement: bool = False
    probs: Tensor | None = None  # [B, n] of each token when it was drawn, 0 = never test; None = from `distributions`


@dataclass
class AcceptedPath:
    """Which proposals of a tree are kept. Slot 0 is the first one that the tree decides."""

    path: Tensor  # [B, D + 1] int64 nodes from node 0 down, 0 behind the last
    tokens: Tensor  # [B, D + 1] int64 codes of the nodes below node 0, shifted to the slots they fill; -1 behind them
    num_accepted: Tensor  # [B] int64 proposals kept
    distribution: Tensor  # [B, V] float32 of the code behind them; a point for a finished image
    num_uniforms: Tensor  # [B] int64 tests made
    num_relaxed: Tensor  # [B] int64 proposals kept that the exact rule would have rejected
    chances: Tensor | None = None  # [B, U] float32 in [0, 1] chance of each test made, for enumeration
