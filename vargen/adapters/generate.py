"""vargen inside transformers' own call: ``model.generate(**inputs, custom_generate=generate_with(sampler), ...)``.

``generate`` prepares prompts, negative prompts and settings as always and hands them to the loop made here, which decodes
with a vargen sampler and returns the sequence that ``generate`` would: prompt, codes and structural tokens. For Emu3,
Emu3.5 (Qwen3) and GLM-Image; Janus refuses ``custom_generate`` in image mode and Chameleon's class has no logits of images:
use ``vargen.wrap`` there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vargen.adapters.wrap import wrap
from vargen.outputs import SamplerOutput
from vargen.random import image_seeds
from vargen.samplers.base import Sampler
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.validation.extras import extra

with extra("transformers", "generate_with"):
    from transformers import LogitsProcessorList
    from transformers.generation.logits_process import (
        PrefixConstrainedLogitsProcessor,
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        UnbatchedClassifierFreeGuidanceLogitsProcessor,
    )

SUPPORTED = ("emu3", "emu3.5", "glm_image")
# guidance and warpers are settings of the sampler, structure is the adapter's
REPLACED = (
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def generate_with(
    sampler: Sampler | None = None,
    *,
    seed: int | list[int] | None = None,
    on_output: Callable[[SamplerOutput], None] | None = None,
    **options: Any,
) -> Callable[..., Tensor]:
    """Make the ``custom_generate`` argument of a model's ``generate``.

    Guidance, temperature, top-k and top-p are those of the ``generate`` call (its ``do_sample=False`` is greedy, and its
    defaults hold, top_k = 50 among them); everything else is the sampler's.

    Args:
        sampler: any window sampler; default speculative Jacobi decoding, which keeps the distribution.
        seed: as in ``ImagePipeline``; ``None`` draws from torch's global generator once.
        on_output: receives the ``SamplerOutput``, for its statistics.
        options: of ``vargen.wrap``, such as ``grid_size=(h, w)`` in codes.

    Returns:
        A function of the prepared arguments; it returns ``[B, L + S]`` int64 token ids.

    Example:
        >>> loop = generate_with(SpeculativeJacobiSampler(window=32), seed=0, grid_size=(90, 90))  # doctest: +SKIP
        >>> model.generate(**inputs, custom_generate=loop, guidance_scale=3.0, max_new_tokens=8193)  # doctest: +SKIP
    """

    base = sampler or SpeculativeJacobiSampler()

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Tensor:
        backbone = _backbone(model, kwargs, options)
        negative = _negative(logits_processor, backbone)
        stream = backbone.layout().length
        room = int(generation_config.max_length) - input_ids.shape[1]
        if room < stream:
            raise ValueError(f"an image takes {stream} tokens, max_new_tokens is {room}; raise max_new_tokens")
        settings = _settings(generation_config, backbone)
        run = base.from_config(base.config, **settings)
        mask = kwargs.get("attention_mask")
        prompts = (input_ids, torch.ones_like(input_ids) if mask is None else mask)
        seeds = image_seeds(seed, None, len(input_ids))
        other = negative if run.guidance_scale != 1 else None
        output = run.sample(backbone, prompts, seeds=seeds, tokenizer=backbone.pixels(), negative=other)
        if on_output is not None:
            on_output(output)
        return torch.cat([input_ids, backbone.to_stream(output.codes).to(input_ids.device)], dim=1)

    return loop


def _backbone(model: Any, kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    options = dict(options)
    grids = kwargs.get("image_grid_thw")
    if grids is not None and "grid_size" not in options:  # large grid, preview grid, of the first image
        (h, w), preview = grids[0, 1:].tolist(), grids[1, 1:].tolist()
        options |= {"grid_size": (h, w), "preview_size": tuple(preview)}
    backbone = wrap(model, **options)
    if not set(backbone.model_types) & set(SUPPORTED):
        raise ValueError(
            f"custom_generate works with {', '.join(SUPPORTED)}; for {type(model).__name__} use vargen.wrap(model) or "
            "ImagePipeline.from_transformers"
        )
    return backbone


def _negative(processors: LogitsProcessorList, backbone: Any) -> dict[str, Tensor] | None:
    """The prompts of the guidance processor; refuse processors whose effect would be lost."""
    negative = None
    codes = backbone.code_ids()
    for processor in processors:
        if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
            context = processor.unconditional_context
            if context["input_ids"] is not None:
                ids, mask = context["input_ids"], context["attention_mask"]
                negative = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
        elif isinstance(processor, SuppressTokensLogitsProcessor):
            lost = bool(torch.isin(processor.suppress_tokens.cpu(), codes.cpu()).any())
            if lost:
                raise ValueError("suppress_tokens forbids codes of the image, which vargen's samplers cannot")
        elif not isinstance(processor, REPLACED):
            raise ValueError(
                f"{type(processor).__name__} has no counterpart in vargen's samplers; remove its setting from the "
                "generate call or leave custom_generate out"
            )
    return negative


def _settings(stored: Any, backbone: Any) -> dict[str, Any]:
    sampled = bool(stored.do_sample)
    scale = stored.guidance_scale
    return {
        "guidance_scale": 1.0 if scale is None else float(scale),
        "temperature": float(stored.temperature or 1.0) if sampled else 0.0,
        "top_k": min(int(stored.top_k or 0), backbone.codebook_size) if sampled else 0,
        "top_p": float(stored.top_p or 1.0) if sampled else 1.0,
    }
