"""What a pipeline does after every forward pass: progress bar, user callback, interruption."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from vargen.samplers.state import DecodeState

_running: list[Watch] = []  # of the calls of all pipelines, in all threads; adding and removing are atomic
_POLL_EVERY = 16  # steps between two looks at the progress on a GPU, where each look waits for it


class DecodeInterrupted(Exception):
    """Carries the last state out of a sampler's loop."""

    def __init__(self, state: DecodeState) -> None:
        super().__init__("interrupted")
        self.state = state


def check_returned(answer: Any, given: dict[str, Any]) -> None:
    """Refuse what a callback of diffusers would change by its answer; None and the tensors it was given are fine.

    Raises:
        ValueError: other tensors, or something else than a dictionary.
    """
    if not isinstance(answer, dict):
        return
    changed = [name for name, value in answer.items() if value is not given.get(name)]
    if changed:
        raise ValueError(
            f"callback_on_step_end returned another {changed[0]}: what it returns is not read, codes cannot be changed while "
            "they are drawn; return None, or see forced_codes, guidance_schedule and guidance_interval of the samplers"
        )


@dataclass(eq=False)
class Watch:
    """Progress bar, user callback and interruption: what the pipeline does after every forward pass."""

    pipe: DiffusionPipeline  # an ImagePipeline
    callback: Callable[..., Any] | None
    tensors: tuple[str, ...]
    bar: Any = field(default=None, init=False)
    step: int = field(default=0, init=False)
    shown: int = field(default=0, init=False)  # codes of the images in work that the bar has counted
    every: int = field(default=1, init=False)  # steps between two looks at the progress
    stopped: bool = field(default=False, init=False)  # it has all that the caller asked for and ended the drawing
    interrupted: bool = field(default=False, init=False)  # somebody wants the call to end
    thread: int = field(default_factory=threading.get_ident, init=False)  # that runs the call

    def open(self, num_images: int) -> None:
        """Start the bar, which counts codes; from now on the call can be interrupted."""
        _running.append(self)
        self.bar = self.pipe.progress_bar(total=num_images * self.pipe.backbone.num_codes)

    def close(self) -> None:
        """Finish the bar."""
        _running.remove(self)
        self.bar.close()

    def __call__(self, step: int, state: DecodeState) -> None:
        """Do what is to be done after a forward pass; the arguments are those of a sampler's callback."""
        if step == 0:
            self.shown = 0  # a new chunk of images
            self.every = 1 if self.pipe.backbone.device.type == "cpu" else _POLL_EVERY
        if not self.bar.disable and (state.done or self.step % self.every == 0):
            committed = int(state.num_committed.sum())
            self.bar.update(committed - self.shown)
            self.shown = committed
        if self.callback is not None:
            found = {name: _copy(getattr(state, name)) for name in self.tensors}
            check_returned(self.callback(self.pipe, self.step, state.num_forwards, found), found)
        self.step += 1
        if self.interrupted and not state.done:  # by the callback or by another thread
            raise DecodeInterrupted(state)


def is_interrupted(pipe: DiffusionPipeline) -> bool:
    """Whether the call of this pipeline that runs in this thread is to stop; in a thread without one, whether any is."""
    return any(watch.interrupted for watch in _calls(pipe))


def interrupt_calls(pipe: DiffusionPipeline, stop: bool) -> None:
    """Stop the call of this pipeline that runs in this thread, or all that run where this thread has none."""
    for watch in _calls(pipe):
        watch.interrupted = stop


def _calls(pipe: DiffusionPipeline) -> list[Watch]:
    calls = [watch for watch in list(_running) if _whole(watch.pipe) is _whole(pipe)]
    own = [watch for watch in calls if watch.thread == threading.get_ident()]
    return own[-1:] or calls  # a callback may call the pipeline again: the innermost call is meant


def _whole(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline that was called, of a view of it for one picture size."""
    return vars(pipe).get("sized_from", pipe)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
