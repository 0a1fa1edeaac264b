"""What changes while the window decoder runs.

Letters: B images of the call, A images still decoded, N code positions, S slots that need a decision, V codes,
W window, w rows of this iteration, G guidance branches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vargen.kernels.verify.types import Draft
from vargen.random import GumbelCache, NoiseRows
from vargen.samplers.state import DecodeState
from vargen.samplers.window.cuda_graph import Replay
from vargen.samplers.window.layout import SlotLayout
from vargen.samplers.window.widths import Widths


@dataclass(kw_only=True)
class WindowState(DecodeState):
    """Everything that changes while a batch is decoded by windows.

    ``tokens`` and ``trace`` are ``[B, S + 1]``, a column a slot; the last column takes what is thrown away.
    """

    layout: SlotLayout
    drafter: Any = None  # a Drafter; None for next-token sampling
    noise: GumbelCache | NoiseRows | None  # on the CPU: rows of position-keyed noise, made once for all iterations
    forced: Tensor | None  # [A, S] int64 code fixed beforehand, -1 where free
    length: Tensor  # [A] int64 permanent slots
    width: int  # w of the next iteration
    draft: Draft  # proposals for it
    hidden: Tensor | None = None  # [G, A, w, D] hidden states of the last forward, where the drafter reads them
    next_poll: int = 0
    rule: Any = None  # the acceptance Rule
    ahead: Any = None  # [A, block, V] noise rows of the coming positions, next-token sampling only
    errors: Tensor | None = None  # on a CUDA device: record of bad rows, asked when the host looks anyway
    counter: Tensor | None = None  # [A] int64 num_forwards on the device, where iterations are replayed
    replay: Replay | None = None  # the iteration as a CUDA graph
    widths: Widths | None = None  # who chooses the width, where it changes
    level: int | None = None  # on the CPU, where widths change: permanent slots of all images, None where they differ
    last: Tensor | None = (
        None  # [A, 1] int64 codes of the last window of one, until images leave or a window is decided
    )
    sampler: Any = None  # the one that decodes, where the caller's chose its window for the run
    used: list[int] = field(default_factory=list)  # slots that each iteration behind the prefill could decide

    @property
    def codes(self) -> Tensor:
        """[B, N] int64 codes so far, -1 where none is permanent yet."""
        return self.layout.only_codes(self.tokens)

    @property
    def commit_trace(self) -> Tensor:
        """[B, N] int64 forward (0 = prefill) that made each code permanent, -1 where none did yet."""
        return self.layout.only_codes(self.trace)

    @property
    def iteration(self) -> Tensor:
        """[A] int64 forward passes so far: what the noise of an iteration depends on."""
        return torch.full_like(self.keys, self.num_forwards) if self.counter is None else self.counter

    def count(self) -> None:
        """One forward pass more."""
        self.num_forwards += 1
        self.counter = None if self.counter is None else self.counter + 1

    def last_codes(self) -> Tensor:
        """[A, 1] int64 what the last permanent slot holds; the first entry of the next window."""
        return self.tokens[self.rows, self.length - 1][:, None]

    def next_slots(self) -> Tensor:
        """[A, w] int64 slots of the next window; those past the end repeat the last one."""
        offset = torch.arange(self.width, device=self.length.device)
        return (self.length[:, None] + offset).clamp(max=self.layout.num_slots - 1)
