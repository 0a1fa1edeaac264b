"""Group masses of grouped speculative decoding (GSD, So et al., 2025, arXiv:2508.07747). p target, q draft.

Tokens of equal logit (top-k removes many) are ordered by code, so that a group is well defined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vargen.kernels.rules import near
from vargen.kernels.window import GroupSpec


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
