"""Couplings of two Gaussian chains: which of a draft's numbers may stand for the target's, and what replaces the others.

Two exact rules. Over whole paths: keep the draft's chain with min(1, p(path) / q(path)); a rejected one is replaced by a
target chain that survives 1 - q / p. Over steps: run the target's chain along the draft's, keep each state with min(1, p / q),
and where a state is refused reflect it (equal spreads) or draw it from the residual. Both are maximal couplings, of paths
and of steps (De Bortoli et al., 2025, arXiv:2501.05370, for the reflection). The rule of the paper (Wang et al., 2024,
arXiv:2411.11925) judges the last step only and times a factor that breaks it.

p is the target, q the draft. Letters: n tokens, S steps, D numbers of a token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_PROPOSALS = 4096  # of a residual, see ``draw_residual``
_FIRST_BATCH = 4  # proposals of the first round; doubles

Gaussian = tuple[Tensor, Tensor]  # means and standard deviations


def log_ratio(states: Tensor, target: Gaussian, draft: Gaussian) -> Tensor:
    """Log of p / q over the last two axes (steps, numbers), or the last one: ``[..., S, D]`` to ``[...]``.

    Differences are taken number by number before anything is summed, in float64: the two sums are large and nearly equal.
    """
    (mean_p, std_p), (mean_q, std_q) = ((m.double(), s.double()) for m, s in (target, draft))
    x = states.double()
    terms = 0.5 * (((x - mean_q) / std_q).square() - ((x - mean_p) / std_p).square()) + (std_q / std_p).log()
    return terms.flatten(-2).sum(-1) if terms.ndim > 2 else terms.sum(-1)


def accept(log_p_over_q: Tensor, u: Tensor) -> Tensor:
    """Keep with probability min(1, p / q): u in [0, 1), strict, so that equal distributions always pass."""
    return u.double().log() < log_p_over_q  # log 0 = -inf passes; NaN does not


def survive(log_p_over_q: Tensor, u: Tensor) -> Tensor:
    """Keep a draw of p with probability max(0, 1 - q / p): what is left is the residual."""
    return u.double() < -torch.expm1(-log_p_over_q)


def draw_residual(
    count: int, propose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], free: Tensor, device: torch.device
) -> tuple[Tensor, int, int]:
    """Draw from residuals by rejection, in growing batches of target chains.

    Args:
        count: n rows.
        propose: ``propose(rows, numbers)`` of equal length draws proposal ``number`` of each row and returns the tokens
            ``[m, D]`` and which survive ``[m]``.
        free: [n] bool, rows that take their first proposal: nothing was rejected there.
        device: of the rows.

    Returns:
        Tokens ``[n, D]``, target chains run, and rows that met ``MAX_PROPOSALS``: these hold a draw of p itself. A row gets
        so far with a chance of at most 1 / (e MAX_PROPOSALS), which bounds the error of its distribution.
    """
    tokens: Tensor | None = None
    pending = torch.arange(count, device=device)
    size, start, chains, capped = 1, 0, 0, 0
    while len(pending):
        rows = pending.repeat_interleave(size)
        numbers = torch.arange(start, start + size, device=device).repeat(len(pending))
        drawn, kept = propose(rows, numbers)
        chains += len(rows)
        kept = (kept | free[rows]).view(-1, size)
        first = kept.long().argmax(1)  # the first that survives
        found = kept.any(1)
        start += size
        if start >= MAX_PROPOSALS:
            capped = int((~found).sum())
            found = torch.ones_like(found)
        chosen = drawn.view(len(pending), size, -1)[torch.arange(len(pending), device=device), first]
        tokens = drawn.new_zeros(count, drawn.shape[-1]) if tokens is None else tokens
        tokens[pending[found]] = chosen[found]
        pending = pending[~found]
        size = max(_FIRST_BATCH, 2 * size)
    assert tokens is not None
    return tokens, chains, capped


def reflect(noise: Tensor, mean_gap: Tensor) -> Tensor:
    """Mirror the noise of a refused state at the plane between two Gaussians of equal spread.

    Args:
        noise: ``[n, D]``, (state - mean_q) / std.
        mean_gap: ``[n, D]``, (mean_q - mean_p) / std.

    Returns:
        Noise of the target's state, ``[n, D]``; mean_p + std * noise is a draw of the residual.
    """
    direction = mean_gap / mean_gap.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(mean_gap.dtype).tiny)
    return noise - 2 * (noise * direction).sum(-1, keepdim=True) * direction


def couple_step(
    state: Tensor,
    target: Gaussian,
    draft: Gaussian,
    u: Tensor,
    draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, int]:
    """The target's state for a draft's state, by a maximal coupling of one step.

    Args:
        state: ``[n, D]`` the draft's next state.
        target: means and standard deviations ``[n, D]`` of the target's step, from where the target is.
        draft: those of the draft's step, from where the draft is.
        u: ``[n]`` uniform numbers.
        draw: ``draw(rows, numbers)``: normal noise ``[m, D]`` and uniform numbers ``[m]`` for proposals of residuals.

    Returns:
        The target's next state ``[n, D]``, where it is the draft's ``[n]`` bool, and residuals that met the cap.
    """
    (mean_p, std_p), (mean_q, std_q) = target, draft
    kept = accept(log_ratio(state[:, None], *(((m[:, None], s[:, None])) for m, s in (target, draft))), u)
    refused = (~kept).nonzero().flatten()
    out, capped = state.clone(), 0
    if len(refused) == 0:
        return out, kept, 0
    same = (std_p[refused] == std_q[refused]).all(-1)
    mirror, other = refused[same], refused[~same]
    if len(mirror):
        noise = (state[mirror] - mean_q[mirror]) / std_q[mirror]
        gap = (mean_q[mirror] - mean_p[mirror]) / std_p[mirror]
        out[mirror] = mean_p[mirror] + std_p[mirror] * reflect(noise, gap)
    if len(other):

        def propose(rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
            which = other[rows]
            noise, uniforms = draw(which, numbers)
            y = mean_p[which] + std_p[which] * noise
            pair = ((m[which][:, None], s[which][:, None]) for m, s in (target, draft))
            return y, survive(log_ratio(y[:, None], *pair), uniforms)

        free = torch.zeros(len(other), dtype=torch.bool, device=state.device)
        out[other], _, capped = draw_residual(len(other), propose, free, state.device)
    return out, kept, capped
