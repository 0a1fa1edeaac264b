"""Move the window over what was committed: outcomes behind the commit become drafts, new drafts fill the tail.

Every new draft is labelled with the distribution it was really drawn from: a copied token a POINT label, a uniform draw a UNIFORM one
(never worse than the point label of the released code). Letters: G guidance branches, B images, N positions, W window,
V codes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vargen.kernels.device import INIT
from vargen.kernels.language import jit, tl, triton, use_triton
from vargen.kernels.verify.label import NONE, POINT, ROW, UNIFORM
from vargen.kernels.verify.types import Draft, Label, VerifyOutcome
from vargen.random import Stream, random_bits

Tail = Literal["uniform", "repeat_left", "repeat_above"]


def shift_window(
    outcome: VerifyOutcome,
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
        outcome: outcome of this iteration.
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
    found = (outcome.tokens, outcome.prob, outcome.num_committed)
    place = (positions, num_rows, num_positions, seeds, iteration)
    filler = (tail, grid_width or 1, codes, forced, logits.shape[-1])
    run = _shift if use_triton(logits) or torch.compiler.is_compiling() else _shift_reference
    return Draft(*run(*found, *place, *filler), logits, outcome.stats)  # type: ignore[arg-type, call-arg]


def _shift_reference(
    tokens: Tensor,
    prob: Tensor,
    committed: Tensor,
    positions: Tensor,
    num_rows: Tensor,
    num_positions: int,
    seeds: Tensor,
    iteration: Tensor,
    tail: str,
    grid_width: int,
    codes: Tensor | None,
    forced: Tensor | None,
    num_codes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    window = positions.shape[1]
    column = torch.arange(window, device=positions.device)
    source = column + committed[:, None]  # B W, row of this iteration
    target = positions + committed[:, None]
    carried = source < num_rows[:, None]
    at = source.clamp(max=window - 1)
    token = tokens.gather(1, at)
    live = (num_rows > 0)[:, None]
    fresh = live & ~carried & (column < window - 1) & (target < num_positions - 1)  # the bonus row gets none

    filled, copied = _tail_tokens(tokens, num_rows, token, carried, target, tail, grid_width, codes)
    word = random_bits(seeds, target, 1, Stream.INIT, iteration)[..., 0]
    uniform = (word * num_codes) >> 32  # bias below V / 2^32
    copied = copied & fresh
    token = token.where(carried, filled.where(copied, uniform)).where(carried | fresh, -1)
    kind = torch.where(copied, int(Label.POINT), int(Label.UNIFORM))
    kind = torch.where(carried, int(Label.ROW), kind).where(carried | fresh, int(Label.NONE))
    new_prob = torch.where(copied, 1.0, 1.0 / num_codes)
    prob = prob.gather(1, at).where(carried, new_prob).where(carried | fresh, 0.0)
    if forced is not None:
        pinned = (forced >= 0) & (carried | fresh)
        token, prob = forced.where(pinned, token), prob.masked_fill(pinned, 1.0)
        kind = kind.masked_fill(pinned, int(Label.POINT))
    return token, kind.to(torch.int8), prob, at.where(carried, 0)


def _tail_tokens(
    tokens: Tensor,
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
        last = tokens.gather(1, (num_rows - 1).clamp(min=0)[:, None])  # known: committed or carried
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


@jit(do_not_specialize=["num_positions", "grid_width", "num_codes"])
def _shift_kernel(
    tokens_ptr,  # B W
    prob_ptr,  # B W
    committed_ptr,  # B
    positions_ptr,  # B W
    num_rows_ptr,  # B
    num_positions,
    seeds_ptr,  # B
    iteration_ptr,  # B
    grid_width,
    codes_ptr,  # B N, if ABOVE
    forced_ptr,  # B W, if FORCED
    num_codes,
    uniform_prob,
    token_out,  # B W, and the three below
    kind_out,
    prob_out,
    row_out,
    W,
    LEFT: tl.constexpr,
    ABOVE: tl.constexpr,
    FORCED: tl.constexpr,
    WINDOW: tl.constexpr,  # power of two from W
):
    b = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, WINDOW)
    here = b * W + j
    num_rows = tl.load(num_rows_ptr + b)
    committed = tl.load(committed_ptr + b)
    source = j + committed
    target = tl.load(positions_ptr + here, mask=j < W, other=0) + committed
    carried = source < num_rows
    at = tl.minimum(source, W - 1)
    live = tl.where(num_rows > 0, W - 1, 0)  # the bonus row gets none, a finished image nothing
    fresh = (source >= num_rows) & (j < live) & (target < num_positions - 1)
    token = tl.load(tokens_ptr + b * W + at)
    prob = tl.load(prob_ptr + b * W + at)

    zero = (j * 0).to(tl.uint32)
    step = zero + tl.load(iteration_ptr + b).to(tl.uint32)
    word, _, _, _ = tl.philox(tl.load(seeds_ptr + b), target.to(tl.uint32), zero, zero + INIT, step)
    filled = (word.to(tl.int64) * num_codes) >> 32
    copied = fresh & (j < 0)
    if LEFT:
        copied = fresh & (target % grid_width != 0)
        filled = tl.where(copied, tl.load(tokens_ptr + b * W + tl.maximum(num_rows - 1, 0)), filled)
    if ABOVE:
        above = target - grid_width
        slot = above - (tl.load(positions_ptr + b * W) + committed)
        copied = fresh & (above >= 0) & (slot + committed < num_rows)
        known = tl.load(tokens_ptr + b * W + tl.minimum(tl.maximum(slot + committed, 0), W - 1))
        last = num_positions - 1
        old = tl.load(codes_ptr + b * num_positions + tl.minimum(tl.maximum(above, 0), last))
        filled = tl.where(copied, tl.where(slot >= 0, known, old), filled)
    token = tl.where(carried, token, tl.where(fresh, filled, -1))
    prob = tl.where(carried, prob, tl.where(fresh, tl.where(copied, 1.0, uniform_prob), 0.0))
    kind = tl.where(carried, ROW, tl.where(fresh, tl.where(copied, POINT, UNIFORM), NONE))
    if FORCED:
        forced = tl.load(forced_ptr + here, mask=j < W, other=-1)
        pinned = (forced >= 0) & (carried | fresh)
        token = tl.where(pinned, forced, token)
        prob = tl.where(pinned, 1.0, prob)
        kind = tl.where(pinned, POINT, kind)
    tl.store(token_out + here, token, mask=j < W)
    tl.store(kind_out + here, kind.to(tl.int8), mask=j < W)
    tl.store(prob_out + here, prob, mask=j < W)
    tl.store(row_out + here, tl.where(carried, at, 0), mask=j < W)


@torch.library.custom_op("vargen::shift", mutates_args=())
def _shift(
    tokens: Tensor,
    prob: Tensor,
    committed: Tensor,
    positions: Tensor,
    num_rows: Tensor,
    num_positions: int,
    seeds: Tensor,
    iteration: Tensor,
    tail: str,
    grid_width: int,
    codes: Tensor | None,
    forced: Tensor | None,
    num_codes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not use_triton(tokens):
        return _shift_reference(
            tokens, prob, committed, positions, num_rows, num_positions, seeds, iteration, tail, grid_width,
            codes, forced, num_codes,
        )  # fmt: skip
    batch, window = tokens.shape
    out = _empty_draft(tokens)
    _shift_kernel[(batch,)](
        tokens.contiguous(),
        prob.contiguous(),
        committed.contiguous(),
        positions.contiguous(),
        num_rows.contiguous(),
        num_positions,
        seeds.contiguous(),
        iteration.contiguous(),
        grid_width,
        tokens if codes is None else codes.contiguous(),
        tokens if forced is None else forced.contiguous(),
        num_codes,
        1.0 / num_codes,
        *out,
        window,
        LEFT=tail == "repeat_left",
        ABOVE=tail == "repeat_above",
        FORCED=forced is not None,
        WINDOW=triton.next_power_of_2(window),
        num_warps=1,
    )
    return out


def _empty_draft(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kind, prob = (torch.empty(tokens.shape, dtype=t, device=tokens.device) for t in (torch.int8, torch.float32))
    return torch.empty_like(tokens), kind, prob, torch.empty_like(tokens)


@_shift.register_fake
def _(tokens: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    return _empty_draft(tokens)
