"""ZipAR (He et al., 2024, arXiv:2412.04062): raster models write several rows at once, each some columns behind the one above.

Row r + 1 opens when row r holds ``window`` codes; from then on both advance one code a forward. The first query of a row
that opens early stands where its left neighbour in the stream, the last cell of row r, is not drawn yet: an end-of-line
token, where the model has one, is known; otherwise the newest code of row r - 1 stands in for it. Once row r is complete
its last code is fed again, only to write its cache entry. Cells that do not exist yet are masked (the released LlamaGen
code attends to them as zero keys).

The adaptive rule opens rows earlier and treats the first code of a row as a draft until the distribution it came from
stops changing under it. Nothing here samples the backbone's own distribution: each code is drawn from a shortened context.

It has a loop of its own: which codes a forward draws follows from what was drawn, image by image, so there is no schedule.

Letters: B images, G guidance branches, N codes, h w code grid, m entries of one forward, V codes of the codebook.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.kernels.acceptance import accept, residual
from vargen.kernels.draw import draw
from vargen.kernels.warp import warp_logits
from vargen.outputs import Guarantee
from vargen.random import Stream, gumbel, uniform
from vargen.samplers.base import Inputs, Run, Sampler
from vargen.samplers.state import DecodeState
from vargen.validation.checks import check_integer


class Entry(NamedTuple):
    """One item of a forward pass."""

    slot: int  # stream slot where it is fed, -1 = padding
    source: int  # number of the code that it shows; ignored at structural slots
    target: int  # number of the code that it predicts, -1 = none: it only writes its cache entry


class Grid(NamedTuple):
    """Where rows of codes lie in the stream. Rows of a preview grid come first and are written one after the other."""

    starts: tuple[int, ...]  # number of each row's first code
    widths: tuple[int, ...]
    opens_at: tuple[int, ...]  # codes that a row must hold before the next one opens
    slots: tuple[int, ...]  # stream slot of each code

    @classmethod
    def of(cls, backbone: Any, window: int) -> Grid:
        """Read the backbone's layout."""
        layout = backbone.layout()
        starts, widths, opens_at = [], [], []
        number = 0
        for index, (h, w) in enumerate(layout.grids):
            last_grid = index == len(layout.grids) - 1
            for row in range(h):
                starts.append(number)
                widths.append(w)
                opens_at.append(min(window, w) if last_grid and row > 0 else w)  # the first row has nothing above it
                number += w
        slots = (layout.forced < 0).nonzero().flatten().tolist()
        return cls(tuple(starts), tuple(widths), tuple(opens_at), tuple(slots))

    def lead(self, row: int) -> int:
        """Slot before the row's first code: the last cell of the row above, or the structural token behind it."""
        return self.slots[self.starts[row]] - 1

    def last_cell(self, row: int) -> int:
        """Number of the row's last code."""
        return self.starts[row] + self.widths[row] - 1


@dataclass
class Rows:
    """Progress of one image (of all images alike, unless the adaptive rule moves them apart)."""

    grid: Grid
    counts: list[int]  # codes that each row holds for good
    closed: list[bool]  # rows whose last code was fed
    opened: int = 1  # rows that have begun
    pending: int = -1  # row whose first code is a draft

    @classmethod
    def begin(cls, grid: Grid) -> Rows:
        """Nothing is drawn."""
        rows = len(grid.starts)
        return cls(grid, [0] * rows, [False] * rows)

    @property
    def done(self) -> bool:
        """Every row is complete."""
        return self.counts == list(self.grid.widths)

    def complete(self, row: int) -> bool:
        """The row holds all its codes."""
        return self.counts[row] == self.grid.widths[row]

    def entries(self) -> list[Entry]:
        """What the next forward feeds, in stream order; opens the next row if it may."""
        if self.opened < len(self.counts) and self.counts[self.opened - 1] >= self.grid.opens_at[self.opened - 1]:
            self.opened += 1
        found: list[Entry] = []
        for row in range(self.opened):
            begun = self.counts[row] > 0
            last_row = row == len(self.counts) - 1
            if begun and not self.complete(row):
                number = self.grid.starts[row] + self.counts[row] - 1
                found.append(Entry(self.grid.slots[number], number, number + 1))
            elif begun and not self.closed[row] and not last_row:
                found += self._close(row)
            if row + 1 < self.opened and self.counts[row + 1] == 0 and not self.complete(row):
                found.append(self._early(row + 1))
        return found

    def _close(self, row: int) -> list[Entry]:
        """Feed the last code and the structural token behind it; whichever is last leads the next row if that waits."""
        self.closed[row] = True
        cell, lead = self.grid.last_cell(row), self.grid.lead(row + 1)
        waits = row + 1 < self.opened and self.counts[row + 1] == 0
        target = self.grid.starts[row + 1] if waits else -1
        if lead == self.grid.slots[cell]:
            return [Entry(lead, cell, target)]
        return [Entry(self.grid.slots[cell], cell, -1), Entry(lead, cell, target)]

    def _early(self, row: int) -> Entry:
        """Query of a row's first code while the row above is incomplete."""
        above = row - 2  # the newest code there stands in for the missing left neighbour
        return Entry(self.grid.lead(row), self.grid.starts[above] + self.counts[above] - 1, self.grid.starts[row])


@dataclass(kw_only=True)
class ZipState(DecodeState):
    """Everything that changes while rows are written side by side.

    ``tokens`` and ``trace`` are ``[B, N + 1]``: codes and drafts; the last column takes what is thrown away.
    """

    progress: list[Rows]  # one for all images, or one an image
    draft_probs: dict[int, Tensor] = field(default_factory=dict)  # image -> [V] distribution of its draft

    @property
    def codes(self) -> Tensor:
        """[B, N] int64, -1 where nothing is permanent."""
        return torch.where(self.trace >= 0, self.tokens, -1)[:, :-1]

    @property
    def commit_trace(self) -> Tensor:
        """[B, N] int64 forward that made each code permanent, -1 where none did yet."""
        return self.trace[:, :-1]


@dataclass(frozen=True, kw_only=True)
class ZipARSampler(Sampler):
    """Write rows side by side: for h x w codes about w + (h - 2) * window + w forwards instead of h * w.

    With ``window`` at least the grid's width it is next-token sampling, code for code.

    Args:
        window: codes a row must hold before the next one opens; the adaptive rule takes it as the least number.
        adaptive: accept the first code of a row only while its distribution is stable, else redraw it and wait.
    """

    required_features: ClassVar[frozenset[str]] = frozenset({Feature.ANY_SLOT})
    guarantee: ClassVar[Guarantee] = "heuristic"

    window: int = 16  # the released setting for Lumina-mGPT; 8 for LlamaGen
    adaptive: bool = False

    def check(self) -> None:
        """Check the shared settings and the window."""
        super().check()
        check_integer("window", self.window, low=1, hint="the grid's width or more is next-token sampling")
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"adaptive must be True or False, got {self.adaptive!r}")

    @property
    def warp(self) -> dict[str, Any]:
        """The shared settings as keyword arguments of the kernels."""
        names = ("guidance_scale", "temperature", "top_k", "top_p")
        return {name: getattr(self, name) for name in names}

    def begin(self, run: Run, inputs: Inputs) -> ZipState:
        """Run the condition and draw the first code."""
        grid = Grid.of(run.backbone, self.window)
        session, out = run.backbone.open(run.condition, max_window=2 * len(grid.starts))
        num_images, device = len(run.seeds), out.logits.device
        empty = torch.full((num_images, len(grid.slots) + 1), -1, device=device)
        state = ZipState(
            backbone=run.backbone,
            session=session,
            seeds=run.seeds,
            keys=run.keys,
            rows=torch.arange(num_images, device=device),
            tokens=empty,
            trace=empty.clone(),
            progress=[Rows.begin(grid) for _ in range(num_images if self.adaptive else 1)],
            counts={"num_redrawn": 0} if self.adaptive else {},  # drafts that the adaptive rule rejected
        )
        self._decide(state, [[Entry(-1, 0, 0)] for _ in state.progress], out.logits)
        return state

    def step(self, state: ZipState) -> ZipState:
        """One forward: every open row of every image advances by one code."""
        if state.done:
            return state
        entries = [rows.entries() for rows in state.progress]
        most = max(len(listed) for listed in entries)
        entries = [listed + [Entry(-1, 0, -1)] * (most - len(listed)) for listed in entries]
        table = self._table(state, entries)  # b m 3
        codes = state.tokens.gather(1, table[..., 1]).clamp(min=0)
        out = state.backbone.step_at(state.session, codes, table[..., 0])
        self._decide(state, entries, out.logits)
        return state

    def _table(self, state: ZipState, entries: list[list[Entry]]) -> Tensor:
        table = torch.tensor(entries, device=state.tokens.device)  # b m 3
        return table.expand(len(state.seeds), -1, -1)

    def _decide(self, state: ZipState, entries: list[list[Entry]], logits: Tensor) -> None:
        """Draw every target, settle drafts, count."""
        targets = self._table(state, entries)[..., 2]
        tokens = draw(logits, seeds=state.keys, positions=targets.clamp(min=0), **self.warp)
        if self.adaptive:
            self._settle(state, entries, logits, tokens)
        place = torch.where(targets < 0, state.tokens.shape[1] - 1, targets)
        state.tokens.scatter_(1, place, tokens)
        if not self.adaptive:
            state.trace.scatter_(1, place, state.num_forwards)
        for image, (rows, listed) in enumerate(zip(state.progress, entries, strict=True)):
            for entry in listed:
                if entry.target >= 0:
                    self._count(state, rows, image, entry.target)
        state.num_forwards += 1
        state.done = all(rows.done for rows in state.progress)

    def _count(self, state: ZipState, rows: Rows, image: int, target: int) -> None:
        row = max(i for i, start in enumerate(rows.grid.starts) if start <= target)
        if rows.pending == row:  # still a draft
            return
        rows.counts[row] += 1
        if self.adaptive:
            state.trace[image, target] = state.num_forwards

    def _settle(self, state: ZipState, entries: list[list[Entry]], logits: Tensor, tokens: Tensor) -> None:
        """The adaptive rule, for the first codes of rows that opened early; changes ``tokens`` in place."""
        for image, (rows, listed) in enumerate(zip(state.progress, entries, strict=True)):
            for j, entry in enumerate(listed):
                row = rows.opened - 1
                if row == 0 or entry.target != rows.grid.starts[row]:
                    continue
                final = rows.complete(row - 1)  # the context above is whole: whatever is drawn now stays
                probs = warp_logits(logits[:, image, None, j, None], **self.warp).softmax(-1)[0, 0]
                if self.temperature == 0:
                    probs = torch.zeros_like(probs).scatter_(0, tokens[image, j, None], 1.0)
                if image in state.draft_probs:
                    draft = state.tokens[image, entry.target]
                    kept = self._test(state, image, entry.target, state.draft_probs[image], probs, draft)
                    tokens[image, j] = draft if kept else self._redraw(state, image, entry.target, probs)
                    state.counts["num_redrawn"] += not kept
                    final = final or kept
                rows.pending = -1 if final else row
                state.draft_probs[image] = probs
                if final:
                    del state.draft_probs[image]

    def _test(self, state: ZipState, image: int, target: int, q: Tensor, p: Tensor, draft: Tensor) -> bool:
        u = uniform(*self._where(state, image, target), 1, Stream.ACCEPT, self._iteration(state))[0, 0, 0]
        return bool(accept.fn(p[draft], q[draft], u))

    def _redraw(self, state: ZipState, image: int, target: int, p: Tensor) -> Tensor:
        """Draw from the residual of the distribution that held until now; with ``_test`` the result follows ``p``."""
        weights = residual.fn(p, state.draft_probs[image])
        weights = weights if bool((weights > 0).any()) else p
        noise = gumbel(*self._where(state, image, target), len(p), Stream.RESIDUAL, self._iteration(state))[0, 0]
        return (weights.log() + noise).argmax()

    def _where(self, state: ZipState, image: int, target: int) -> tuple[Tensor, Tensor]:
        return state.keys[image, None], torch.tensor([[target]], device=state.keys.device)

    def _iteration(self, state: ZipState) -> Tensor:
        return torch.tensor([state.num_forwards], device=state.keys.device)
