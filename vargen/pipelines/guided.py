"""What guidance leads away from in a call, and the picture size of a call: rows and views that the pipeline draws with.

Letters: P prompts.
"""

from __future__ import annotations

import copy
from typing import Any

from vargen.pipelines import inputs
from vargen.pipelines.types import PromptInput, Rows
from vargen.samplers.base import Sampler


def is_guided(sampler: Sampler) -> bool:
    """Whether some pass of a sampler is guided."""
    return any(scale != 1.0 for scale in sampler._each("guidance_scale"))


def negative_rows(pipe: Any, negative_prompt: PromptInput, sampler: Sampler, num_rows: int) -> Rows | None:
    """The condition that guidance leads away from, ``[P, ...]``; ``None`` = the model's own empty one.

    Raises:
        ValueError: a negative prompt without guidance, for a pipeline that reads none, or of another number than the prompts.
    """
    needed = getattr(pipe.backbone, "needs_negative", False) and is_guided(sampler)
    if negative_prompt is None and not needed:
        return None
    if pipe.conditioner is None:
        raise ValueError(
            "this pipeline has no conditioner and so reads no negative prompt; sampler.sample(..., negative=...) takes the "
            "encoded condition, and guidance_scale=1 needs none"
        )
    if not is_guided(sampler):
        raise ValueError("a negative prompt has no effect without guidance; set guidance_scale above 1")
    texts = (
        [""] if negative_prompt is None else [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
    )
    if len(texts) not in (1, num_rows):
        raise ValueError(f"negative_prompt must be one text or {num_rows}, one a prompt, got {len(texts)}")
    rows = pipe.conditioner.encode_negative(list(texts))
    rows = rows if len(texts) == num_rows else inputs.repeat_condition(rows, num_rows)
    return inputs.move_condition(rows, pipe.backbone.device)


def sized(pipe: Any, height: int | None, width: int | None, aspect_ratio: str | None, pixels: str | None) -> Any:
    """A view of a pipeline for another picture size; weights are shared.

    Raises:
        ValueError: a model of one size, or a size that the model does not know.
    """
    view = copy.copy(pipe)
    backbone = pipe.backbone.with_size(height=height, width=width, aspect_ratio=aspect_ratio, pixels=pixels)
    parts = {"backbone": backbone, "sized_from": pipe}
    if pipe.tokenizer is not None:
        parts["tokenizer"] = pipe.tokenizer.with_scales(backbone.scales)
    vars(view).update(parts)  # past __setattr__, which would register them with the pipeline as well
    return view
