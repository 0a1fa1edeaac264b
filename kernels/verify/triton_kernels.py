"""Triton kernels of ``vargen.kernels.verify.verify``: one program a row decides, one an image counts and completes.

Launch 1 reads every row once: distribution, test, draw. Launch 2 finds the first rejection; for the carries that need the
residual of that row only, it reads the two rows again (their thresholds and normalisers are stored). A second launch
in place of a last-arriver inside the first needs no memory fence and costs microseconds inside a CUDA graph.

p target, q draft. Letters: G guidance branches, B images, W window, V codes, E embeddings of D numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vargen.kernels import device as rows
from vargen.kernels.acceptance import accept, residual
from vargen.kernels.language import constant, jit, tl
from vargen.kernels.verify.group import group_masses
from vargen.kernels.verify.label import label_at, label_tile
from vargen.kernels.verify.types import CARRIES

GUMBEL, MAXIMAL, INDEPENDENT, NONE = (constant(number) for number in range(len(CARRIES)))  # in the order of CARRIES


class Places(NamedTuple):
    """Pointers of ``types.Place``."""

    seeds: Any  # B
    positions: Any  # B W
    iteration: Any  # B
    num_rows: Any  # B
    forced: Any  # B W, if FORCED


class Given(NamedTuple):
    """Pointers of ``types.VerifyNoise``, if GIVEN."""

    accept: Any  # B W
    fresh: Any  # B W V
    residual: Any  # B W V


class Outcomes(NamedTuple):
    """Pointers ``[B, W]`` of ``types.VerifyOutcome``, and p of the draft tokens."""

    tokens: Any
    accepted: Any
    prob: Any
    draft_prob: Any
    stats: Any  # B W 2


@jit
def draw_row(
    row, tau, lse, label, retry, seed, position, iteration, fresh_ptr, residual_ptr,
    GUIDED: tl.constexpr, LABEL_GUIDED: tl.constexpr, GIVEN: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Draw from (p - q)+ where ``retry`` (from p if that is empty), else from p."""
    best = float("-inf")
    code = 0
    fresh_best = float("-inf")
    fresh_code = 0
    stream = tl.where(retry, rows.RESIDUAL, rows.FRESH)
    for piece in range(PIECES):
        x = rows.load_tile(row, piece, GUIDED, PIECE)
        at = piece * PIECE + tl.arange(0, PIECE)
        if GIVEN:
            g = tl.load(fresh_ptr + at, mask=at < row.V, other=0.0)
            g = tl.where(retry, tl.load(residual_ptr + at, mask=at < row.V, other=0.0), g)
        else:
            g = rows.gumbel_tile(seed, position, stream, iteration, piece, PIECE)
        left = residual(rows.prob_of(x, tau, lse), label_tile(label, piece, LABEL_GUIDED, PIECE))
        best, code = rows.better(best, code, tl.where(left > 0, tl.log(left) + g, float("-inf")), piece, PIECE)
        kept = tl.where(x >= tau, x + g, float("-inf"))
        fresh_best, fresh_code = rows.better(fresh_best, fresh_code, kept, piece, PIECE)
    return tl.where(retry & (best > float("-inf")), code, fresh_code)


@jit
def best_code(
    row, tau, seed, position, fresh_ptr,
    GREEDY: tl.constexpr, GUIDED: tl.constexpr, GIVEN: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The most likely code, or the draw with the noise of the position."""
    best = float("-inf")
    code = 0
    for piece in range(PIECES):
        x = rows.load_tile(row, piece, GUIDED, PIECE)
        if not GREEDY:
            if GIVEN:
                at = piece * PIECE + tl.arange(0, PIECE)
                g = tl.load(fresh_ptr + at, mask=at < row.V, other=0.0)
            else:
                g = rows.gumbel_tile(seed, position, position * 0 + rows.GUMBEL, position * 0, piece, PIECE)
            x = tl.where(x >= tau, x + g, float("-inf"))
        best, code = rows.better(best, code, x, piece, PIECE)
    return code


@jit(do_not_specialize=["k", "label_rows", "group_codes"])
def rows_kernel(
    logits,  # device.Logits
    warp,  # device.Warp
    k,
    drafts,  # label.Drafts
    label_rows,  # W'
    places,  # Places
    given,  # Given
    group,  # group.Groups, if HALF
    group_codes,  # E
    outcomes,  # Outcomes
    errors_ptr,  # B
    W,
    CARRY: tl.constexpr,
    GREEDY: tl.constexpr,
    GUIDED: tl.constexpr,
    LABEL_GUIDED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    SPARSE: tl.constexpr,
    NUCLEUS: tl.constexpr,
    FORCED: tl.constexpr,
    GIVEN: tl.constexpr,
    HALF: tl.constexpr,  # half the group, 0 without groups
    CLOSE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Decide one row: its distribution, the test of its draft, and its outcome as far as the row alone knows it."""
    w = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    here = b * W + w
    token = tl.load(drafts.tokens + here)
    has = (token >= 0) & (tl.load(drafts.kind + here).to(tl.int32) > 0)
    if w >= tl.load(places.num_rows + b):
        tl.store(outcomes.tokens + here, -1)
        tl.store(outcomes.accepted + here, 0)
        tl.store(outcomes.prob + here, 0.0)
        return
    if FORCED:
        forced = tl.load(places.forced + here)
        if forced >= 0:
            tl.store(outcomes.tokens + here, forced)
            tl.store(outcomes.accepted + here, (has & (token == forced)).to(tl.uint8))
            tl.store(outcomes.prob + here, 1.0)
            tl.store(outcomes.draft_prob + here, 1.0)
            return
    row = rows.row_at(logits, warp, b, w, PER_IMAGE)
    z = rows.load_tile(row, 0, GUIDED, BLOCK)
    tau, lse = rows.row_stats(z, row, k, warp.top_p, GUIDED, SPARSE, NUCLEUS, BLOCK, TILES)
    tl.store(outcomes.stats + 2 * here, tau)
    tl.store(outcomes.stats + 2 * here + 1, lse)
    position = tl.load(places.positions + here)
    if (lse == float("inf")) | (lse == float("-inf")):
        tl.atomic_min(errors_ptr + b, position)

    seed = tl.load(places.seeds + b)
    fresh_ptr = given.fresh + here * warp.V
    if GREEDY or CARRY == GUMBEL:
        y = best_code(row, tau, seed, position, fresh_ptr, GREEDY, GUIDED, GIVEN, PIECE, PIECES).to(tl.int64)
        tl.store(outcomes.accepted + here, (has & (y == token)).to(tl.uint8))
    else:
        iteration = tl.load(places.iteration + b)
        label = label_at(drafts, label_rows, warp, b, here, PER_IMAGE)
        drafted = tl.maximum(token, 0)
        z_token = rows.load_code(row, drafted, GUIDED)
        p_token = rows.prob_of(z_token, tau, lse)
        p = p_token
        q = label.prob
        if HALF > 0:  # noqa: SIM102 - known when the kernel is compiled
            if has:
                p, q = group_masses(
                    z, row, tau, lse, label, drafted, z_token, group, group_codes,
                    GUIDED, LABEL_GUIDED, HALF, CLOSE, DIM, BLOCK, TILES,
                )  # fmt: skip
        if GIVEN:
            u = tl.load(given.accept + here)
        else:
            u = rows.uniform_of(seed, position, rows.ACCEPT, iteration)
        kept = has & accept(p, q, u)
        tl.store(outcomes.accepted + here, kept.to(tl.uint8))
        tl.store(outcomes.draft_prob + here, p_token)
        y = drafted
        retry = has & (CARRY == MAXIMAL)
        if ((kept == 0) & (CARRY == MAXIMAL)) | (CARRY == INDEPENDENT):
            y = draw_row(
                row, tau, lse, label, retry, seed, position, iteration, fresh_ptr, given.residual + here * warp.V,
                GUIDED, LABEL_GUIDED, GIVEN, PIECE, PIECES,
            ).to(tl.int64)  # fmt: skip
    tl.store(outcomes.tokens + here, y)
    y_prob = 1.0
    if not GREEDY:
        y_prob = rows.prob_of(rows.load_code(row, y, GUIDED), tau, lse)
    tl.store(outcomes.prob + here, y_prob)


@jit(do_not_specialize=["label_rows"])
def finish_kernel(
    logits,  # device.Logits
    warp,  # device.Warp
    drafts,  # label.Drafts
    label_rows,  # W'
    places,  # Places
    given,  # Given
    outcomes,  # Outcomes
    committed_ptr,  # B
    W,
    CARRY: tl.constexpr,
    GUIDED: tl.constexpr,
    LABEL_GUIDED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    FORCED: tl.constexpr,
    GIVEN: tl.constexpr,
    WINDOW: tl.constexpr,  # power of two from W
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Count what an image commits; with carries that stop at the first rejection, draw that row."""
    b = tl.program_id(0).to(tl.int64)
    num_rows = tl.load(places.num_rows + b)
    j = tl.arange(0, WINDOW)
    here = b * W + j
    accepted = tl.load(outcomes.accepted + here, mask=j < W, other=0) != 0
    first = tl.min(tl.where((j < num_rows) & (accepted == 0), j, W), 0)  # first rejection
    tl.store(committed_ptr + b, tl.minimum((first + 1).to(tl.int64), num_rows))
    if CARRY >= INDEPENDENT:  # NONE too: they stop at the first rejection
        at = b * W + tl.minimum(first, W - 1)
        has = (tl.load(drafts.tokens + at) >= 0) & (tl.load(drafts.kind + at).to(tl.int32) > 0)
        drawn = (first < num_rows) & (has | (CARRY == NONE))
        if FORCED:
            drawn = drawn & (tl.load(places.forced + at) < 0)
        passed = accepted & (j < first)
        behind = (j > first) | (j >= num_rows)
        inside = (j < W) & (j != tl.where(drawn, first, -1))  # the row drawn below is written once
        y = tl.load(outcomes.tokens + here, mask=j < W, other=-1)
        y = tl.where(passed, tl.load(drafts.tokens + here, mask=j < W, other=-1), y)
        prob = tl.load(outcomes.prob + here, mask=j < W, other=0.0)
        prob = tl.where(passed, tl.load(outcomes.draft_prob + here, mask=passed, other=0.0), prob)
        if CARRY == NONE:
            y = tl.where(behind, -1, y)
            prob = tl.where(behind, 0.0, prob)
        tl.store(outcomes.tokens + here, y, mask=inside)
        tl.store(outcomes.prob + here, prob, mask=inside)
        tl.store(outcomes.accepted + here, passed.to(tl.uint8), mask=j < W)
        if drawn:
            row = rows.row_at(logits, warp, b, first, PER_IMAGE)
            label = label_at(drafts, label_rows, warp, b, at, PER_IMAGE)
            tau = tl.load(outcomes.stats + 2 * at)
            lse = tl.load(outcomes.stats + 2 * at + 1)
            code = draw_row(
                row, tau, lse, label, has, tl.load(places.seeds + b), tl.load(places.positions + at),
                tl.load(places.iteration + b), given.fresh + at * warp.V, given.residual + at * warp.V,
                GUIDED, LABEL_GUIDED, GIVEN, PIECE, PIECES,
            )  # fmt: skip
            tl.store(outcomes.tokens + at, code.to(tl.int64))
            tl.store(outcomes.prob + at, rows.prob_of(rows.load_code(row, code, GUIDED), tau, lse))


@jit(do_not_specialize=["k"])
def stats_kernel(
    logits,  # device.Logits
    warp,  # device.Warp
    k,
    stats_ptr,  # B W 2
    W,
    GUIDED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    SPARSE: tl.constexpr,
    NUCLEUS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Threshold and log-normaliser of every row, for labels that come without them."""
    w = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    row = rows.row_at(logits, warp, b, w, PER_IMAGE)
    tau, lse = rows.row_stats(
        rows.load_tile(row, 0, GUIDED, BLOCK), row, k, warp.top_p, GUIDED, SPARSE, NUCLEUS, BLOCK, TILES
    )
    tl.store(stats_ptr + 2 * (b * W + w), tau)
    tl.store(stats_ptr + 2 * (b * W + w) + 1, lse)
