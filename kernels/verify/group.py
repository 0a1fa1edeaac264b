"""Group masses of grouped speculative decoding (GSD, So et al., 2025, arXiv:2508.07747). p target, q draft.

Tokens of equal logit (top-k removes many) are ordered by code, so that a group is well defined. A draft that top-k or
top-p removed is rejected whatever its neighbours weigh; the released code accepts it with their mass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vargen.kernels import device as rows
from vargen.kernels.acceptance import near
from vargen.kernels.language import jit, tl
from vargen.kernels.verify.label import POINT, label_code
from vargen.kernels.verify.types import GroupSpec


def group_members(z: Tensor, p: Tensor, token: Tensor, spec: GroupSpec) -> tuple[Tensor, Tensor]:
    """Codes that share the fate of a draft token.

    Args:
        z: ``[R, V]`` float32 warped logits of the target.
        p: ``[R, V]`` float32 probabilities.
        token: ``[R]`` int64 draft tokens.
        spec: sizes and thresholds.

    Returns:
        codes ``[R, size]`` int64 and whether each belongs to the group ``[R, size]`` bool; the token is a member.
    """
    half = spec.size // 2
    order = torch.argsort(z, dim=-1, stable=True)
    own = z.gather(-1, token[:, None])
    code = torch.arange(z.shape[-1], device=z.device)
    rank = ((z < own) | ((z == own) & (code < token[:, None]))).sum(-1)
    ranks = rank[:, None] + torch.arange(-half, half, device=z.device)
    inside = (ranks < z.shape[-1]) & (rank >= half)[
        :, None
    ]  # a slice that starts below 0 is empty in the released code
    members = order.gather(-1, ranks.clamp(0, z.shape[-1] - 1))
    members = members.where(inside, token[:, None])
    keep = inside & near.fn(p.gather(-1, members), p.gather(-1, token[:, None]), spec.prob_threshold)
    if spec.embeddings is not None:
        keep &= _close(members, inside, token, spec)
    own_place = members == token[:, None]
    first = own_place & (own_place.cumsum(-1) == 1)  # the token counts once, whatever the filters say
    return members, (keep & ~own_place) | first


def _close(members: Tensor, inside: Tensor, token: Tensor, spec: GroupSpec) -> Tensor:
    table = spec.embeddings
    assert table is not None
    known = len(table)
    apart = table[members.clamp(max=known - 1)].float() - table[token.clamp(max=known - 1)].float()[:, None]
    close = apart.square().sum(-1) < spec.distance_threshold
    unfiltered = ((members >= known) & inside).any(-1) | (token >= known)
    return close | unfiltered[:, None]


class Groups(NamedTuple):
    """Pointer and numbers of ``types.GroupSpec``."""

    embeddings: Any  # E D, if CLOSE
    dim: Any  # D
    prob_threshold: Any
    distance_threshold: Any


@jit
def group_masses(
    z, row, tau, lse, label, token, z_token, group, group_codes,
    GUIDED: tl.constexpr, LABEL_GUIDED: tl.constexpr, HALF: tl.constexpr, CLOSE: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """p and q of the group of ``token``; the device function of ``group_members`` and the sums over it.

    Neighbours in rank are found one after the other, by the next smaller or larger (logit, code) of the row.
    """
    own = _order(z_token, token, tau)
    rank = 0
    for tile in range(TILES):
        x = rows.tile_of(z, row, tile, GUIDED, BLOCK, TILES)
        code = tile * BLOCK + tl.arange(0, BLOCK)
        rank += tl.sum(((_order(x, code, tau) < own) & (code < row.V)).to(tl.int32), 0)
    p_token = rows.prob_of(z_token, tau, lse)
    q_own = tl.where(label.kind == POINT, 1.0, label.prob)
    p_near, q_near, p_close, q_close = p_token, q_own, p_token, q_own
    unfiltered = token >= group_codes
    d = tl.arange(0, DIM)
    current = own
    for i in range(2 * HALF - 1):
        if i == HALF:
            current = own  # the lower neighbours are done
        down = i < HALF
        current = _next(z, row, tau, current, down, GUIDED, BLOCK, TILES)
        found = (rank >= HALF) & (current != 0x7FFFFFFFFFFFFFFF)
        member = tl.where(found, current & 0xFFFFFFFF, token)
        p = rows.prob_of(rows.load_code(row, member, GUIDED), tau, lse)
        q = label_code(label, member, LABEL_GUIDED)
        joins = found & near(p, p_token, group.prob_threshold)
        p_near += tl.where(joins, p, 0.0)
        q_near += tl.where(joins, q, 0.0)
        if CLOSE:
            unfiltered = unfiltered | (found & (member >= group_codes))
            known = tl.minimum(member, group_codes - 1)
            a = tl.load(group.embeddings + known * group.dim + d, mask=d < group.dim, other=0.0)
            own_code = tl.minimum(token, group_codes - 1)
            o = tl.load(group.embeddings + own_code * group.dim + d, mask=d < group.dim, other=0.0)
            joins = joins & (tl.sum((a - o) * (a - o), 0) < group.distance_threshold)
            p_close += tl.where(joins, p, 0.0)
            q_close += tl.where(joins, q, 0.0)
    if CLOSE:
        p_near = tl.where(unfiltered, p_near, p_close)
        q_near = tl.where(unfiltered, q_near, q_close)
    return tl.where(p_token > 0, p_near, 0.0), q_near  # a removed draft has no group


@jit
def _order(x, code, tau):
    """int64 that orders by (logit, code); removed codes are equal in logit."""
    x = tl.where(x >= tau, x, float("-inf"))
    key = rows.key_of(tl.where(x == 0.0, 0.0, x))  # -0 equals +0
    return (key.to(tl.int64) << 32) | code.to(tl.int64)


@jit
def _next(z, row, tau, current, down, GUIDED: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Largest order below ``current``, or smallest above it (the largest int64 if there is none)."""
    below = current * 0 - 0x7FFFFFFFFFFFFFFF
    above = current * 0 + 0x7FFFFFFFFFFFFFFF
    for tile in range(TILES):
        x = rows.tile_of(z, row, tile, GUIDED, BLOCK, TILES)
        code = tile * BLOCK + tl.arange(0, BLOCK)
        order = _order(x, code, tau)
        below = tl.maximum(below, tl.max(tl.where((order < current) & (code < row.V), order, -0x7FFFFFFFFFFFFFFF), 0))
        above = tl.minimum(above, tl.min(tl.where((order > current) & (code < row.V), order, 0x7FFFFFFFFFFFFFFF), 0))
    return tl.where(down, below, above)
