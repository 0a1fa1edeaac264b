"""What every decoding loop carries from step to step; a loop extends it by what only it needs.

Letters: B images of the call, A images still decoded, N positions, D width of a continuous token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(kw_only=True)
class DecodeState:
    """Everything that changes while a batch is decoded, and what ``stream`` yields.

    A run goes on from any state with ``sampler.step(state)``, which advances the state in place.
    """

    backbone: Any
    session: Any
    seeds: list[int]  # of all B images
    keys: Tensor  # [A] int64 seeds of the images still decoded
    rows: Tensor  # [A] int64 their places in the call
    tokens: Tensor  # [B, N] int64 codes, -1 where none is drawn; [B, N, D] where tokens are continuous, NaN where not drawn
    trace: Tensor  # [B, N] int64 forward (0 = prefill) that made a token permanent, -1 elsewhere
    num_forwards: int = 0
    num_drafter_forwards: int = 0
    num_head_rows: int = 0
    notes: list[str] = field(
        default_factory=list
    )  # departures from the sampler's guarantee, and what was not possible
    counts: dict[str, Any] = field(default_factory=dict)  # numbers of one sampler, for ``stats.extra``
    done: bool = False

    @property
    def codes(self) -> Tensor:
        """The tokens so far, -1 (NaN where they are continuous) where none is permanent yet."""
        return self.tokens

    @property
    def commit_trace(self) -> Tensor:
        """[B, N] int64 forward (0 = prefill) that made each token permanent, -1 where none did yet."""
        return self.trace

    @property
    def num_committed(self) -> Tensor:
        """[B] int64 permanent tokens of each image."""
        return (self.commit_trace >= 0).sum(-1)
