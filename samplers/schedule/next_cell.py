"""Next-cell sampling: cell after cell, each by a stochastic flow from noise (xAR, Ren et al., 2025, arXiv:2502.20388).

One step is one cell: ``num_steps`` passes of the backbone, whose cache holds the cells before. States are float64, as in the
official sampler. It has a loop of its own: the chain runs through the backbone, so there are no rows for a token head.

Letters: B images, K cells, M tokens of a cell, C latent channels, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.outputs import Guarantee, SamplerOutput
from vargen.random import Stream, normal
from vargen.samplers.base import Inputs, Run
from vargen.samplers.heads.diffusion import ContinuousSampler
from vargen.samplers.state import DecodeState
from vargen.validation.checks import check_integer

MAX_STEPS = 1000  # the noise of all of them is drawn at once
LAST_TIME = 0.04  # where the stochastic steps end; one step without noise leads from there to 0

CellNoise = Callable[
    [int], tuple[Tensor, Tensor]
]  # cell to its start [B, M, C] and the noise of its steps [S - 1, B, M, C]


@dataclass(frozen=True, kw_only=True, eq=False)
class NextCellInputs(Inputs):
    """What a call may give.

    Args:
        noise: instead of the counter-based one, see ``CellNoise``.
    """

    noise: CellNoise | None = None


@dataclass(kw_only=True)
class NextCellState(DecodeState):
    """Everything that changes while cells are drawn; tokens are float64 in cell order."""

    noise: CellNoise | None
    num_cells: int = 0  # drawn so far

    @property
    def cells(self) -> Tensor:
        """[B, K, M, C] the tokens by cell."""
        return self.tokens.unflatten(1, (self.backbone.num_cells, -1))


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
    inputs_type: ClassVar[type[Inputs]] = NextCellInputs

    num_steps: int = 40

    def check(self) -> None:
        """Raise ``ValueError`` for a setting out of range."""
        super().check()
        check_integer("num_steps", self.num_steps, low=2, high=MAX_STEPS)
        if self.num_diffusion_steps is not None:
            raise ValueError("num_diffusion_steps must be None for NextCellSampler; set num_steps")

    def prepare_condition(self, backbone: Any, condition: Any, drafter: Any) -> Any:
        """The session itself: xAR models open one on labels."""
        return backbone.open(condition, guidance_scale=self.guidance_scale)

    def begin(self, run: Run, inputs: NextCellInputs) -> NextCellState:
        """Draw the first cell."""
        shape, device = (len(run.seeds), run.backbone.num_codes), run.keys.device
        size = run.backbone.config.latent_channels
        state = NextCellState(
            backbone=run.backbone,
            session=run.condition,
            seeds=run.seeds,
            keys=run.keys,
            rows=torch.arange(shape[0], device=device),
            tokens=torch.full((*shape, size), math.nan, dtype=torch.float64, device=device),
            trace=torch.full(shape, -1, device=device),
            noise=inputs.noise,
        )
        return self.step(state)

    @torch.no_grad()
    def step(self, state: NextCellState) -> NextCellState:
        """Draw the next cell: ``num_steps`` passes. Advances the state in place."""
        cells, cell, count = state.cells, state.num_cells, state.backbone.num_cells
        scale = 1.0 + (self.guidance_scale - 1.0) * cell / max(count - 1, 1)
        first, steps = self._noise(state, cell) if state.noise is None else state.noise(cell)
        x = first.to(cells)
        times = torch.linspace(1.0, LAST_TIME, self.num_steps, dtype=torch.float64).tolist()
        for i, t in enumerate(times):
            clean = cells[:, cell - 1] if i == 0 and cell > 0 else None
            velocity = state.backbone.velocity(state.session, cell, x.float(), t, clean).to(x)
            drift = velocity + (x + (1 - t) * velocity)  # velocity - t * score, score = -noise / t
            guided = drift[0] if len(drift) == 1 or scale <= 1 else drift[1] + scale * (drift[0] - drift[1])
            if i == len(times) - 1:
                x = x - guided * t
            else:
                dt = times[i + 1] - t
                x = x + guided * dt + math.sqrt(2 * t * -dt) * self.temperature * steps[i].to(x)
        cells[:, cell] = x  # a view of the tokens
        state.num_cells += 1
        state.num_forwards += self.num_steps
        state.trace.view(cells.shape[:3])[:, cell] = state.num_forwards - 1
        state.done = state.num_cells == count
        return state

    def finish(self, state: NextCellState) -> SamplerOutput:
        """Return tokens ``[B, K M, C]`` in cell order, as float32, and statistics."""
        out = super().finish(state)
        return replace(out, latents=state.tokens.float())

    def _noise(self, state: NextCellState, cell: int) -> tuple[Tensor, Tensor]:
        size, channels = state.cells.shape[2:]
        places = torch.arange(cell * size, (cell + 1) * size, device=state.keys.device).expand(len(state.keys), -1)
        rows = normal(state.keys, places, self.num_steps * channels, Stream.NORMAL)
        rows = rows.unflatten(-1, (self.num_steps, channels)).permute(2, 0, 1, 3)  # S B M C
        return rows[0], rows[1:]
