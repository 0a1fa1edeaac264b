"""Windows whose width changes from iteration to iteration: what a run asks its controller, tells it and writes down.

Letters: B images of the call, A images still decoded, G guidance branches, V codes, S slots, W window, w rows of an iteration.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vargen.kernels.draw import draw
from vargen.samplers.window.controller import WIDTHS, Iteration, Replayed, Situation, WidthController, is_controller
from vargen.validation.checks import check_integer, shown

MEMORY_SHARE = 0.25  # of what is free, for logits, noise and the part of the cache that windows need
POLL_EVERY = 4  # iterations between two looks at a device's progress; on the CPU looking is free
CALM = 16  # windows of one between two questions to the controller, at most
COPIES = 3  # of the logits that a decision holds at once
KINDS = 64  # of guesses told apart, see ``Iteration``
LONGEST = 1 << 16  # widths that may be given


def read_widths(name: str, value: Any, *, low: int) -> Any:
    """Check a setting that is a number, "auto", a sequence of numbers or a controller; sequences come back as tuples.

    Raises:
        ValueError: none of these.
    """
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(
                f"{name} must be an integer at least {low}, 'auto', or a list of them (stats.widths), got {shown(value)}"
            )
        return value
    if is_controller(value):
        return value
    if isinstance(value, Sequence):
        if isinstance(value, range) or not 1 <= len(value) <= LONGEST:  # a range may be longer than Python can count
            raise ValueError(f"{name} as a list must hold 1..{LONGEST} numbers, one an iteration, got {shown(value)}")
        return tuple(check_integer(f"{name}[{i}]", width, low=low) for i, width in enumerate(value))
    return check_integer(name, value, low=low)


def widest(value: Any, extra: int = 0) -> int:
    """The most rows that a checked setting may ask for, ``extra`` beside what it counts."""
    if isinstance(value, int):
        return value + extra
    return max(value) + extra if isinstance(value, tuple) else WIDTHS[-1]


class Widths:
    """The widths of one run.

    Args:
        controller: who chooses.
        limit: W at most, what memory holds.
    """

    def __init__(self, controller: WidthController, limit: int, device: torch.device) -> None:
        self.controller, self.most, self.device = controller, limit, device.type
        self.allowed = tuple(w for w in WIDTHS if w <= limit)
        # what other programs and threads take of a CPU is no cost of a width
        self.clock = time.thread_time if device.type == "cpu" else time.perf_counter
        self.since = 0  # forward passes when the controller was asked last
        self.mark = self.left = self.clock()
        self.paused = 0.0  # seconds that the caller took between steps
        self.counts: Tensor | None = None  # [2, K] guesses tested and right since then
        self.by_clock = not isinstance(controller, Replayed)
        self.noise_until = 0  # slots whose noise is made
        self.calm = 1  # windows of one until the controller is asked again
        self.ahead: Tensor | None = None  # [A, n, V] noise of the slots from ``begun`` on
        self.begun = 0

    def resume(self) -> None:
        """A step begins."""
        self.paused += self.clock() - self.left

    def pause(self) -> None:
        """A step ends."""
        self.left = self.clock()

    def count(self, state: Any, slots: Tensor, tokens: Tensor, committed: Tensor) -> None:
        """Compare the guesses for ``slots [A, w]`` with the codes that became permanent (``committed [A, w]`` bool)."""
        guesses = state.draft.tokens[:, : tokens.shape[1]]
        if hasattr(state.drafter, "ages"):
            kinds = state.drafter.ages(slots.clamp(max=state.layout.num_slots - 1))
        else:
            kinds = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        tested = committed & (guesses >= 0)
        self.add(kinds, tested, tested & (guesses == tokens))

    def add(self, kinds: Tensor, tested: Tensor, right: Tensor) -> None:
        """Count guesses ``[A, w]`` of so many kinds."""
        weight = torch.stack([tested, right]).flatten(1).to(torch.float32)
        kinds = kinds.clamp(max=KINDS - 1).flatten().expand(2, -1)
        counts = weight.new_zeros(2, KINDS).scatter_add_(1, kinds, weight)
        self.counts = counts if self.counts is None else self.counts + counts

    def next(self, state: Any, most_left: int) -> int:
        """Tell the controller what became of the iterations since it was asked, and ask again."""
        now, num_images = self.clock(), len(state.keys)
        passed = state.num_forwards - self.since
        if self.since:  # not of the prefill
            tested, right = ([0] * KINDS,) * 2 if self.counts is None else self.counts.int().tolist()
            seconds = (now - self.mark - self.paused) / passed
            self.controller.observe(Iteration(state.width, num_images, seconds, passed, tested, right))
        self.since, self.mark, self.paused, self.counts = state.num_forwards, now, 0.0, None
        if most_left == 0:
            return state.width
        chosen = self.controller.choose(Situation(self.allowed, state.width, num_images, most_left, self.device))
        width = max(1, min(check_integer("the width that the controller chose", chosen, low=1), self.most, most_left))
        patient = getattr(self.controller, "patient", False)
        self.calm = min(2 * self.calm, CALM) if width == 1 and patient else 1
        return width

    def patience(self, free: bool) -> int:
        """Iterations until the controller is asked again; it may have to wait for windows of one, which are cheap."""
        return self.calm if free else POLL_EVERY

    def noise_rows(self, state: Any, slots: Tensor, block: int) -> Tensor | None:
        """Rows of noise ``[A, 1, V]`` of ``slots [A, 1]``; those of coming slots are made in one call."""
        if state.noise is None:
            return None
        if int(slots.max()) >= self.noise_until:
            block = max(1, min(block // (len(slots) * state.noise.num_codes), state.noise.capacity))
            ahead = slots + torch.arange(block, device=slots.device)
            state.noise.rows(state.layout.code_index[ahead.clamp(max=state.layout.num_slots - 1)])
            self.noise_until = int(slots.min()) + block
        rows: Tensor = state.noise.rows(state.layout.code_index[slots])
        return rows

    def level_rows(self, state: Any, level: int, block: int) -> Tensor | None:
        """Rows of noise ``[A, 1, V]`` of one slot that all images have reached; those of coming slots are made in one call."""
        if state.noise is None:
            return None
        images = len(state.keys)
        ahead = self.ahead
        if ahead is None or len(ahead) != images or not 0 <= level - self.begun < ahead.shape[1]:
            count = max(1, block // (images * state.noise.num_codes))
            positions = state.layout.code_index[level : level + count].expand(images, -1)
            ahead = self.ahead = state.noise.fresh(positions)
            self.begun = level
        return ahead[:, level - self.begun, None]


def commit_one(sampler: Any, state: Any, logits: Tensor, block: int) -> None:
    """Draw and commit one code an image from ``logits [G, A, 1, V]``: next-token sampling of images that may differ in length."""
    level, widths, index = state.level, state.widths, state.layout.code_index
    slots = state.length[:, None] if level is None else None  # a 1
    if slots is None:
        positions, noise = index[level].expand(len(state.keys), 1), widths.level_rows(state, level, block)
        fixed = None if state.forced is None else state.forced[:, level, None]
    else:
        positions, noise = index[slots], widths.noise_rows(state, slots, block)
        fixed = None if state.forced is None else state.forced.gather(1, slots)
    if fixed is not None:  # the distribution of a fixed slot is never read
        logits = torch.where((fixed >= 0)[..., None], 0.0, logits)
    tokens = draw(logits, seeds=state.keys, positions=positions, noise=noise, errors=state.errors, **sampler.warp)
    if fixed is not None:
        tokens = torch.where(fixed >= 0, fixed, tokens)
    whole = level is not None and len(state.keys) == len(state.tokens)
    rows, column = slice(None) if whole else state.rows, state.length if level is None else level
    state.tokens[rows, column] = tokens[:, 0]
    state.trace[rows, column] = state.num_forwards
    if state.num_forwards:  # the prefill feeds no code
        if widths.since == state.num_forwards and getattr(state.drafter, "guesses_alone", False):
            slots = (
                state.length[:, None] if slots is None else slots
            )  # the guess is of the first window behind a question
            widths.count(state, slots, tokens, torch.ones_like(tokens, dtype=torch.bool))
        state.backbone.commit(state.session, 1)
        state.drafter.commit(torch.ones_like(state.length))
    state.last = tokens
    state.length = state.length + 1
    state.level = None if level is None else level + 1
    state.count()


def limit_of(
    name: str, value: Any, backbone: Any, num_images: int, branches: int, num_codes: int, num_slots: int
) -> int:
    """The widest window of a run: what was asked for, what the image has room for, and what memory holds.

    Raises:
        ValueError: widths given one by one that cannot reach the end of the image.
    """
    if isinstance(value, tuple) and sum(value) < num_slots - 1:
        raise ValueError(
            f"{name} must sum to at least {num_slots - 1}, the codes behind the first, got {len(value)} widths that sum to "
            f"{sum(value)}; take stats.widths of a run of this model, or 'auto'"
        )
    wanted = min(widest(value), num_slots)
    if isinstance(value, tuple):
        return wanted
    layers, width = len(getattr(backbone, "layers", ())), int(getattr(backbone, "hidden_size", 0))
    a_row = 4 * (num_codes * (COPIES * branches + 2) + 2 * layers * width * branches)
    return max(1, min(wanted, int(MEMORY_SHARE * free_memory(torch.device(backbone.device)) / (a_row * num_images))))


def free_memory(device: torch.device) -> int:
    """Bytes that nothing uses; without a limit where the device does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError, IndexError):  # not Linux
        return 1 << 62


def open_widths(
    name: str, value: Any, auto: WidthController, run: Any, num_slots: int, num_codes: int, extra: int = 0
) -> Widths | None:
    """The widths of a run for a checked setting; None where all are the same.

    Args:
        name: of the setting, for errors.
        value: a number, "auto", a tuple or a controller.
        auto: who chooses for "auto".
        run: the call.
        num_slots: S.
        num_codes: V, or the width of a continuous token.
        extra: rows scored beside those that ``value`` counts.
    """
    if isinstance(value, int):
        return None
    if isinstance(value, tuple):
        value = tuple(width + extra for width in value)
    limit = limit_of(name, value, run.backbone, len(run.seeds), int(run.condition.branches), num_codes, num_slots)
    if isinstance(value, tuple) and limit == 1:
        return None
    controller: Any = Replayed(value) if isinstance(value, tuple) else auto if isinstance(value, str) else value
    return Widths(controller, limit, run.keys.device)


def check_rule(name: str, value: Any, rule: str) -> None:
    """Raise ``ValueError`` for widths that change under a rule whose codes depend on them."""
    if not isinstance(value, int) and rule != "shared-noise":
        what = shown(value) if isinstance(value, str | tuple) else "a controller"
        raise ValueError(
            f"{name}={what} needs rule='shared-noise', whose codes do not depend on widths, got rule={rule!r}; give a number"
        )
