"""Next-cell sampling: cell after cell, each by a stochastic flow from noise (xAR, Ren et al., 2025, arXiv:2502.20388).

One step is one cell: ``num_steps`` passes of the backbone, whose cache holds the cells before. States are float64, as in the
official sampler.

Letters: B images, K cells, M tokens of a cell, C latent channels, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.outputs import DecodeStats, Guarantee, SamplerOutput
from vargen.random import Stream, normal, seed_tensor
from vargen.samplers.heads.diffusion import ContinuousSampler
from vargen.validation.checks import check_integer, check_seeds

MAX_STEPS = 1000  # the noise of all of them is drawn at once
LAST_TIME = 0.04  # where the stochastic steps end; one step without noise leads from there to 0

CellNoise = Callable[
    [int], tuple[Tensor, Tensor]
]  # cell to its start [B, M, C] and the noise of its steps [S - 1, B, M, C]


@dataclass
class NextCellState:
    """Everything that changes while a batch is decoded, and what ``stream`` yields."""

    backbone: Any
    session: Any
    seeds: list[int]
    keys: Tensor  # [B] int64
    cells: Tensor  # [B, K, M, C] float64, zero where not drawn
    noise: CellNoise | None
    num_cells: int = 0  # drawn so far
    num_forwards: int = 0
    done: bool = False

    @property
    def codes(self) -> Tensor:
        """[B, K M, C] tokens in cell order, NaN where not drawn."""
        drawn = torch.arange(self.cells.shape[1], device=self.keys.device) < self.num_cells
        return self.cells.masked_fill(~drawn[:, None, None], math.nan).flatten(1, 2)

    @property
    def num_committed(self) -> Tensor:
        """[B] int64 tokens drawn."""
        return torch.full_like(self.keys, self.num_cells * self.cells.shape[2])


@dataclass(frozen=True, kw_only=True)
class NextCellSampler(ContinuousSampler):
    """Draw the cells of an xAR model. The official models use 40 steps and guidance 2.7 (B), 50 and 2.3 (L) or 2.2 (H).

    Args:
        guidance_scale: of the last cell; the first is not guided, those between lie on a line.
        temperature: multiplies the noise of the steps, not the start of a cell.
        num_steps: passes a cell.
    """

    guarantee: ClassVar[Guarantee] = "exact"
    required_features: ClassVar[frozenset[str]] = frozenset({Feature.CONTINUOUS, Feature.CELLS})

    num_steps: int = 40

    def check(self) -> None:
        """Raise ``ValueError`` for a setting out of range."""
        super().check()
        check_integer("num_steps", self.num_steps, low=2, high=MAX_STEPS)
        if self.num_diffusion_steps is not None:
            raise ValueError("num_diffusion_steps must be None for NextCellSampler; set num_steps")

    def start(  # type: ignore[override]  # names its own inputs
        self,
        backbone: Any,
        condition: Any,
        *,
        seeds: Sequence[int] | Tensor | int,
        tokenizer: Any = None,
        drafter: Any = None,
        noise: CellNoise | None = None,
    ) -> NextCellState:
        """Check the arguments and draw the first cell.

        Args:
            backbone, condition, seeds: as in ``sample``.
            tokenizer, drafter: not read.
            noise: instead of the counter-based one, see ``CellNoise``.
        """
        self.check_backbone(backbone)
        session = backbone.open(condition, guidance_scale=self.guidance_scale)
        listed = check_seeds(seeds, len(session.labels) // session.branches)
        keys = seed_tensor(listed, session.labels.device)
        size = backbone.num_codes // backbone.num_cells
        shape = (len(listed), backbone.num_cells, size, backbone.config.latent_channels)
        cells = torch.zeros(shape, dtype=torch.float64, device=keys.device)
        return self.step(NextCellState(backbone, session, listed, keys, cells, noise))

    @torch.no_grad()
    def step(self, state: NextCellState) -> NextCellState:
        """Draw the next cell: ``num_steps`` passes. Advances the state in place."""
        cell, count = state.num_cells, state.cells.shape[1]
        scale = 1.0 + (self.guidance_scale - 1.0) * cell / max(count - 1, 1)
        first, steps = self._noise(state, cell) if state.noise is None else state.noise(cell)
        x = first.to(state.cells)
        times = torch.linspace(1.0, LAST_TIME, self.num_steps, dtype=torch.float64).tolist()
        for i, t in enumerate(times):
            clean = state.cells[:, cell - 1] if i == 0 and cell > 0 else None
            velocity = state.backbone.velocity(state.session, cell, x.float(), t, clean).to(x)
            drift = velocity + (x + (1 - t) * velocity)  # velocity - t * score, score = -noise / t
            guided = drift[0] if len(drift) == 1 or scale <= 1 else drift[1] + scale * (drift[0] - drift[1])
            if i == len(times) - 1:
                x = x - guided * t
            else:
                dt = times[i + 1] - t
                x = x + guided * dt + math.sqrt(2 * t * -dt) * self.temperature * steps[i].to(x)
        state.cells[:, cell] = x
        state.num_cells += 1
        state.num_forwards += self.num_steps
        state.done = state.num_cells == count
        return state

    def finish(self, state: NextCellState) -> SamplerOutput:
        """Return tokens ``[B, K M, C]`` in cell order and statistics."""
        passes = torch.full((len(state.seeds),), state.num_forwards)
        trace = torch.arange(state.cells.shape[1]).repeat_interleave(state.cells.shape[2])
        stats = DecodeStats(
            num_forwards=state.num_forwards,
            forwards_per_image=passes,
            commit_trace=((trace + 1) * self.num_steps - 1).expand(len(state.seeds), -1),
            guarantee=self.guarantee,
        )
        return SamplerOutput(None, state.seeds, stats, latents=state.cells.flatten(1, 2).float())

    def _noise(self, state: NextCellState, cell: int) -> tuple[Tensor, Tensor]:
        size, channels = state.cells.shape[2:]
        places = torch.arange(cell * size, (cell + 1) * size, device=state.keys.device).expand(len(state.keys), -1)
        rows = normal(state.keys, places, self.num_steps * channels, Stream.NORMAL)
        rows = rows.unflatten(-1, (self.num_steps, channels)).permute(2, 0, 1, 3)  # S B M C
        return rows[0], rows[1:]
