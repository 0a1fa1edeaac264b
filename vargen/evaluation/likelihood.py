"""Nats per token of held-out heroes under a causal or next-scale backbone, each hero with its own caption.

It says how predictable the codes are. Heroes carry few nats per token, which flatters speculative decoding; the number
belongs beside every acceptance rate measured on them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vargen.evaluation.conditions import check_num
from vargen.evaluation.features import Progress
from vargen.evaluation.report import Report, environment
from vargen.features import Feature
from vargen.metrics.heroes import Heroes, draw_heroes

if TYPE_CHECKING:
    from vargen.pipelines.image import ImagePipeline


@dataclass(frozen=True, kw_only=True)
class LikelihoodResult:
    """Nats per token on held-out images: mean, standard error over images, and what a uniform guess would pay."""

    num_images: int
    tokens_per_image: int
    nats_per_token: float
    standard_error: float
    uniform: float  # log of the codebook size
    held_out_pairs: float | None = None  # nats per token on (base, weapon) pairs that training never shows
    condition: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def evaluate_likelihood(
    pipe: ImagePipeline,
    out: str | Path | None = None,
    *,
    num: int = 512,
    chunk: int = 32,
    model: str = "",
    progress: Progress | None = None,
) -> Report:
    """Score ``num`` fresh test heroes and as many of held-out pairs, teacher-forced, without guidance.

    Args:
        pipe: an ``ImagePipeline`` with a causal, neighboring or parallel-group backbone (``backbone(codes, condition)``) or a next-scale one
            (``backbone(tokenizer.scale_inputs(codes), condition)``).
        out: folder for the report; None writes nothing.
        num: heroes of each kind.
        chunk: heroes at a time.
        model: name for the report.
        progress: called as the work goes on.

    Raises:
        ValueError: a backbone that defines no likelihood token by token.
    """
    if num < 2:
        raise ValueError(f"num must be at least 2, got {num}")
    check_num(num)
    each = _nats(pipe, draw_heroes(num, "prompts"), chunk, "scoring test heroes", progress)
    held_out = _nats(pipe, draw_heroes(num, "prompts", held_out=True), chunk, "scoring held-out pairs", progress)
    result = LikelihoodResult(
        num_images=num,
        tokens_per_image=each.shape[1],
        nats_per_token=float(each.mean()),
        standard_error=float(each.mean(1).std() / num**0.5),
        uniform=math.log(pipe.backbone.codebook_size),
        held_out_pairs=float(held_out.mean()),
        condition="the hero's caption, no guidance",
    )
    report = Report(
        kind="likelihood",
        subject={"model": model, "backbone": type(pipe.backbone).__name__},
        protocol={"num": num, "reference": "fresh heroes of the test split", "condition": result.condition},
        results=[result.to_dict()],
        environment=environment(pipe),
    )
    if out is not None:
        report.write(out)
    return report


def token_nats(pipe: ImagePipeline, images: Tensor, captions: list[str]) -> Tensor:
    """Return ``[B, N]`` float64: the negative log-likelihood of every code of uint8 ``[B, 3, H, W]`` images."""
    device, dtype = pipe.device, getattr(pipe.tokenizer, "dtype", torch.float32)
    codes = pipe.tokenizer.encode((images.float() / 127.5 - 1).to(device, dtype)).codes
    condition = pipe.encode_condition(prompt=captions)
    if isinstance(codes, list):
        targets = torch.cat([c.flatten(1) for c in codes], 1)
        logits = pipe.backbone(pipe.tokenizer.scale_inputs(codes), condition)
    elif {Feature.WINDOW, Feature.NEIGHBORS} & Feature.of(pipe.backbone) or "par" in getattr(
        pipe.backbone, "schedules", ()
    ):
        targets = codes.flatten(1)
        logits = pipe.backbone(targets, condition)
    else:
        raise ValueError(
            f"nats per token need a causal, neighboring, parallel-group or next-scale backbone, got {type(pipe.backbone).__name__}; "
            "evaluate it with vargen eval fid"
        )
    return F.cross_entropy(logits.double().transpose(1, 2), targets, reduction="none").cpu()


@torch.no_grad()
def _nats(pipe: ImagePipeline, heroes: Heroes, chunk: int, what: str, progress: Progress | None) -> Tensor:
    captions, parts = heroes.captions, []
    modules = [m for m in (pipe.tokenizer, pipe.backbone) if getattr(m, "training", False)]
    for module in modules:
        module.eval()
    try:
        for start in range(0, len(captions), chunk):
            rows = slice(start, start + chunk)
            parts.append(token_nats(pipe, heroes.images[rows], captions[rows]))
            if progress is not None:
                progress(what, min(start + chunk, len(captions)), len(captions))
    finally:
        for module in modules:
            module.train()
    return torch.cat(parts)
