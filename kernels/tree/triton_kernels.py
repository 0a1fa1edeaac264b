"""Triton kernel of ``vargen.kernels.tree.verify``: one program walks down the tree of one image.

Only the rows that the walk visits are read, once for the law and then from cache. The law that is left lives in two
scratch rows: a rejection reads one and writes the other, since neighbours are gathered from anywhere in a row. Divisions
by what is left are carried as one factor.

p target, q draft. Letters: G guidance branches, B images, n nodes, C children of a node, D depth, V codes, R draft laws,
U uniforms, K width of the neighbour table.
"""

from __future__ import annotations

from vargen.kernels import device as rows
from vargen.kernels.acceptance import accept, residual, within
from vargen.kernels.language import jit, tl


@jit
def store_law(work, cond, uncond, scale, inv_t, tau, lse, forced, V, FORCED: tl.constexpr, GUIDED: tl.constexpr,
              PIECE: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
    """Write the law of a row; a point where a code is fixed beforehand."""
    for piece in range(PIECES):
        v = piece * PIECE + tl.arange(0, PIECE)
        p = rows.law_of(rows.load_tile(cond, uncond, scale, inv_t, piece, V, GUIDED, PIECE), tau, lse)
        if FORCED:
            p = tl.where(forced >= 0, tl.where(v == forced, 1.0, 0.0), p)
        tl.store(work + v, p, mask=v < V)
    tl.debug_barrier()  # what one thread wrote is gathered by others


@jit
def joined_mass(work, inv, token, own, neighbors_ptr, width, k, constant, factor, K: tl.constexpr):
    """Mass of the neighbours that count with a token, and how many they are; K is a power of two above k."""
    m = tl.arange(0, K)
    near = tl.load(neighbors_ptr + token * width + m, mask=m < k, other=0).to(tl.int64)
    mass = tl.cumsum(tl.where(m < k, tl.load(work + near) * inv, 0.0), 0)
    joins = within(mass, constant + factor * own) & (m < k)
    return tl.max(tl.where(joins, mass, 0.0), 0), tl.sum(joins.to(tl.int32), 0)


@jit
def every_joined_mass(work, inv, v, p, V, neighbors_ptr, width, constant, factor, COUNT: tl.constexpr):
    """The same for a piece of a row."""
    row = tl.where(v < V, v, 0).to(tl.int64) * width
    total = p * 0.0
    joined = p == p
    for m in range(COUNT):
        near = tl.load(neighbors_ptr + row + m).to(tl.int64)
        more = total + tl.load(work + near) * inv
        joined = joined & within(more, constant + factor * p)
        total = tl.where(joined, more, total)
    return total


@jit(do_not_specialize=["k", "width", "num_neighbors", "levels"])
def walk_kernel(
    logits_ptr, stride_g, stride_b, stride_w,  # G B n V
    scales_ptr, scale, inv_t, k, top_p, V,
    tokens_ptr, N, children_ptr, children_stride, C,  # B n; B n C or n C
    q_ptr, num_laws, law_of_ptr,  # B R V; n
    uniforms_ptr, U, limit_ptr, positions_ptr, forced_ptr,  # B U; B; B D+1
    neighbors_ptr, width, num_neighbors, constant, factor,  # V K
    work_ptr,  # B 2 V
    path_ptr, codes_ptr, num_kept_ptr, law_ptr, used_ptr, relaxed_ptr, errors_ptr, levels,  # B D+1; B; B V
    GUIDED: tl.constexpr, PER_IMAGE: tl.constexpr, SPARSE: tl.constexpr, NUCLEUS: tl.constexpr, FORCED: tl.constexpr,
    SAMPLED: tl.constexpr, REPLACEMENT: tl.constexpr, RELAXED: tl.constexpr, RESIDUAL: tl.constexpr,
    COUNT: tl.constexpr, NEIGHBORS: tl.constexpr, NOTHING: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Test the children of a node in order, take what each rejection leaves to the next, step to the accepted one."""
    b = tl.program_id(0).to(tl.int64)
    if PER_IMAGE:
        scale = tl.load(scales_ptr + b)
    limit = tl.load(limit_ptr + b)
    node = b * 0
    used = b * 0
    num_relaxed = b * 0
    num_kept = b * 0
    alive = limit > 0
    tl.store(law_ptr + b * V, 1.0, mask=limit <= 0)  # a finished image: any point will do
    for level in range(levels):
        if alive:
            cond = logits_ptr + b * stride_b + node * stride_w
            uncond = cond + stride_g
            z = rows.load_tile(cond, uncond, scale, inv_t, 0, V, GUIDED, BLOCK)
            tau, lse = rows.row_stats(
                z, cond, uncond, scale, inv_t, V, k, top_p, GUIDED, SPARSE, NUCLEUS, BLOCK, TILES
            )
            forced = tl.load(forced_ptr + b * levels + level)
            if (lse == float("inf")) | (lse == float("-inf")):  # noqa: SIM102
                if (FORCED == 0) | (forced < 0):
                    tl.atomic_min(errors_ptr + b, tl.load(positions_ptr + b * levels + level))
            old = work_ptr + b * 2 * V
            new = old + V
            store_law(old, cond, uncond, scale, inv_t, tau, lse, forced, V, FORCED, GUIDED, PIECE, PIECES)
            inv = 1.0
            q = q_ptr
            q_left = 1.0
            if SAMPLED:
                q = q_ptr + (b * num_laws + tl.maximum(tl.load(law_of_ptr + node), 0)) * V
            kids = children_ptr + b * children_stride + node * C
            child = node * 0 - 1
            for j in range(C):
                kid = tl.load(kids + j)
                code = tl.load(tokens_ptr + b * N + tl.maximum(kid, 0))
                tested = (kid >= 0) & (code >= 0) & (level + 1 < limit) & (child < 0)
                if not REPLACEMENT:
                    for i in range(j):
                        tested = tested & (tl.load(tokens_ptr + b * N + tl.maximum(tl.load(kids + i), 0)) != code)
                if tested:
                    own = tl.load(old + code) * inv
                    mass = own * 0.0
                    count = tl.sum(tl.arange(0, 2) * 0, 0)
                    if RELAXED:
                        mass, count = joined_mass(
                            old, inv, code, own, neighbors_ptr, width, num_neighbors, constant, factor, NEIGHBORS
                        )
                    share = 1.0
                    if SAMPLED:
                        share = tl.load(q + code) / q_left
                    u = tl.load(uniforms_ptr + b * U + used)
                    used += 1
                    kept = (share > 0) & accept(own + mass, share, u)
                    num_relaxed += (kept & (accept(own, share, u) == 0)).to(tl.int64)
                    child = tl.where(kept, kid, child)
                    if (kept == 0) & (share > 0):
                        remaining = 0.0
                        for piece in range(PIECES):
                            v = piece * PIECE + tl.arange(0, PIECE)
                            p = tl.load(old + v, mask=v < V, other=0.0) * inv
                            if SAMPLED:
                                law = tl.load(q + v, mask=v < V, other=0.0)
                                if not REPLACEMENT:
                                    for i in range(j):  # earlier siblings, wherever they ended
                                        seen = tl.load(tokens_ptr + b * N + tl.maximum(tl.load(kids + i), 0))
                                        law = tl.where(v == seen, 0.0, law)
                                    remaining += tl.sum(tl.where(v == code, 0.0, law), 0)
                                law = law / q_left
                                if RELAXED and RESIDUAL == 1:
                                    joined = every_joined_mass(
                                        old, inv, v, p, V, neighbors_ptr, width, constant, factor, COUNT
                                    )
                                    law = tl.minimum(law, p + joined)
                                left = residual(p, law)
                            else:
                                left = tl.where(v == code, 0.0, p)
                            tl.store(new + v, left, mask=v < V)
                        tl.debug_barrier()
                        if RELAXED and RESIDUAL != 1:
                            reach = count
                            if RESIDUAL >= 2:  # the released codes: k + 1 of them as soon as one counted
                                reach = tl.where(count > 0, num_neighbors + 1, 0)
                            m = tl.arange(0, NEIGHBORS)
                            near = tl.load(neighbors_ptr + code * width + m, mask=m < reach, other=0).to(tl.int64)
                            value = tl.load(old + near) * 0.0
                            if SAMPLED and RESIDUAL == 2:  # it takes the ring from q
                                value = tl.load(old + near) * inv
                            tl.store(new + near, value, mask=m < reach)
                            tl.debug_barrier()
                        if SAMPLED and not REPLACEMENT:
                            q_left = tl.maximum(remaining, NOTHING)
                        total = 0.0
                        for piece in range(PIECES):
                            v = piece * PIECE + tl.arange(0, PIECE)
                            total += tl.sum(tl.load(new + v, mask=v < V, other=0.0), 0)
                        some = total > NOTHING
                        inv = tl.where(some, 1.0 / tl.maximum(total, NOTHING), 1.0)
                        if some == 0:
                            store_law(
                                new, cond, uncond, scale, inv_t, tau, lse, forced, V, FORCED, GUIDED, PIECE, PIECES
                            )
                            if RELAXED and RESIDUAL >= 2:
                                for piece in range(PIECES):
                                    v = piece * PIECE + tl.arange(0, PIECE)
                                    tl.store(new + v, 1.0 / V, mask=v < V)
                                tl.debug_barrier()
                        swap = old
                        old = new
                        new = swap
            alive = child >= 0
            if alive:
                tl.store(path_ptr + b * levels + level + 1, child, mask=level + 1 < levels)
                tl.store(codes_ptr + b * levels + level, tl.load(tokens_ptr + b * N + child))
                num_kept += 1
                node = child
            else:
                for piece in range(PIECES):
                    v = piece * PIECE + tl.arange(0, PIECE)
                    tl.store(law_ptr + b * V + v, tl.load(old + v, mask=v < V, other=0.0) * inv, mask=v < V)
            tl.debug_barrier()  # the next level writes where this one read
    tl.store(num_kept_ptr + b, num_kept)
    tl.store(used_ptr + b, used)
    tl.store(relaxed_ptr + b, num_relaxed)
