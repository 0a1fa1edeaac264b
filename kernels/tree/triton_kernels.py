"""Triton kernel of ``vargen.kernels.tree.verify``: one program follows one image down its tree.

Only the rows behind nodes on the path are read, once for the distribution and then from cache. What is left of it lives
in two scratch rows: a rejection reads one and writes the other, since neighbours are gathered from anywhere in a row.
Divisions by what is left are carried as one factor.

p target, q draft. Letters: G guidance branches, B images, n nodes, C children of a node, D depth, V codes, R draft rows,
U uniforms, K width of the neighbour table.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vargen.kernels import device as rows
from vargen.kernels.acceptance import NOTHING_LEFT, accept, residual
from vargen.kernels.language import constant, jit, tl
from vargen.kernels.tree.lantern import OPTIMAL, UPSTREAM, aggregate_code, aggregate_piece, remove_neighbors

NOTHING = constant(NOTHING_LEFT)


class Nodes(NamedTuple):
    """Pointers and sizes of ``types.TreeProposals``."""

    tokens: Any  # B n
    num_nodes: Any  # n
    children: Any  # B n C or n C
    children_stride: Any  # from image to image
    num_children: Any  # C
    distributions: Any  # B R V, if SAMPLED
    num_rows: Any  # R
    row_of: Any  # n


class Slots(NamedTuple):
    """Pointers of what an image brings along."""

    uniforms: Any  # B U
    num_uniforms: Any  # U
    limit: Any  # B
    positions: Any  # B D+1
    forced: Any  # B D+1, if FORCED


class Path(NamedTuple):
    """Pointers of ``types.AcceptedPath``."""

    path: Any  # B D+1
    tokens: Any  # B D+1
    num_accepted: Any  # B
    distribution: Any  # B V
    num_uniforms: Any  # B
    num_relaxed: Any  # B


@jit
def store_probs(
    work, row, tau, lse, forced, FORCED: tl.constexpr, GUIDED: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr
):
    """Write the distribution of a row; a point where a code is fixed beforehand."""
    for piece in range(PIECES):
        v = piece * PIECE + tl.arange(0, PIECE)
        p = rows.prob_of(rows.load_tile(row, piece, GUIDED, PIECE), tau, lse)
        if FORCED:
            p = tl.where(forced >= 0, tl.where(v == forced, 1.0, 0.0), p)
        tl.store(work + v, p, mask=v < row.V)
    tl.debug_barrier()  # what one thread wrote is gathered by others


@jit(do_not_specialize=["k", "width", "num_neighbors", "levels"])
def tree_kernel(
    logits,  # device.Logits
    warp,  # device.Warp
    k,
    nodes,  # Nodes
    slots,  # Slots
    neighbors,  # lantern.Neighbors, if RELAXED
    width,  # K
    num_neighbors,
    work_ptr,  # B 2 V
    found,  # Path
    errors_ptr,  # B
    levels,  # D + 1
    GUIDED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    SPARSE: tl.constexpr,
    NUCLEUS: tl.constexpr,
    FORCED: tl.constexpr,
    SAMPLED: tl.constexpr,
    REPLACEMENT: tl.constexpr,
    RELAXED: tl.constexpr,
    RULE: tl.constexpr,
    COUNT: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Test the children of a node in order, take what each rejection leaves to the next, step to the accepted one."""
    b = tl.program_id(0).to(tl.int64)
    V = warp.V
    tokens = nodes.tokens + b * nodes.num_nodes
    limit = tl.load(slots.limit + b)
    node = b * 0
    used = b * 0
    num_relaxed = b * 0
    num_accepted = b * 0
    alive = limit > 0
    tl.store(found.distribution + b * V, 1.0, mask=limit <= 0)  # a finished image: any point will do
    for level in range(levels):
        if alive:
            row = rows.row_at(logits, warp, b, node, PER_IMAGE)
            z = rows.load_tile(row, 0, GUIDED, BLOCK)
            tau, lse = rows.row_stats(z, row, k, warp.top_p, GUIDED, SPARSE, NUCLEUS, BLOCK, TILES)
            forced = tl.load(slots.forced + b * levels + level)
            if (lse == float("inf")) | (lse == float("-inf")):  # noqa: SIM102
                if (FORCED == 0) | (forced < 0):
                    tl.atomic_min(errors_ptr + b, tl.load(slots.positions + b * levels + level))
            old = work_ptr + b * 2 * V
            new = old + V
            store_probs(old, row, tau, lse, forced, FORCED, GUIDED, PIECE, PIECES)
            inv = 1.0
            q = nodes.distributions
            q_left = 1.0
            if SAMPLED:
                q += (b * nodes.num_rows + tl.maximum(tl.load(nodes.row_of + node), 0)) * V
            kids = nodes.children + b * nodes.children_stride + node * nodes.num_children
            child = node * 0 - 1
            for j in range(nodes.num_children):
                kid = tl.load(kids + j)
                code = tl.load(tokens + tl.maximum(kid, 0))
                tested = (kid >= 0) & (code >= 0) & (level + 1 < limit) & (child < 0)
                if not REPLACEMENT:
                    for i in range(j):
                        tested = tested & (tl.load(tokens + tl.maximum(tl.load(kids + i), 0)) != code)
                if tested:
                    own = tl.load(old + code) * inv
                    mass = own * 0.0
                    count = tl.sum(tl.arange(0, 2) * 0, 0)
                    if RELAXED:
                        mass, count = aggregate_code(old, inv, code, own, neighbors, width, num_neighbors, REACH)
                    share = 1.0
                    if SAMPLED:
                        share = tl.load(q + code) / q_left
                    u = tl.load(slots.uniforms + b * slots.num_uniforms + used)
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
                                share_v = tl.load(q + v, mask=v < V, other=0.0)
                                if not REPLACEMENT:
                                    for i in range(j):  # earlier siblings, wherever they ended
                                        seen = tl.load(tokens + tl.maximum(tl.load(kids + i), 0))
                                        share_v = tl.where(v == seen, 0.0, share_v)
                                    remaining += tl.sum(tl.where(v == code, 0.0, share_v), 0)
                                share_v = share_v / q_left
                                if RELAXED and RULE == OPTIMAL:
                                    joined = aggregate_piece(old, inv, v, p, V, neighbors, width, COUNT)
                                    share_v = tl.minimum(share_v, p + joined)
                                left = residual(p, share_v)
                            else:
                                left = tl.where(v == code, 0.0, p)
                            tl.store(new + v, left, mask=v < V)
                        tl.debug_barrier()
                        if RELAXED and RULE != OPTIMAL:
                            remove_neighbors(
                                old, new, inv, code, count, neighbors, width, num_neighbors, SAMPLED, RULE, REACH
                            )
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
                            store_probs(new, row, tau, lse, forced, FORCED, GUIDED, PIECE, PIECES)
                            if RELAXED and RULE >= UPSTREAM:
                                for piece in range(PIECES):
                                    v = piece * PIECE + tl.arange(0, PIECE)
                                    tl.store(new + v, 1.0 / V, mask=v < V)
                                tl.debug_barrier()
                        swap = old
                        old = new
                        new = swap
            alive = child >= 0
            if alive:
                tl.store(found.path + b * levels + level + 1, child, mask=level + 1 < levels)
                tl.store(found.tokens + b * levels + level, tl.load(tokens + child))
                num_accepted += 1
                node = child
            else:
                for piece in range(PIECES):
                    v = piece * PIECE + tl.arange(0, PIECE)
                    tl.store(found.distribution + b * V + v, tl.load(old + v, mask=v < V, other=0.0) * inv, mask=v < V)
            tl.debug_barrier()  # the next level writes where this one read
    tl.store(found.num_accepted + b, num_accepted)
    tl.store(found.num_uniforms + b, used)
    tl.store(found.num_relaxed + b, num_relaxed)
