"""Reference of ``vargen.kernels.verify.verify`` in PyTorch: the definition that the Triton kernels are tested against.

p is the target distribution, q the draft's. Letters: G guidance branches (conditional first), B images, W window, V codes,
R rows picked from a window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vargen.kernels.acceptance import accept, residual
from vargen.kernels.draw import raise_bad_rows
from vargen.kernels.verify.group import group_members
from vargen.kernels.verify.types import Draft, GroupSpec, Label, Place, VerifyNoise, VerifyOutcome
from vargen.kernels.warp import NEG_INF, WarpSettings, combine, threshold
from vargen.random import Stream, gumbel, uniform


def verify_reference(
    logits: Tensor,
    draft: Draft,
    carry: str,
    place: Place,
    settings: WarpSettings,
    group: GroupSpec | None,
    noise: VerifyNoise,
) -> VerifyOutcome:
    """Arguments and result of :func:`vargen.kernels.verify.verify.verify_window`, unchecked."""
    z, stats = _warped(logits, settings)
    positions, forced, num_rows = place.positions, place.forced, place.num_rows
    valid = torch.arange(positions.shape[1], device=z.device) < num_rows[:, None]  # B W
    free = valid if forced is None else valid & (forced < 0)
    raise_bad_rows(free & ~stats[..., 1].isfinite(), positions)
    window = _Window(z, stats, draft, place, settings, group, noise)
    has = (draft.tokens >= 0) & (draft.kind != Label.NONE) & valid
    greedy = settings.temperature == 0
    chain = carry in ("independent", "none") and not greedy
    fresh = torch.zeros_like(draft.tokens)

    if greedy or carry == "gumbel":
        fresh = window.argmax(greedy)
        accepted = has & (draft.tokens == fresh)
    else:
        accepted = window.test(has & free)
    if forced is not None:
        accepted = accepted.where(forced < 0, has & (draft.tokens == forced))
    passed = accepted.cumprod(-1).bool()  # accepted, like all before it
    if chain:
        accepted = passed
    if chain and carry == "none":
        valid = valid & _shift_right(passed)  # nothing behind the first rejection
    y = draft.tokens.where(accepted, -1)
    if forced is not None:
        y = forced.where((forced >= 0) & valid, y)
    if greedy or carry == "gumbel":
        y = y.where(y >= 0, fresh)
    else:
        retry = has & ~accepted if carry == "maximal" else has & ~passed & _shift_right(passed)
        todo = (y < 0) & valid
        y = y.masked_scatter(todo, window.draw(todo, retry))

    y = y.where(valid, -1)
    prob = torch.ones_like(stats[..., 0]) if greedy else window.prob(y)
    if forced is not None:
        prob = prob.masked_fill(forced >= 0, 1.0)
    run = (accepted & valid).cumprod(-1).sum(-1)
    return VerifyOutcome(y, accepted & valid, prob.where(valid, 0.0), torch.minimum(run + 1, num_rows), stats)


@dataclass(frozen=True)
class _Window:
    z: Tensor  # [B, W, V] warped logits of the target, removed codes at -inf
    stats: Tensor  # [B, W, 2] threshold, log-normaliser
    draft: Draft
    place: Place
    settings: WarpSettings
    group: GroupSpec | None
    noise: VerifyNoise

    def prob(self, tokens: Tensor) -> Tensor:
        """p of ``tokens [B, W]``."""
        return _prob(self.z.gather(-1, tokens.clamp(min=0)[..., None])[..., 0], self.stats[..., 1])

    def argmax(self, greedy: bool) -> Tensor:
        """Most likely codes, or draws with the noise of the positions, ``[B, W]``."""
        if greedy:
            return self.z.max(-1).indices
        if self.noise.fresh is not None:
            return _choose(self.z, self.noise.fresh)
        return gumbel(self.place.seeds, self.place.positions, self.z.shape[-1]).add_(self.z).max(-1).indices

    def test(self, tested: Tensor) -> Tensor:
        """Which of the drafts ``tested [B, W]`` pass."""
        u = self.noise.accept
        if u is None:
            place = self.place
            u = uniform(place.seeds, place.positions, 1, Stream.ACCEPT, place.iteration)[..., 0]
        p, q = self.prob(self.draft.tokens), self.draft.prob
        image, row = tested.nonzero(as_tuple=True)
        if self.group is not None and len(image):
            at, token, p, q = (image, row), self.draft.tokens[image, row], p.clone(), q.clone()
            probs = _prob(self.z[at], self.stats[image, row, 1, None])
            members, inside = group_members(self.z[at], probs, token, self.group)
            mass = (probs.gather(-1, members) * inside).sum(-1)
            p[at] = mass.where(probs.gather(-1, token[:, None])[:, 0] > 0, 0.0)  # a removed draft has no group
            q[at] = (self.label(image, row).gather(-1, members) * inside).sum(-1)
        return tested & accept.fn(p, q, u)

    def label(self, image: Tensor, row: Tensor) -> Tensor:
        """Draft distribution of the entries (image, row): ``[R, V]`` float32; zero for NONE."""
        draft, settings = self.draft, self.settings
        kind, token, prob = draft.kind[image, row], draft.tokens[image, row], draft.prob[image, row]
        q = prob.where(kind == Label.UNIFORM, 0.0)[:, None].expand(-1, self.z.shape[-1]).contiguous()
        q.scatter_add_(1, token.clamp(min=0)[:, None], (kind == Label.POINT).float()[:, None])
        here = (kind == Label.ROW).nonzero()[:, 0]
        if len(here) and draft.logits is None:
            raise ValueError("draft has ROW labels but no logits; pass the logits that the tokens were drawn from")
        if len(here) and draft.logits is not None:
            image, source = image[here], draft.row[image, row][here]
            scale = settings.guidance_scale
            scale = scale[image] if isinstance(scale, Tensor) else scale
            raw = draft.logits[:, image, source]  # G R V
            if draft.stats is None:
                z, stats = _warped(raw, replace(settings, guidance_scale=scale))
            else:
                z, stats = combine(raw, scale, settings.temperature), draft.stats[image, source]
            q[here] = _prob(z, stats[:, 1:]).where(z >= stats[:, :1], 0.0)
        return q

    def draw(self, todo: Tensor, retry: Tensor) -> Tensor:
        """Draw the rows marked ``todo [B, W]``, from the residual where ``retry``: ``[R]`` int64 in row-major order."""
        image, row = todo.nonzero(as_tuple=True)
        if not len(image):
            return image
        again, noise = retry[image, row], self.noise
        weights = self.z[image, row]  # R V, log-weights
        if again.any():
            at = again.nonzero()[:, 0]
            left = self.residual(image[at], row[at]).log()
            empty = left.amax(-1, keepdim=True) == NEG_INF  # p <= q everywhere in floating point
            weights[at] = weights[at].where(empty, left)
        if noise.fresh is not None and noise.residual is not None:
            pick = again.view(-1, *[1] * (noise.fresh.ndim - 2))
            return _choose(weights, noise.residual[image, row].where(pick, noise.fresh[image, row]))
        stream = torch.where(again, int(Stream.RESIDUAL), int(Stream.FRESH))
        seeds, positions = self.place.seeds[image], self.place.positions[image, row, None]
        rows = gumbel(seeds, positions, self.z.shape[-1], stream[:, None], self.place.iteration[image])
        return _choose(weights, rows[:, 0])

    def residual(self, image: Tensor, row: Tensor) -> Tensor:
        """Unnormalised distribution after the rejections (image, row): ``[R, V]``; a group decides on acceptance only."""
        return residual.fn(_prob(self.z[image, row], self.stats[image, row, 1:]), self.label(image, row))


def _warped(logits: Tensor, settings: WarpSettings) -> tuple[Tensor, Tensor]:
    """Warped logits ``[..., V]``, removed codes at -inf, and their (threshold, log-normaliser) ``[..., 2]``."""
    z = combine(logits, settings.guidance_scale, settings.temperature)
    tau = threshold(z, settings.top_k, settings.top_p) if settings.temperature else None
    if tau is None:
        tau = torch.full_like(z[..., 0], NEG_INF)
    else:
        z = z.masked_fill(z < tau[..., None], NEG_INF)
    return z, torch.stack([tau, torch.logsumexp(z, -1)], -1)


def _prob(z: Tensor, lse: Tensor) -> Tensor:
    return (z - lse).exp()


def _shift_right(passed: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], 1)


def _choose(z: Tensor, noise: Tensor) -> Tensor:
    """Draw from log-weights ``z [..., V]`` with Gumbel rows ``[..., V]`` or uniforms ``[...]``."""
    if noise.ndim == z.ndim:
        return (z + noise).max(-1).indices
    total = (z - z.amax(-1, keepdim=True)).exp().double().cumsum(-1)
    return (total <= noise.double()[..., None] * total[..., -1:]).sum(-1).clamp(max=z.shape[-1] - 1)
