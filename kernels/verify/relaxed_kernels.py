"""Triton kernels of ``vargen.kernels.verify.relaxed``: rows, then the neighbours of the first rejection, then its residual.

The set of codes that a residual leaves out is marked in a scratch row per image by a launch of its own: the end of a
launch is the one fence every device agrees on.

p target, q draft. Letters: G guidance branches, B images, W window, V codes, K width of the neighbour table.
"""

from __future__ import annotations

from vargen.kernels import device as rows
from vargen.kernels.acceptance import accept, residual
from vargen.kernels.language import jit, tl
from vargen.kernels.tree.neighborhood import every_neighbor_mass_of, neighbor_mass_of


@jit
def first_rejection(accepted_ptr, num_rows_ptr, b, W, WINDOW: tl.constexpr):
    """First row of image ``b`` that was not accepted, W if there is none; the number of rows; the flags."""
    j = tl.arange(0, WINDOW)
    num_rows = tl.load(num_rows_ptr + b)
    accepted = tl.load(accepted_ptr + b * W + j, mask=j < W, other=0) != 0
    return tl.min(tl.where((j < num_rows) & (accepted == 0), j, W), 0), num_rows, accepted


@jit
def best_code(cond, uncond, scale, V, tau, seed, position, iteration, noise_ptr,
              GUIDED: tl.constexpr, GREEDY: tl.constexpr, GIVEN: tl.constexpr, PIECE: tl.constexpr,
              PIECES: tl.constexpr, inv_t):  # fmt: skip
    """Argmax of a row, or a fresh draw from it, with the value that won."""
    best = float("-inf")
    code = 0
    for piece in range(PIECES):
        x = rows.load_tile(cond, uncond, scale, inv_t, piece, V, GUIDED, PIECE)
        if not GREEDY:
            if GIVEN:
                at = piece * PIECE + tl.arange(0, PIECE)
                g = tl.load(noise_ptr + at, mask=at < V, other=0.0)
            else:
                g = rows.gumbel_tile(seed, position, position * 0 + 2, iteration, piece, PIECE)  # Stream.FRESH
            x = tl.where(x >= tau, x + g, float("-inf"))
        best, code = rows.better(best, code, x, piece, PIECE)
    return best, code


@jit(do_not_specialize=["k", "label_rows", "width", "num_neighbors"])
def relaxed_rows_kernel(
    logits_ptr, stride_g, stride_b, stride_w,  # G B W V
    label_ptr, label_stride_g, label_stride_b, label_stride_w, label_stats_ptr, label_rows,
    tokens_ptr, kind_ptr, prob_ptr, row_ptr,  # B W
    scales_ptr, scale, inv_t, k, top_p, V,
    seeds_ptr, positions_ptr, iteration_ptr, num_rows_ptr, forced_ptr,
    uniform_ptr, fresh_ptr, residual_ptr,
    neighbors_ptr, width, num_neighbors, constant, factor,  # V K
    y_ptr, accepted_ptr, y_prob_ptr, draft_prob_ptr, count_ptr,  # B W
    stats_ptr, errors_ptr, W,
    CARRY: tl.constexpr, GREEDY: tl.constexpr, GUIDED: tl.constexpr, LABEL_GUIDED: tl.constexpr,
    PER_IMAGE: tl.constexpr, SPARSE: tl.constexpr, NUCLEUS: tl.constexpr, FORCED: tl.constexpr, GIVEN: tl.constexpr,
    NEIGHBORS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Decide one row: the test with the neighbours' mass; a fresh draw where the carry wants one."""
    w = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    here = b * W + w
    token = tl.load(tokens_ptr + here)
    has = (token >= 0) & (tl.load(kind_ptr + here).to(tl.int32) > 0)
    tl.store(y_ptr + here, -1)
    tl.store(y_prob_ptr + here, 0.0)
    tl.store(draft_prob_ptr + here, 1.0)
    tl.store(count_ptr + here, 0)
    if w >= tl.load(num_rows_ptr + b):
        tl.store(accepted_ptr + here, 0)
        return
    if FORCED:
        forced = tl.load(forced_ptr + here)
        if forced >= 0:
            tl.store(y_ptr + here, forced)
            tl.store(accepted_ptr + here, (has & (token == forced)).to(tl.uint8))
            tl.store(y_prob_ptr + here, 1.0)
            return
    if PER_IMAGE:
        scale = tl.load(scales_ptr + b)
    cond = logits_ptr + b * stride_b + w * stride_w
    uncond = cond + stride_g
    z = rows.load_tile(cond, uncond, scale, inv_t, 0, V, GUIDED, BLOCK)
    tau, lse = rows.row_stats(z, cond, uncond, scale, inv_t, V, k, top_p, GUIDED, SPARSE, NUCLEUS, BLOCK, TILES)
    tl.store(stats_ptr + 2 * here, tau)
    tl.store(stats_ptr + 2 * here + 1, lse)
    position = tl.load(positions_ptr + here)
    if (lse == float("inf")) | (lse == float("-inf")):
        tl.atomic_min(errors_ptr + b, position)

    drafted = tl.maximum(token, 0)
    p = rows.law_of(rows.load_code(cond, uncond, scale, inv_t, drafted, GUIDED), tau, lse)
    mass, count = neighbor_mass_of(
        cond, uncond, scale, inv_t, tau, lse, drafted, p, neighbors_ptr, width, num_neighbors, constant, factor,
        GUIDED, NEIGHBORS,
    )  # fmt: skip
    tl.store(count_ptr + here, count)
    seed = tl.load(seeds_ptr + b)
    iteration = tl.load(iteration_ptr + b)
    if GREEDY or CARRY == 2:
        _, code = best_code(
            cond, uncond, scale, V, tau, seed, position, iteration, fresh_ptr + here * V,
            GUIDED, GREEDY, GIVEN, PIECE, PIECES, inv_t,
        )  # fmt: skip
        tl.store(y_ptr + here, code.to(tl.int64))
        p_code = rows.law_of(rows.load_code(cond, uncond, scale, inv_t, code, GUIDED), tau, lse)
        tl.store(y_prob_ptr + here, 1.0 if GREEDY else p_code)
    if GREEDY:
        kept = (token == code) | (p + mass > p_code) | ((p + mass == p_code) & (token < code))
    else:
        tl.store(draft_prob_ptr + here, p)
        if GIVEN:
            u = tl.load(uniform_ptr + here)
        else:
            u = rows.uniform_of(seed, position, 1, iteration)  # Stream.ACCEPT
        kept = accept(p + mass, tl.load(prob_ptr + here), u)
    tl.store(accepted_ptr + here, (has & kept).to(tl.uint8))


@jit(do_not_specialize=["width", "num_neighbors"])
def mark_kernel(
    tokens_ptr, kind_ptr, accepted_ptr, count_ptr, num_rows_ptr, neighbors_ptr, width, num_neighbors,
    marks_ptr,  # B V uint8, zero
    W, V,
    RING: tl.constexpr, NEIGHBORS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Mark the codes that the residual of the first rejection leaves out."""
    b = tl.program_id(0).to(tl.int64)
    first, num_rows, _ = first_rejection(accepted_ptr, num_rows_ptr, b, W, WINDOW)
    at = b * W + tl.minimum(first, W - 1)
    token = tl.load(tokens_ptr + at)
    if (first < num_rows) & (token >= 0) & (tl.load(kind_ptr + at).to(tl.int32) > 0):
        count = tl.load(count_ptr + at)
        if RING:  # the released codes: k + 1 codes as soon as one counted
            count = tl.where(count > 0, num_neighbors + 1, 0)
        m = tl.arange(0, NEIGHBORS)
        near = tl.load(neighbors_ptr + token * width + m, mask=m < count, other=0).to(tl.int64)
        tl.store(marks_ptr + b * V + near, m * 0 + 1, mask=m < count)


@jit(do_not_specialize=["label_rows", "width"])
def relaxed_finish_kernel(
    logits_ptr, stride_g, stride_b, stride_w,
    label_ptr, label_stride_g, label_stride_b, label_stride_w, label_stats_ptr, label_rows,
    tokens_ptr, kind_ptr, prob_ptr, row_ptr,
    scales_ptr, scale, inv_t, V,
    seeds_ptr, positions_ptr, iteration_ptr, num_rows_ptr, forced_ptr, fresh_ptr, residual_ptr,
    neighbors_ptr, width, constant, factor, marks_ptr,
    y_ptr, accepted_ptr, y_prob_ptr, draft_prob_ptr, stats_ptr, committed_ptr, W,
    CARRY: tl.constexpr, GREEDY: tl.constexpr, RESIDUAL: tl.constexpr, COUNT: tl.constexpr,
    GUIDED: tl.constexpr, LABEL_GUIDED: tl.constexpr, PER_IMAGE: tl.constexpr, FORCED: tl.constexpr,
    GIVEN: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """Count what an image commits and draw the row of its first rejection."""
    b = tl.program_id(0).to(tl.int64)
    first, num_rows, accepted = first_rejection(accepted_ptr, num_rows_ptr, b, W, WINDOW)
    tl.store(committed_ptr + b, tl.minimum((first + 1).to(tl.int64), num_rows))
    j = tl.arange(0, WINDOW)
    row = b * W + j
    at = b * W + tl.minimum(first, W - 1)
    token = tl.load(tokens_ptr + at)
    kind = tl.load(kind_ptr + at).to(tl.int32)
    has = (token >= 0) & (kind > 0)
    mend = (first < num_rows) & (has | (CARRY == 3)) & (GREEDY == 0)
    if FORCED:
        mend = mend & (tl.load(forced_ptr + at) < 0)
    passed = accepted & (j < first)
    y = tl.where(passed, tl.load(tokens_ptr + row, mask=j < W, other=-1), tl.load(y_ptr + row, mask=j < W, other=-1))
    prob = tl.load(y_prob_ptr + row, mask=j < W, other=0.0)
    prob = tl.where(passed, tl.load(draft_prob_ptr + row, mask=passed, other=0.0), prob)
    if CARRY == 3:
        y = tl.where(j > first, -1, y)
        prob = tl.where(j > first, 0.0, prob)
    inside = (j < W) & (j != tl.where(mend, first, -1))  # the mended row is written once, below
    tl.store(y_ptr + row, y, mask=inside)
    tl.store(y_prob_ptr + row, prob, mask=inside)
    tl.store(accepted_ptr + row, passed.to(tl.uint8), mask=j < W)
    if mend:
        if PER_IMAGE:
            scale = tl.load(scales_ptr + b)
        cond = logits_ptr + b * stride_b + first * stride_w
        uncond = cond + stride_g
        source = tl.where(kind == 3, tl.load(row_ptr + at), 0)
        label_cond = label_ptr + b * label_stride_b + source * label_stride_w
        q_tau = tl.load(label_stats_ptr + 2 * (b * label_rows + source))
        q_lse = tl.load(label_stats_ptr + 2 * (b * label_rows + source) + 1)
        q_token = tl.load(prob_ptr + at)
        tau = tl.load(stats_ptr + 2 * at)
        lse = tl.load(stats_ptr + 2 * at + 1)
        seed, position, iteration = tl.load(seeds_ptr + b), tl.load(positions_ptr + at), tl.load(iteration_ptr + b)
        stream = tl.where(has, 3, 2)  # Stream.RESIDUAL, Stream.FRESH
        best = float("-inf")
        code = 0
        fresh_best = float("-inf")
        fresh_code = 0
        for piece in range(PIECES):
            x = rows.load_tile(cond, uncond, scale, inv_t, piece, V, GUIDED, PIECE)
            v = piece * PIECE + tl.arange(0, PIECE)
            if GIVEN:
                g = tl.load(fresh_ptr + at * V + v, mask=v < V, other=0.0)
                g = tl.where(has, tl.load(residual_ptr + at * V + v, mask=v < V, other=0.0), g)
            else:
                g = rows.gumbel_tile(seed, position, stream, iteration, piece, PIECE)
            p = rows.law_of(x, tau, lse)
            q = tl.where(kind == 2, q_token, tl.where((kind == 1) & (v == token), 1.0, 0.0))
            if kind == 3:
                label = rows.load_tile(
                    label_cond, label_cond + label_stride_g, scale, inv_t, piece, V, LABEL_GUIDED, PIECE
                )
                q = rows.law_of(label, q_tau, q_lse)
            if RESIDUAL == 1:  # optimal
                mass = every_neighbor_mass_of(
                    cond, uncond, scale, inv_t, tau, lse, v, p, V, neighbors_ptr, width, constant, factor,
                    GUIDED, COUNT,
                )  # fmt: skip
                left = residual(p, tl.minimum(q, p + mass))
            else:
                marked = tl.load(marks_ptr + b * V + v, mask=v < V, other=0) != 0
                if RESIDUAL == 0:  # paper
                    left = tl.where(marked, 0.0, residual(p, q))
                else:  # upstream takes the ring from q, or from p for points; upstream-lumina always from p
                    of_p = marked & ((kind == 1) | (RESIDUAL == 3))
                    left = residual(tl.where(of_p, 0.0, p), tl.where(marked & (of_p == 0), 0.0, q))
            best, code = rows.better(best, code, tl.where(left > 0, tl.log(left) + g, float("-inf")), piece, PIECE)
            kept = tl.where(x >= tau, x + g, float("-inf"))
            fresh_best, fresh_code = rows.better(fresh_best, fresh_code, kept, piece, PIECE)
        code = tl.where(has & (best > float("-inf")), code, fresh_code)
        tl.store(y_ptr + at, code.to(tl.int64))
        tl.store(y_prob_ptr + at, rows.law_of(rows.load_code(cond, uncond, scale, inv_t, code, GUIDED), tau, lse))
