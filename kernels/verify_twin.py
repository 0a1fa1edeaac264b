"""PyTorch twin of ``vargen.kernels.verify``: the definition that the Triton kernels are tested against.

p is the target law, q the draft law. Letters: G guidance branches (conditional first), B images, W window, V codes,
R rows picked from a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vargen.kernels.draw import raise_bad_rows
from vargen.kernels.group import group_members
from vargen.kernels.rules import accept, residual
from vargen.kernels.warp import NEG_INF, combine, threshold
from vargen.kernels.window import Draft, GroupSpec, Label, Verdict, VerifyNoise
from vargen.random import Stream, gumbel, uniform


@dataclass(frozen=True)
class Setting:
    """How rows become laws; the same for the target and for the labels."""

    guidance_scale: float | Tensor
    temperature: float
    top_k: int
    top_p: float


def verify_twin(
    logits: Tensor,
    draft: Draft,
    carry: str,
    seeds: Tensor,
    positions: Tensor,
    iteration: Tensor,
    num_rows: Tensor,
    setting: Setting,
    forced: Tensor | None,
    group: GroupSpec | None,
    noise: VerifyNoise,
) -> Verdict:
    """Arguments and result of :func:`vargen.kernels.verify.verify_window`, unchecked."""
    z, stats = _law(logits, setting)
    column = torch.arange(positions.shape[1], device=z.device)
    valid = column < num_rows[:, None]  # B W
    free = valid if forced is None else valid & (forced < 0)
    raise_bad_rows(free & ~stats[..., 1].isfinite(), positions)
    has = (draft.tokens >= 0) & (draft.kind != Label.NONE) & valid

    if setting.temperature == 0 or carry == "gumbel":
        y = _argmax(z, seeds, positions, setting, noise)
        if forced is not None:
            y = forced.where(forced >= 0, y)
        accepted = has & (y == draft.tokens)
    else:
        u = uniform(seeds, positions, 1, Stream.ACCEPT, iteration)[..., 0] if noise.accept is None else noise.accept
        p, q = _test_masses(z, stats, draft, has & free, setting, group)
        accepted = has & accept.fn(p, q, u)
        if forced is not None:
            accepted = accepted.where(forced < 0, has & (draft.tokens == forced))
        passed = accepted.cumprod(-1).bool()  # accepted, like all before it
        if carry != "maximal":
            accepted = passed
            retry = has & ~passed & _shift_right(passed)  # the first rejection only
        else:
            retry = has & ~accepted
        y = draft.tokens.where(accepted, -1)
        if forced is not None:
            y = forced.where((forced >= 0) & valid, y)
        todo = (y < 0) & valid
        if carry == "none":
            valid = valid & (
                column <= accepted.cumprod(-1).sum(-1, keepdim=True)
            )  # nothing behind the first rejection
            todo &= valid
        y = y.masked_scatter(todo, _redraw(z, stats, draft, todo, retry, seeds, positions, iteration, setting, noise))

    y = y.where(valid, -1)
    prob = (
        _prob(z.gather(-1, y.clamp(min=0)[..., None])[..., 0], stats[..., 1])
        if setting.temperature
        else (y >= 0).float()
    )
    if forced is not None:
        prob = prob.masked_fill(forced >= 0, 1.0)
    run = (accepted & valid).cumprod(-1).sum(-1)
    return Verdict(y, accepted & valid, prob.where(valid, 0.0), torch.minimum(run + 1, num_rows), stats)


def _law(logits: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Warped logits ``[..., V]``, removed codes at -inf, and their (threshold, log-normaliser) ``[..., 2]``."""
    z = combine(logits, setting.guidance_scale, setting.temperature)
    tau = threshold(z, setting.top_k, setting.top_p) if setting.temperature else None
    if tau is None:
        tau = torch.full_like(z[..., 0], NEG_INF)
    else:
        z = z.masked_fill(z < tau[..., None], NEG_INF)
    return z, torch.stack([tau, torch.logsumexp(z, -1)], -1)


def _prob(z: Tensor, lse: Tensor) -> Tensor:
    return (z - lse).exp()


def _shift_right(passed: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], 1)


def _argmax(z: Tensor, seeds: Tensor, positions: Tensor, setting: Setting, noise: VerifyNoise) -> Tensor:
    if setting.temperature == 0:
        return z.max(-1).indices
    if noise.fresh is None:
        return gumbel(seeds, positions, z.shape[-1]).add_(z).max(-1).indices
    return _choose(z, noise.fresh)


def _choose(z: Tensor, noise: Tensor) -> Tensor:
    """Draw from log-weights ``z [..., V]`` with Gumbel rows ``[..., V]`` or uniforms ``[...]``."""
    if noise.ndim == z.ndim:
        return (z + noise).max(-1).indices
    total = (z - z.amax(-1, keepdim=True)).exp().double().cumsum(-1)
    return (total <= noise.double()[..., None] * total[..., -1:]).sum(-1).clamp(max=z.shape[-1] - 1)


def _test_masses(
    z: Tensor, stats: Tensor, draft: Draft, tested: Tensor, setting: Setting, group: GroupSpec | None
) -> tuple[Tensor, Tensor]:
    """p and q of every draft token ``[B, W]``, or of its group."""
    token = draft.tokens.clamp(min=0)
    p = _prob(z.gather(-1, token[..., None])[..., 0], stats[..., 1])
    if group is None:
        return p, draft.prob
    image, row = tested.nonzero(as_tuple=True)
    if not len(image):
        return p, draft.prob
    law = _prob(z[image, row], stats[image, row, 1, None])
    members, inside = group_members(z[image, row], law, token[image, row], group)
    label = _label(draft, image, row, setting, z.shape[-1]).gather(-1, members)
    p, q = p.clone(), draft.prob.clone()
    p[image, row] = (law.gather(-1, members) * inside).sum(-1)
    q[image, row] = (label * inside).sum(-1)
    return p, q


def _label(draft: Draft, image: Tensor, row: Tensor, setting: Setting, num_codes: int) -> Tensor:
    """Draft law of the entries (image, row): ``[R, V]`` float32; zero for NONE."""
    kind, token, prob = draft.kind[image, row], draft.tokens[image, row], draft.prob[image, row]
    q = prob.where(kind == Label.UNIFORM, 0.0)[:, None].expand(-1, num_codes).contiguous()
    q.scatter_add_(1, token.clamp(min=0)[:, None], (kind == Label.POINT).float()[:, None])
    here = (kind == Label.ROW).nonzero()[:, 0]
    if len(here) and draft.logits is None:
        raise ValueError("draft has ROW labels but no logits; pass the logits that the tokens were drawn from")
    if len(here) and draft.logits is not None:
        image, source = image[here], draft.row[image, row][here]
        scale = setting.guidance_scale
        scale = scale[image] if isinstance(scale, Tensor) else scale
        raw = draft.logits[:, image, source]  # G R V
        if draft.stats is None:
            z, stats = _law(raw, Setting(scale, setting.temperature, setting.top_k, setting.top_p))
        else:
            z, stats = combine(raw, scale, setting.temperature), draft.stats[image, source]
        q[here] = _prob(z, stats[:, 1:]).where(z >= stats[:, :1], 0.0)
    return q


def _redraw(
    z: Tensor,
    stats: Tensor,
    draft: Draft,
    todo: Tensor,
    retry: Tensor,
    seeds: Tensor,
    positions: Tensor,
    iteration: Tensor,
    setting: Setting,
    noise: VerifyNoise,
) -> Tensor:
    """Draw the rows marked ``todo [B, W]``, from the residual where ``retry``: ``[R]`` int64 in row-major order."""
    image, row = todo.nonzero(as_tuple=True)
    if not len(image):
        return image
    again = retry[image, row]
    weights = z[image, row]  # R V
    if again.any():
        at = again.nonzero()[:, 0]
        q = _label(draft, image[at], row[at], setting, z.shape[-1])
        left = residual.fn(_prob(weights[at], stats[image[at], row[at], 1:]), q).log()
        empty = left.amax(-1, keepdim=True) == NEG_INF  # p <= q everywhere in floating point
        weights[at] = weights[at].where(empty, left)
    if noise.fresh is not None and noise.residual is not None:
        pick = again.view(-1, *[1] * (noise.fresh.ndim - 2))
        return _choose(weights, noise.residual[image, row].where(pick, noise.fresh[image, row]))
    stream = torch.where(again, int(Stream.RESIDUAL), int(Stream.FRESH))
    rows = gumbel(seeds[image], positions[image, row, None], z.shape[-1], stream[:, None], iteration[image])
    return _choose(weights, rows[:, 0])
