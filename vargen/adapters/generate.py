"""vargen inside transformers' own call: ``model.generate(**inputs, custom_generate=generate_with(sampler), ...)``.

``generate`` prepares prompts, negative prompts and settings as always and hands them to the loop made here, which decodes
with a vargen sampler and returns the sequence that ``generate`` would: prompt, codes and structural tokens. For Emu3,
Emu3.5 (Qwen3) and GLM-Image; Janus refuses ``custom_generate`` in image mode and Chameleon's class has no logits of images:
use ``vargen.wrap`` there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
    from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria
    from transformers.generation.logits_process import (
        PrefixConstrainedLogitsProcessor,
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        UnbatchedClassifierFreeGuidanceLogitsProcessor,
    )

SUPPORTED = ("emu3", "emu3.5", "glm_image")
_NOT_DONE: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
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
    streamer: Any = None,
    **options: Any,
) -> Callable[..., Tensor]:
    """Make the ``custom_generate`` argument of a model's ``generate``.

    Guidance, temperature, top-k and top-p are those of the ``generate`` call (its ``do_sample=False`` is greedy, and its
    defaults hold, top_k = 50 among them); everything else is the sampler's. ``return_dict_in_generate`` works; beams, scores
    and states of every step, stopping criteria and filled caches are refused. Give a ``streamer`` here and not to
    ``generate``, which does not hand it on: one given there sees the prompt only, and no ``end()``.

    Args:
        sampler: any window sampler; default speculative Jacobi decoding, which keeps the distribution.
        seed: as in ``ImagePipeline``; ``None`` draws from torch's global generator once.
        on_output: receives the ``SamplerOutput``, for its statistics.
        streamer: of transformers; it is put the prompt, then every token when the image is complete (its order of drawing
            is the sampler's), then it is ended, also when decoding fails. One sequence a call, as TextStreamer has it.
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
        check_call(generation_config, stopping_criteria, kwargs)
        check_streamer(streamer, len(input_ids))
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
        with streamed(streamer, input_ids) as put:
            output = run.sample(backbone, prompts, seeds=seeds, tokenizer=backbone.pixels(), negative=other)
            if on_output is not None:
                on_output(output)
            drawn = backbone.to_stream(output.codes).to(input_ids.device)
            put(drawn)
        found = torch.cat([input_ids, drawn], dim=1)
        return GenerateDecoderOnlyOutput(sequences=found) if generation_config.return_dict_in_generate else found

    return loop


def check_streamer(streamer: Any, num_sequences: int) -> None:
    """Refuse what is no streamer, and several sequences at once.

    Raises:
        ValueError: no ``put`` and ``end``; more than one sequence.
    """
    if streamer is None:
        return
    if not (callable(getattr(streamer, "put", None)) and callable(getattr(streamer, "end", None))):
        raise ValueError(
            f"streamer needs put(ids) and end(), got {type(streamer).__name__}; see transformers' BaseStreamer"
        )
    if num_sequences != 1:
        raise ValueError(
            f"a streamer takes one sequence a call, got {num_sequences}; use on_output or one call for each"
        )


@contextmanager
def streamed(streamer: Any, prompt: Tensor) -> Iterator[Callable[[Tensor], None]]:
    """Show a streamer the prompt ``[1, L]``, give a function for the tokens ``[1, S]``, and end it whatever happens."""
    if streamer is None:
        yield lambda drawn: None
        return

    def put(drawn: Tensor) -> None:
        for token in drawn.cpu().unbind(1):
            streamer.put(token)

    streamer.put(prompt.cpu())
    try:
        yield put
    finally:
        streamer.end()


def check_call(config: Any, criteria: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse what a ``generate`` call asks for and these samplers do not do.

    Raises:
        ValueError: beams, scores and states of every step, stopping criteria of one's own, a cache that is filled already.
    """
    for name, neutral in _NOT_DONE.items():
        value = getattr(config, name, None)
        if value not in (None, neutral):
            raise ValueError(f"{name}={value!r} is nothing that vargen's samplers do; leave it or custom_generate out")
    for criterion in criteria or ():
        if not isinstance(criterion, MaxLengthCriteria | EosTokenCriteria):
            raise ValueError(
                f"{type(criterion).__name__} cannot stop an image, which always has all its codes; remove it from the generate "
                "call"
            )
    for name in ("cache", "past_key_values"):
        given = kwargs.get(name)
        if given is not None and int(given.get_seq_length()) > 0:
            raise ValueError(
                f"{name} holds a prompt already; vargen's samplers read the prompt themselves, leave it out"
            )


def _backbone(model: Any, kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    options = dict(options)
    grids = kwargs.get("image_grid_thw")
    if grids is not None and "grid_size" not in options:
        # a large and a preview grid for each prompt; for several images of a prompt ``generate`` has repeated each in place
        large, preview = tuple(grids[0, 1:].tolist()), tuple(grids[-1, 1:].tolist())
        if others := {tuple(grid) for grid in grids[:, 1:].tolist()} - {large, preview}:
            raise ValueError(
                f"the prompts of one call must ask for one size of image, got the grids {large}, {preview} and "
                f"{', '.join(map(str, sorted(others)))}; call generate once for each size"
            )
        options |= {"grid_size": large, "preview_size": preview}
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
