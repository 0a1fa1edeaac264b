"""Triton kernels of ``vargen.kernels.verify.verify``: one program per row decides, one per image counts and mends.

Launch 1 reads every row once: law, test, draw. Launch 2 finds the first rejection; for the carries that need the
residual of that row only, it reads the two rows again (their thresholds and normalisers are stored). A second launch
in place of a last-arriver inside the first needs no memory fence and costs microseconds inside a CUDA graph.

p target, q draft. Letters: G guidance branches, B images, W window, V codes.
"""

from __future__ import annotations

from vargen.kernels import device as rows
from vargen.kernels.acceptance import accept, residual
from vargen.kernels.language import jit, tl
from vargen.kernels.verify.group import group_masses

# carries, as numbers the kernels know
GUMBEL, MAXIMAL, INDEPENDENT, NONE = range(4)


@jit
def draw_row(
    cond,
    uncond,
    scale,
    inv_t,
    V,
    tau,
    lse,
    label_cond,
    label_uncond,
    q_tau,
    q_lse,
    kind,
    token,
    q_token,
    retry,
    seed,
    position,
    iteration,
    fresh_ptr,
    residual_ptr,
    GUIDED: tl.constexpr,
    LABEL_GUIDED: tl.constexpr,
    GIVEN: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Draw from (p - q)+ where ``retry`` (from p if that is empty), else from p."""
    best = float("-inf")
    code = 0
    fresh_best = float("-inf")
    fresh_code = 0
    stream = tl.where(retry, 3, 2)  # Stream.RESIDUAL, Stream.FRESH
    for piece in range(PIECES):
        x = rows.load_tile(cond, uncond, scale, inv_t, piece, V, GUIDED, PIECE)
        at = piece * PIECE + tl.arange(0, PIECE)
        if GIVEN:
            g = tl.load(fresh_ptr + at, mask=at < V, other=0.0)
            g = tl.where(retry, tl.load(residual_ptr + at, mask=at < V, other=0.0), g)
        else:
            g = rows.gumbel_tile(seed, position, stream, iteration, piece, PIECE)
        q = tl.where(kind == 2, q_token, tl.where((kind == 1) & (at == token), 1.0, 0.0))  # Label.UNIFORM, Label.POINT
        if kind == 3:  # Label.ROW
            label = rows.load_tile(label_cond, label_uncond, scale, inv_t, piece, V, LABEL_GUIDED, PIECE)
            q = rows.law_of(label, q_tau, q_lse)
        left = residual(rows.law_of(x, tau, lse), q)
        best, code = rows.better(best, code, tl.where(left > 0, tl.log(left) + g, float("-inf")), piece, PIECE)
        kept = tl.where(x >= tau, x + g, float("-inf"))
        fresh_best, fresh_code = rows.better(fresh_best, fresh_code, kept, piece, PIECE)
    return tl.where(retry & (best > float("-inf")), code, fresh_code)


@jit(do_not_specialize=["k", "label_rows", "group_codes"])
def rows_kernel(
    logits_ptr,  # G B W V
    stride_g,
    stride_b,
    stride_w,
    label_ptr,  # G B W' V, raw logits of the labels
    label_stride_g,
    label_stride_b,
    label_stride_w,
    label_stats_ptr,  # B W' 2
    label_rows,
    tokens_ptr,  # B W, and the three below
    kind_ptr,
    prob_ptr,
    row_ptr,
    scales_ptr,  # B, if PER_IMAGE
    scale,
    inv_t,
    k,
    top_p,
    V,
    seeds_ptr,  # B
    positions_ptr,  # B W
    iteration_ptr,  # B
    num_rows_ptr,  # B
    forced_ptr,  # B W, if FORCED
    uniform_ptr,  # B W, if GIVEN
    fresh_ptr,  # B W V, if GIVEN
    residual_ptr,  # B W V, if GIVEN
    embeddings_ptr,  # E D, if CLOSE
    group_codes,  # E
    group_dim,  # D
    prob_threshold,
    distance_threshold,
    y_ptr,  # B W, and the three below
    accepted_ptr,
    y_prob_ptr,
    draft_prob_ptr,
    stats_ptr,  # B W 2
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
    """Decide one row: its law, the test of its draft, and its outcome as far as the row alone knows it."""
    w = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    here = b * W + w
    token = tl.load(tokens_ptr + here)
    kind = tl.load(kind_ptr + here).to(tl.int32)
    has = (token >= 0) & (kind > 0)
    if w >= tl.load(num_rows_ptr + b):
        tl.store(y_ptr + here, -1)
        tl.store(accepted_ptr + here, 0)
        tl.store(y_prob_ptr + here, 0.0)
        return
    if FORCED:
        forced = tl.load(forced_ptr + here)
        if forced >= 0:
            tl.store(y_ptr + here, forced)
            tl.store(accepted_ptr + here, (has & (token == forced)).to(tl.uint8))
            tl.store(y_prob_ptr + here, 1.0)
            tl.store(draft_prob_ptr + here, 1.0)
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

    seed = tl.load(seeds_ptr + b)
    y = token * 0
    if GREEDY or CARRY == 0:
        best = float("-inf")
        code = 0
        for piece in range(PIECES):
            x = rows.load_tile(cond, uncond, scale, inv_t, piece, V, GUIDED, PIECE)
            if not GREEDY:
                if GIVEN:
                    at = piece * PIECE + tl.arange(0, PIECE)
                    g = tl.load(fresh_ptr + here * V + at, mask=at < V, other=0.0)
                else:
                    g = rows.gumbel_tile(seed, position, position * 0, position * 0, piece, PIECE)  # Stream.GUMBEL
                x = tl.where(x >= tau, x + g, float("-inf"))
            best, code = rows.better(best, code, x, piece, PIECE)
        y = code.to(tl.int64)  # type: ignore[attr-defined]
        tl.store(accepted_ptr + here, (has & (y == token)).to(tl.uint8))
    else:
        iteration = tl.load(iteration_ptr + b)
        q_token = tl.load(prob_ptr + here)
        source = tl.where(kind == 3, tl.load(row_ptr + here), 0)
        label_cond = label_ptr + b * label_stride_b + source * label_stride_w
        label_uncond = label_cond + label_stride_g
        q_tau = tl.load(label_stats_ptr + 2 * (b * label_rows + source))
        q_lse = tl.load(label_stats_ptr + 2 * (b * label_rows + source) + 1)
        drafted = tl.maximum(token, 0)
        z_token = rows.load_code(cond, uncond, scale, inv_t, drafted, GUIDED)
        p_token = rows.law_of(z_token, tau, lse)
        p = p_token
        q = q_token
        if HALF > 0:  # noqa: SIM102 - known when the kernel is compiled
            if has:
                p, q = group_masses(
                    z, cond, uncond, scale, inv_t, V, tau, lse, label_cond, label_uncond, q_tau, q_lse,
                    kind, drafted, z_token, q_token, embeddings_ptr, group_codes, group_dim,
                    prob_threshold, distance_threshold, GUIDED, LABEL_GUIDED, HALF, CLOSE, DIM, BLOCK, TILES,
                )  # fmt: skip
        if GIVEN:
            u = tl.load(uniform_ptr + here)
        else:
            u = rows.uniform_of(seed, position, 1, iteration)  # Stream.ACCEPT
        kept = has & accept(p, q, u)
        tl.store(accepted_ptr + here, kept.to(tl.uint8))
        tl.store(draft_prob_ptr + here, p_token)
        y = drafted
        retry = has & (CARRY == 1)
        if (CARRY == 2) | ((CARRY == 1) & (kept == 0)):
            y = draw_row(
                cond, uncond, scale, inv_t, V, tau, lse, label_cond, label_uncond, q_tau, q_lse,
                kind, token, q_token, retry, seed, position, iteration, fresh_ptr + here * V, residual_ptr + here * V,
                GUIDED, LABEL_GUIDED, GIVEN, PIECE, PIECES,
            ).to(tl.int64)  # fmt: skip
    tl.store(y_ptr + here, y)
    y_prob = 1.0
    if not GREEDY:
        y_prob = rows.law_of(rows.load_code(cond, uncond, scale, inv_t, y, GUIDED), tau, lse)
    tl.store(y_prob_ptr + here, y_prob)


@jit(do_not_specialize=["label_rows"])
def finish_kernel(
    logits_ptr,
    stride_g,
    stride_b,
    stride_w,
    label_ptr,
    label_stride_g,
    label_stride_b,
    label_stride_w,
    label_stats_ptr,
    label_rows,
    tokens_ptr,
    kind_ptr,
    prob_ptr,
    row_ptr,
    scales_ptr,
    scale,
    inv_t,
    V,
    seeds_ptr,
    positions_ptr,
    iteration_ptr,
    num_rows_ptr,
    forced_ptr,
    fresh_ptr,
    residual_ptr,
    y_ptr,
    accepted_ptr,
    y_prob_ptr,
    draft_prob_ptr,
    stats_ptr,
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
    """Count what an image commits; with carries that stop at the first rejection, mend that row."""
    b = tl.program_id(0).to(tl.int64)
    num_rows = tl.load(num_rows_ptr + b)
    j = tl.arange(0, WINDOW)
    row = b * W + j
    accepted = tl.load(accepted_ptr + row, mask=j < W, other=0) != 0
    first = tl.min(tl.where((j < num_rows) & (accepted == 0), j, W), 0)  # first rejection
    tl.store(committed_ptr + b, tl.minimum((first + 1).to(tl.int64), num_rows))
    if CARRY >= 2:
        at = b * W + tl.minimum(first, W - 1)
        token = tl.load(tokens_ptr + at)
        kind = tl.load(kind_ptr + at).to(tl.int32)
        has = (token >= 0) & (kind > 0)
        mend = (first < num_rows) & (has | (CARRY == 3))
        if FORCED:
            mend = mend & (tl.load(forced_ptr + at) < 0)
        passed = accepted & (j < first)
        behind = (j > first) | (j >= num_rows)
        inside = (j < W) & (j != tl.where(mend, first, -1))  # the mended row is written once, below
        y = tl.where(
            passed, tl.load(tokens_ptr + row, mask=j < W, other=-1), tl.load(y_ptr + row, mask=j < W, other=-1)
        )
        prob = tl.load(y_prob_ptr + row, mask=j < W, other=0.0)
        prob = tl.where(passed, tl.load(draft_prob_ptr + row, mask=passed, other=0.0), prob)
        if CARRY == 3:
            y = tl.where(behind, -1, y)
            prob = tl.where(behind, 0.0, prob)
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
            tau = tl.load(stats_ptr + 2 * at)
            lse = tl.load(stats_ptr + 2 * at + 1)
            code = draw_row(
                cond, uncond, scale, inv_t, V, tau, lse, label_cond, label_cond + label_stride_g, q_tau, q_lse,
                kind, token, tl.load(prob_ptr + at), has, tl.load(seeds_ptr + b), tl.load(positions_ptr + at),
                tl.load(iteration_ptr + b), fresh_ptr + at * V, residual_ptr + at * V,
                GUIDED, LABEL_GUIDED, GIVEN, PIECE, PIECES,
            )  # fmt: skip
            tl.store(y_ptr + at, code.to(tl.int64))
            z_code = rows.load_code(cond, uncond, scale, inv_t, code, GUIDED)
            tl.store(y_prob_ptr + at, rows.law_of(z_code, tau, lse))
