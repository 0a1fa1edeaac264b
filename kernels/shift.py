"""Move the window over what was committed: outcomes behind the commit become drafts, new drafts fill the tail.

Every new draft gets the law it was really drawn from: a copied token a POINT label, a uniform draw a UNIFORM one
(never worse than the point label of the released code). Letters: G guidance branches, B images, N positions, W window,
V codes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vargen.kernels.window import Draft, Label, Verdict
from vargen.random import Stream, random_bits

Tail = Literal["uniform", "repeat_left", "repeat_above"]


def shift_window(
    verdict: Verdict,
    logits: Tensor,
    *,
    positions: Tensor,
    num_rows: Tensor,
    num_positions: int,
    seeds: Tensor,
    iteration: Tensor,
    tail: Tail = "uniform",
    grid_width: int | None = None,
    codes: Tensor | None = None,
    forced: Tensor | None = None,
) -> Draft:
    """Drafts of the next iteration.

    Args:
        verdict: outcome of this iteration.
        logits: ``[G, B, W, V]`` raw logits of this iteration; kept by the draft as label logits (not copied).
        positions: ``[B, W]`` int64 positions of this iteration's rows (consecutive).
        num_rows: ``[B]`` int64, rows that counted in this iteration.
        num_positions: N, end of the image.
        seeds, iteration: ``[B]`` int64, as in this iteration's verification.
        tail: how to fill new slots. ``"uniform"``: a code drawn uniformly. ``"repeat_left"``: the left neighbour's code,
            or the last known code where the neighbour is new as well; uniform in column 0. ``"repeat_above"``: the code
            one grid row up; uniform in row 0 and where that code is not known.
        grid_width: columns of the grid; needed by the two copying initialisers.
        codes: ``[B, N]`` int64 committed codes, this iteration's included; needed by ``"repeat_above"``.
        forced: ``[B, W]`` int64 codes that the positions of the *next* window must hold, -1 where free.

    Returns:
        A draft for positions ``positions + num_committed``. The last of its rows has no new proposal (its outcome is
        the bonus token); rows beyond the end have none.

    Raises:
        ValueError: unknown tail, or an argument that it needs is missing.
    """
    if tail not in ("uniform", "repeat_left", "repeat_above"):
        raise ValueError(f"tail must be 'uniform', 'repeat_left' or 'repeat_above', got {tail!r}")
    if tail != "uniform" and grid_width is None:
        raise ValueError(f"tail {tail!r} needs grid_width")
    if tail == "repeat_above" and codes is None:
        raise ValueError("tail 'repeat_above' needs the committed codes")
    return _shift_twin(
        verdict, logits, positions, num_rows, num_positions, seeds, iteration, tail, grid_width or 1, codes, forced
    )


def _shift_twin(
    verdict: Verdict,
    logits: Tensor,
    positions: Tensor,
    num_rows: Tensor,
    num_positions: int,
    seeds: Tensor,
    iteration: Tensor,
    tail: str,
    grid_width: int,
    codes: Tensor | None,
    forced: Tensor | None,
) -> Draft:
    window, num_codes = positions.shape[1], logits.shape[-1]
    column = torch.arange(window, device=positions.device)
    source = column + verdict.num_committed[:, None]  # B W, row of this iteration
    target = positions + verdict.num_committed[:, None]
    carried = source < num_rows[:, None]
    at = source.clamp(max=window - 1)
    token = verdict.tokens.gather(1, at)
    live = (num_rows > 0)[:, None]
    fresh = live & ~carried & (column < window - 1) & (target < num_positions - 1)  # the bonus row gets none

    filled, copied = _tail_tokens(verdict, num_rows, token, carried, target, tail, grid_width, codes)
    word = random_bits(seeds, target, 1, Stream.INIT, iteration)[..., 0]
    uniform = (word * num_codes) >> 32  # bias below V / 2^32
    copied = copied & fresh
    token = token.where(carried, filled.where(copied, uniform)).where(carried | fresh, -1)
    kind = torch.where(copied, int(Label.POINT), int(Label.UNIFORM))
    kind = torch.where(carried, int(Label.ROW), kind).where(carried | fresh, int(Label.NONE))
    prob = verdict.prob.gather(1, at).where(carried, copied + ~copied * (1.0 / num_codes)).where(carried | fresh, 0.0)
    if forced is not None:
        pinned = (forced >= 0) & (carried | fresh)
        token, prob = forced.where(pinned, token), prob.masked_fill(pinned, 1.0)
        kind = kind.masked_fill(pinned, int(Label.POINT))
    return Draft(token, kind.to(torch.int8), prob, at.where(carried, 0), logits, verdict.stats)


def _tail_tokens(
    verdict: Verdict,
    num_rows: Tensor,
    token: Tensor,
    carried: Tensor,
    target: Tensor,
    tail: str,
    grid_width: int,
    codes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Copied tokens ``[B, W]`` and where copying is possible."""
    if tail == "repeat_left":
        last = verdict.tokens.gather(1, (num_rows - 1).clamp(min=0)[:, None])  # known: committed or carried
        return last.expand_as(target), target % grid_width != 0
    if tail == "repeat_above":
        assert codes is not None
        above = target - grid_width
        slot = above - target[:, :1]  # >= 0: inside the new window
        inside = token.gather(1, slot.clamp(0, token.shape[1] - 1))
        known = carried.gather(1, slot.clamp(0, token.shape[1] - 1)) & (slot >= 0)
        old = codes.gather(1, above.clamp(0, codes.shape[1] - 1))
        return inside.where(slot >= 0, old), (above >= 0) & ((slot < 0) | known)
    return torch.zeros_like(target), torch.zeros_like(target, dtype=torch.bool)
