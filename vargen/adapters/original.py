"""Image models of transformers from files in the layout of their authors: ``ImagePipeline.from_original``.

A layout is one entry of ``LAYOUTS``: a function that reads weights into transformers' class, and one that reads the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from vargen.checkpoints.families import get_family
from vargen.checkpoints.folders import TYPES, family_of, read_config
from vargen.checkpoints.reader import CheckpointError, load_original
from vargen.validation.checks import check_names
from vargen.validation.folders import one_line

LOADING = ("dtype", "device_map", "max_memory", "offload_folder", "quantization_config", "attn_implementation")
WRAPPING = ("grid_size", "static", "compile")


@dataclass(frozen=True)
class OriginalLayout:
    """How one family is read."""

    module: str  # below vargen.adapters.families
    load: str  # function: path and options to model
    settings: tuple[str, ...]  # options of that function beside those of ``from_pretrained``
    processor: Callable[[str | Path, Any, Mapping[str, Any]], Any]  # path, model, options of its own
    reading: tuple[str, ...] = ()  # these options
    wrapping: tuple[str, ...] = ()  # options of the family's backbone beside those of all
    vocabulary: str = ""  # file that is missing where prompts cannot be read


def _janus_processor(path: str | Path, model: Any, options: Mapping[str, Any]) -> Any:
    from vargen.adapters.families.janus_checkpoints import janus_processor

    return janus_processor(path, model, **options)


def _emu3_processor(path: str | Path, model: Any, options: Mapping[str, Any]) -> Any:
    from vargen.adapters.families.emu3_tokenizer import check_vocabulary, emu3_processor

    processor = emu3_processor(path)
    if processor is not None:
        check_vocabulary(processor, model.config.vocabulary_map, path)
    return processor


LAYOUTS = {
    "janus-original": OriginalLayout(
        "janus_checkpoints",
        "load_janus",
        ("config", "token_ids"),
        _janus_processor,
        reading=("roles",),
        vocabulary="tokenizer.json",
    ),
    "emu3-original": OriginalLayout(
        "emu3_checkpoints",
        "load_emu3",
        ("config", "vision_tokenizer"),
        _emu3_processor,
        wrapping=("negative_prompt", "negative_header"),
        vocabulary="emu3.tiktoken and emu3_vision_tokens.txt",
    ),
}
CONVERTED = ("janus", "emu3")  # model_type of the same models in the layout of transformers


def find_layout(path: str | Path) -> OriginalLayout:
    """The layout of a folder or a file, by the config in it, else by its keys and shapes.

    Raises:
        ValueError: nothing there, or files of another family, which is named with its loader.
    """
    if not Path(path).exists():
        raise ValueError(
            f"no folder or file {path}; download the authors' repository first (hf download REPOSITORY --local-dir DIR)"
        )
    stored = read_config(path).get("model_type")
    if stored in CONVERTED:
        raise ValueError(
            f"{path} is in the layout of transformers (model_type {stored!r}); load model and processor with transformers "
            "and call ImagePipeline.from_transformers(model, processor)"
        )
    name = TYPES.get(stored) if isinstance(stored, str) else None
    if name is None:
        family = family_of(path, load_original(path))
        name = None if family is None else family.name
    if name not in LAYOUTS:
        what = f"a {get_family(name).title} ({get_family(name).loader})" if name else "none that is known by its keys"
        raise CheckpointError(f"from_original reads Janus, Janus-Pro and Emu3; {path} looks like {what}")
    return LAYOUTS[name]


def load_original_model(path: str | Path, options: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The model of transformers, its processor and the options left for ``vargen.wrap``.

    Args:
        path: the authors' folder, or one file.
        options: of loading (``dtype``, ``device_map``, ...), of the layout (``config``, ...) and of the backbone.

    Raises:
        ValueError: unknown options, before anything is read; files that do not fit.
    """
    layout = find_layout(path)
    given = {"dtype" if name == "torch_dtype" else name: value for name, value in options.items()}
    if len(given) < len(options):
        raise ValueError("give dtype or torch_dtype, not both; they mean the same")
    wrapping = (*WRAPPING, *layout.wrapping)
    check_names(given, (*layout.settings, *layout.reading, *LOADING, *wrapping), "from_original")
    taken = {name: given[name] for name in (*layout.settings, *LOADING) if given.get(name) is not None}
    load = getattr(import_module(f"vargen.adapters.families.{layout.module}"), layout.load)
    with one_line(Path(path)):
        model = load(path, **taken)
        processor = layout.processor(path, model, {name: given[name] for name in layout.reading if name in given})
    return model, processor, {name: given[name] for name in wrapping if name in given}


def original_components(path: str | Path, sampler: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Components of ``ImagePipeline.from_original``; without a vocabulary prompts are refused when they are given."""
    from vargen.adapters.wrap import pipeline_components

    model, processor, rest = load_original_model(path, options)
    reason = f"{path} lacks {find_layout(path).vocabulary}, so this pipeline reads no text; copy them there, or draw from token "
    reason += "ids: pipe.sampler.sample(pipe.backbone, input_ids, seeds=[0], tokenizer=pipe.tokenizer)"
    return pipeline_components(model, processor, sampler, rest, unreadable=reason)
