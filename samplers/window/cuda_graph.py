"""Iterations of the window decoder as one CUDA graph: forward, verification, commit and shift in a single launch.

A captured iteration runs on fixed buffers: what an iteration leaves behind is copied to where it was read from. The
first iterations run plainly (kernels are compiled, libraries make their workspaces), one is captured, the rest are
replays. Nothing is read back inside; the host looks at the progress every few iterations.

Capture itself is untested on a GPU. On the CPU the tests run the same iteration over the same buffers with a stand-in
for the graph, and on fake CUDA tensors, where reading a value back raises.

Letters: A images, W window, V codes, G guidance branches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.kernels.language import use_triton
from vargen.protocols import Backbone

WARM_UP = 2  # iterations that run plainly before one is captured


def obstacle(sampler: Any, backbone: Backbone) -> str | None:
    """Why iterations of this sampler cannot be replayed as a CUDA graph; None if they can."""
    device = torch.device(backbone.device)
    if device.type != "cuda":
        return f"the backbone is on {device}, not on a CUDA device"
    if not sampler.replayable:
        return f"the iterations of {type(sampler).__name__} have no fixed shapes"
    if Feature.STATIC not in backbone.features:
        return f"{type(backbone).__name__} opens no sessions of fixed shapes"
    if not use_triton(torch.empty(0, device=device)):
        return "the PyTorch references of the kernels read values back; install triton and unset VARGEN_KERNELS"
    return None


class Replay:
    """One iteration over fixed buffers, captured at the third call of ``step``.

    Args:
        state: a ``WindowState`` of a static session, behind its prefill; from now on its tensors keep their addresses.
        labels: the rule reads the logits that drafts were drawn from, so they are kept from one iteration to the next.
    """

    def __init__(self, state: Any, labels: bool) -> None:
        state.counter = torch.full_like(state.keys, state.num_forwards)
        state.length = state.length.clone()
        draft = state.draft if labels else state.draft.with_logits(None)
        kept = {f.name: getattr(draft, f.name) for f in fields(draft)}
        kept = {name: None if value is None else dense_copy(value) for name, value in kept.items()}
        state.draft = replace(draft, **kept)
        self.count = 0  # replays so far
        self.plain = WARM_UP
        self.graph: Callable[[], None] | None = None

    def step(self, sampler: Any, state: Any) -> None:
        """Run one iteration, plainly or as a replay. Without luck in capturing all stay plain, and a note says why."""
        if self.graph is None and self.plain == 0:
            try:
                self.graph = capture(lambda: self.iterate(sampler, state), state.keys.device)
            except RuntimeError as error:
                self.plain = -1
                state.notes.append(f"iterations are not replayed as a CUDA graph: {str(error).splitlines()[0]}")
        if self.graph is None:
            self.plain -= 1
            on_side_stream(lambda: self.iterate(sampler, state), state.keys.device)
        else:
            self.graph()
            self.count += 1
        state.num_forwards += 1

    def iterate(self, sampler: Any, state: Any) -> None:
        """One iteration from the state's tensors into the same tensors; counters of the host stay as they are."""
        length, counter, draft, num_forwards = state.length, state.counter, state.draft, state.num_forwards
        try:
            sampler.iterate(state)
            length.copy_(state.length)
            counter.copy_(state.counter)
            for f in fields(draft):
                buffer = getattr(draft, f.name)
                if buffer is not None:
                    buffer.copy_(getattr(state.draft, f.name))
        finally:
            state.length, state.counter, state.draft, state.num_forwards = length, counter, draft, num_forwards


def capture(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record what ``run`` launches, without running it; the returned function launches it all at once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.no_grad(), torch.cuda.graph(graph):
        run()
    return graph.replay


def on_side_stream(run: Callable[[], None], device: torch.device) -> None:
    """Run as PyTorch asks before a capture: on a stream that is not the default one."""
    if device.type != "cuda":
        run()
        return
    here = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        run()
    here.wait_stream(side)


def dense_copy(value: Tensor) -> Tensor:
    """A copy with memory of its own, whatever was expanded."""
    return value.clone(memory_format=torch.contiguous_format)
