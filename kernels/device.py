"""Device functions on one row of logits, shared by the Triton kernels.

A ``Row`` is held on chip when it fits one block (TILES = 1); longer rows are read again, from cache, in every pass.
Arithmetic is float32 without fused multiply-add (kernels are launched with ``enable_fp_fusion=False``), so that a row
means the same wherever it is read, and equals the reference's.

Letters: V codes; a tile is BLOCK consecutive codes; key = order-preserving integer of a float.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vargen.kernels.language import constant, jit, tl
from vargen.random import Stream

GUMBEL, ACCEPT, FRESH = constant(Stream.GUMBEL), constant(Stream.ACCEPT), constant(Stream.FRESH)
RESIDUAL, INIT = constant(Stream.RESIDUAL), constant(Stream.INIT)


class Logits(NamedTuple):
    """Raw logits ``[G, B, W, V]``, contiguous in V."""

    ptr: Any
    stride_g: Any
    stride_b: Any
    stride_w: Any


class Warp(NamedTuple):
    """How rows become distributions, but for top-k, whose value must not make another kernel."""

    scales_ptr: Any  # B, if guidance differs from image to image
    scale: Any
    inv_t: Any  # 1 / temperature
    top_p: Any
    V: Any


class Row(NamedTuple):
    """One row of logits. What the compiler must know stays outside: a tuple that a function returns holds no constants."""

    cond: Any  # pointers to the two branches; ``uncond`` is not read unless GUIDED
    uncond: Any
    scale: Any
    inv_t: Any
    V: Any


@jit
def row_at(logits, warp, b, w, PER_IMAGE: tl.constexpr):
    """Row w of image b."""
    scale = warp.scale
    if PER_IMAGE:
        scale = tl.load(warp.scales_ptr + b)
    cond = logits.ptr + b * logits.stride_b + w * logits.stride_w
    return Row(cond, cond + logits.stride_g, scale, warp.inv_t, warp.V)


@jit
def guide(c, u, scale, inv_t, GUIDED: tl.constexpr):
    """Guidance and temperature; NaN becomes +inf, which no check misses and no comparison drops."""
    c = c.to(tl.float32)
    if GUIDED:
        u = u.to(tl.float32)
        c = tl.where(c == float("-inf"), c, (c - u) * scale + u)
    c = c * inv_t
    return tl.where(c == c, c, float("inf"))


@jit
def load_tile(row, tile, GUIDED: tl.constexpr, BLOCK: tl.constexpr):
    """Guided logits of one tile, ``[BLOCK]`` float32; -inf beyond V."""
    code = tile * BLOCK + tl.arange(0, BLOCK)
    inside = code < row.V
    c = tl.load(row.cond + code, mask=inside, other=float("-inf"))
    u = c
    if GUIDED:
        u = tl.load(row.uncond + code, mask=inside, other=0.0)
    return guide(c, u, row.scale, row.inv_t, GUIDED)


@jit
def tile_of(z, row, tile, GUIDED: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Tile of a row whose first tile is ``z``: on chip if that is all there is."""
    if TILES > 1:
        z = load_tile(row, tile, GUIDED, BLOCK)
    return z


@jit
def load_code(row, code, GUIDED: tl.constexpr):
    """Guided logits of single codes (a scalar or a block of indices inside the row)."""
    c = tl.load(row.cond + code)
    u = c
    if GUIDED:
        u = tl.load(row.uncond + code)
    return guide(c, u, row.scale, row.inv_t, GUIDED)


@jit
def key_of(z):
    """int32 that orders as the floats do."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def float_of(key):
    """Inverse of ``key_of``."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def halfway(lo, hi, step):
    """A key strictly between two: by value first (logits are spread evenly there), by key once that has done its work."""
    by_value = key_of(0.5 * float_of(lo.to(tl.int32)) + 0.5 * float_of(hi.to(tl.int32))).to(tl.int64)
    middle = tl.where(step < 20, by_value, lo + (hi - lo) // 2)
    return tl.minimum(tl.maximum(middle, lo + 1), hi - 1)


@jit
def top_k_key(z, row, lo, hi, k, GUIDED: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Largest t found with #{key >= t} >= k, by bisection of [lo, hi); stops as soon as exactly k codes are above."""
    step = 0
    while hi - lo > 1:
        middle = halfway(lo, hi, step)
        count = 0
        for tile in range(TILES):
            x = tile_of(z, row, tile, GUIDED, BLOCK, TILES)
            count += tl.sum((key_of(x) >= middle).to(tl.int32), 0)
        lo = tl.where(count >= k, middle, lo)
        hi = tl.where(count == k, middle + 1, tl.where(count >= k, hi, middle))
        step += 1
    return lo


@jit
def top_p_key(z, row, lo, hi, peak, mass, GUIDED: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Smallest key with at most ``mass`` strictly above it: the code that crosses the mass is kept, with its ties."""
    step = 0
    lo -= 1  # invariant: more than `mass` lies above lo, at most `mass` above hi - 1
    hi -= 1
    while hi - lo > 1:
        middle = halfway(lo, hi, step)
        above = 0.0
        for tile in range(TILES):
            x = tile_of(z, row, tile, GUIDED, BLOCK, TILES)
            above += tl.sum(tl.where(key_of(x) > middle, tl.exp(x - peak), 0.0), 0)
        lo = tl.where(above > mass, middle, lo)
        hi = tl.where(above > mass, hi, middle)
        step += 1
    return hi


@jit
def smallest_from(z, row, key, GUIDED: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Smallest value whose key is at least ``key``."""
    tau = float("inf")
    for tile in range(TILES):
        x = tile_of(z, row, tile, GUIDED, BLOCK, TILES)
        tau = tl.minimum(tau, tl.min(tl.where(key_of(x) >= key, x, float("inf")), 0))
    return tau


@jit
def kept_mass(z, row, tau, peak, GUIDED: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Sum of exp(z - peak) over the codes kept."""
    total = 0.0
    for tile in range(TILES):
        x = tile_of(z, row, tile, GUIDED, BLOCK, TILES)
        total += tl.sum(tl.where(x >= tau, tl.exp(x - peak), 0.0), 0)
    return total


@jit
def row_stats(
    z, row, k, top_p, GUIDED: tl.constexpr, SPARSE: tl.constexpr, NUCLEUS: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Threshold and log-normaliser of a row: kept are z >= tau, p = exp(z - lse). lse is not finite for bad rows."""
    peak = float("-inf")
    low = float("inf")
    for tile in range(TILES):
        x = tile_of(z, row, tile, GUIDED, BLOCK, TILES)
        peak = tl.maximum(peak, tl.max(x, 0))
        low = tl.minimum(low, tl.min(tl.where(x == float("-inf"), float("inf"), x), 0))
    sane = (peak > float("-inf")) & (peak < float("inf"))
    tau = float("-inf")
    if SPARSE or NUCLEUS:  # noqa: SIM102 - known when the kernel is compiled, the next one when it runs
        if sane:
            lo = key_of(low).to(tl.int64)
            hi = key_of(peak).to(tl.int64) + 1
            whole = lo
            if SPARSE:
                lo = top_k_key(z, row, lo, hi, tl.where(k < 0, -k, k), GUIDED, BLOCK, TILES)
            if NUCLEUS:
                base = lo
                if SPARSE:
                    base = tl.where(k < 0, whole, lo)  # top-p first: of the whole distribution
                tau = smallest_from(z, row, base, GUIDED, BLOCK, TILES)
                mass = top_p * kept_mass(z, row, tau, peak, GUIDED, BLOCK, TILES)
                base = key_of(tau).to(tl.int64)
                lo = tl.maximum(lo, top_p_key(z, row, base, hi, peak, mass, GUIDED, BLOCK, TILES))
            tau = smallest_from(z, row, lo, GUIDED, BLOCK, TILES)
    lse = float("inf")
    if sane:
        lse = peak + tl.log(kept_mass(z, row, tau, peak, GUIDED, BLOCK, TILES))
    return tau, lse


@jit
def prob_of(z, tau, lse):
    """Probability of logits, given threshold and log-normaliser of their row."""
    return tl.where(z >= tau, tl.exp(z - lse), 0.0)


@jit
def uniform_of(seed, position, stream, iteration):
    """Uniform number in [0, 1) on the grid of 2^-24, as ``vargen.random.uniform``."""
    zero = (position * 0).to(tl.uint32)
    r, _, _, _ = tl.philox(seed, position.to(tl.uint32), zero, zero + stream, zero + iteration.to(tl.uint32))
    return (r >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@jit
def gumbel_tile(seed, position, stream, iteration, tile, BLOCK: tl.constexpr):
    """Gumbel noise of one tile, the bits of ``vargen.random.gumbel``; ``[BLOCK]`` float32."""
    lane = (tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = lane * 0
    r0, r1, r2, r3 = tl.philox(
        seed, zero + position.to(tl.uint32), lane, zero + stream.to(tl.uint32), zero + iteration.to(tl.uint32)
    )
    bits = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
    x = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    x = tl.minimum(x, 0.9999999403953552)  # the largest float32 below 1
    near_one = 1.0 - x
    # -log1p(-x): log(1 - x) corrected for the rounding of 1 - x (Kahan)
    race = tl.where(near_one == 1.0, x, -tl.log(near_one) * (x / (1.0 - near_one + (near_one == 1.0))))
    return -tl.log(race)


@jit
def better(best, best_code, score, tile, BLOCK: tl.constexpr):
    """Running argmax over tiles; the first of equals wins."""
    value, place = tl.max(score, 0, return_indices=True)
    wins = value > best
    return tl.where(wins, value, best), tl.where(wins, tile * BLOCK + place, best_code)
