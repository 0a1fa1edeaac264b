"""Arguments and buffers that the kernels of a window share.

Letters: G guidance branches, B images, W window, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vargen.kernels import device as row_functions
from vargen.kernels.language import jit, launch_options, tl, triton
from vargen.kernels.verify.reference import Setting
from vargen.kernels.verify.types import Draft, Verdict, VerifyNoise


@dataclass(frozen=True)
class WindowLaunch:
    """Keyword arguments of the row and finish kernels over one set of outputs."""

    rows: dict[str, Any]
    finish: dict[str, Any]
    verdict: Verdict

    @classmethod
    def of(
        cls,
        logits: Tensor,
        draft: Draft,
        seeds: Tensor,
        positions: Tensor,
        iteration: Tensor,
        num_rows: Tensor,
        setting: Setting,
        forced: Tensor | None,
        noise: VerifyNoise,
    ) -> WindowLaunch:
        """Allocate the outputs and gather the arguments; label statistics that are missing are computed."""
        verdict, draft_prob = _outputs(logits)
        logits, labels = dense_rows(logits), dense_rows(logits if draft.logits is None else draft.logits)
        law, search = _law_arguments(logits, setting)
        stats = draft.stats
        if stats is None:
            stats = verdict.stats if draft.logits is None else _label_stats(labels, law, search)
        window = verdict.tokens.shape[1]
        filler = verdict.stats
        given = {
            "tokens_ptr": draft.tokens,
            "kind_ptr": draft.kind,
            "prob_ptr": draft.prob,
            "row_ptr": draft.row,
            "seeds_ptr": seeds,
            "positions_ptr": positions,
            "iteration_ptr": iteration,
            "num_rows_ptr": num_rows,
            "forced_ptr": draft.tokens if forced is None else forced,
            "fresh_ptr": filler if noise.fresh is None else noise.fresh.float(),
            "residual_ptr": filler if noise.residual is None else noise.residual.float(),
            "label_stats_ptr": stats,
        }
        common = {name: value.contiguous() for name, value in given.items()} | law
        common |= {
            "label_ptr": labels,
            "label_rows": labels.shape[2],
            "LABEL_GUIDED": labels.shape[0] == 2,
            "y_ptr": verdict.tokens,
            "accepted_ptr": verdict.accepted,
            "y_prob_ptr": verdict.prob,
            "draft_prob_ptr": draft_prob,
            "stats_ptr": verdict.stats,
            "W": window,
            "FORCED": forced is not None,
            "GIVEN": noise.fresh is not None,
        }
        common |= {f"label_stride_{axis}": stride for axis, stride in zip("gbw", labels.stride(), strict=False)}
        uniform = filler if noise.accept is None else noise.accept.float().contiguous()
        rows = {"uniform_ptr": uniform, "GREEDY": setting.temperature == 0}
        finish = {"committed_ptr": verdict.num_committed, "WINDOW": triton.next_power_of_2(window)}
        return cls(common | search | rows, common | finish, verdict)

    def result(self) -> Verdict:
        """The outcome, once the kernels are launched."""
        return replace(self.verdict, accepted=self.verdict.accepted.view(torch.bool))


def _outputs(logits: Tensor) -> tuple[Verdict, Tensor]:
    batch, window = logits.shape[1:3]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    tokens, accepted = empty(batch, window, dtype=torch.int64), empty(batch, window, dtype=torch.uint8)
    prob, committed = empty(batch, window), empty(batch, dtype=torch.int64)
    return Verdict(tokens, accepted, prob, committed, empty(batch, window, 2)), empty(batch, window)


def _law_arguments(logits: Tensor, setting: Setting) -> tuple[dict[str, Any], dict[str, Any]]:
    """What turns raw rows into laws, and what finds their thresholds."""
    num_codes, scale, greedy = logits.shape[-1], setting.guidance_scale, setting.temperature == 0
    per_image = isinstance(scale, Tensor)
    law = {
        "logits_ptr": logits,
        "scales_ptr": scale.float().contiguous() if isinstance(scale, Tensor) else logits,
        "scale": 1.0 if per_image else scale,
        "inv_t": 1.0 if greedy else 1.0 / setting.temperature,
        "V": num_codes,
        "GUIDED": logits.shape[0] == 2,
        "PER_IMAGE": per_image,
        **launch_options(num_codes),
    }
    law |= {f"stride_{axis}": stride for axis, stride in zip("gbw", logits.stride(), strict=False)}
    search = {
        "k": setting.top_k,
        "top_p": setting.top_p,
        "SPARSE": not greedy and 0 < setting.top_k < num_codes,
        "NUCLEUS": not greedy and setting.top_p < 1,
    }
    return law, search


def _label_stats(labels: Tensor, law: dict[str, Any], search: dict[str, Any]) -> Tensor:
    branches, batch, rows, _ = labels.shape
    stats = torch.empty(batch, rows, 2, dtype=torch.float32, device=labels.device)
    strides = {f"stride_{axis}": stride for axis, stride in zip("gbw", labels.stride(), strict=False)}
    own = strides | {"logits_ptr": labels, "GUIDED": branches == 2, "stats_ptr": stats, "W": rows}
    _stats_kernel[(rows, batch)](**law | search | own)
    return stats


def dense_rows(logits: Tensor) -> Tensor:
    """The same logits with codes next to each other."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


@jit(do_not_specialize=["k"])
def _stats_kernel(
    logits_ptr,  # G B W V
    stride_g,
    stride_b,
    stride_w,
    scales_ptr,
    scale,
    inv_t,
    k,
    top_p,
    V,
    stats_ptr,  # B W 2
    W,
    GUIDED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    SPARSE: tl.constexpr,
    NUCLEUS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Threshold and log-normaliser of every row, for labels that come without them."""
    w = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    if PER_IMAGE:
        scale = tl.load(scales_ptr + b)
    cond = logits_ptr + b * stride_b + w * stride_w
    uncond = cond + stride_g
    z = row_functions.load_tile(cond, uncond, scale, inv_t, 0, V, GUIDED, BLOCK)
    tau, lse = row_functions.row_stats(
        z, cond, uncond, scale, inv_t, V, k, top_p, GUIDED, SPARSE, NUCLEUS, BLOCK, TILES
    )
    tl.store(stats_ptr + 2 * (b * W + w), tau)
    tl.store(stats_ptr + 2 * (b * W + w) + 1, lse)
