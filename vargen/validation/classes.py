"""The classes that a model folder may name, and the one place where a name in a file becomes a class.

Allowed are the public components of vargen, a short list of classes of diffusers and transformers, and classes of your
own: of a module that you have imported, based on diffusers' ``ConfigMixin``, so that they are built from plain settings
and tensors. A name never leads to an import of anything else.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import vargen
from vargen.validation.checks import shown

ROOMS = ("tokenizers", "backbones", "draft_models", "samplers", "conditioners")
# component of a pipeline -> rooms of the classes that fit it; components of other names (of your own pipelines) take any
SLOTS = {
    "tokenizer": ("tokenizers",),
    "backbone": ("backbones",),
    "drafter": ("backbones", "draft_models"),
    "eagle": ("backbones", "draft_models"),
    "sampler": ("samplers",),
    "conditioner": ("conditioners",),
}
# classes of other libraries that components are, or that conditioners hold -> room
OUTSIDE: dict[str, dict[str, str]] = {
    "diffusers": {"AutoencoderKL": "tokenizers"},
    "transformers": {
        "T5EncoderModel": "text",
        "CLIPTextModel": "text",
        "CLIPTokenizer": "text",
        "CLIPTokenizerFast": "text",
        "T5Tokenizer": "text",
        "T5TokenizerFast": "text",
        "PreTrainedTokenizerFast": "text",
        "TokenizersBackend": "text",  # what transformers 5 calls the one above
    },
}


def component_class(library: Any, class_name: Any, slot: str = "component") -> type:
    """Turn the two names of an index entry into a class.

    Args:
        library: "vargen", "diffusers", "transformers", or a module that was imported already.
        class_name: a class of it.
        slot: name of the component, "tokenizer" for example.

    Raises:
        ValueError: anything else; nothing was imported then.
    """
    if not _is_name(library, dotted=True) or not _is_name(class_name):
        raise ValueError(f"{slot} must be the names of a library and of a class, got {shown([library, class_name])}")
    if library == "vargen":
        room = vargen._names.get(class_name, "").split(".")[0]
        if room not in ROOMS:
            raise ValueError(
                f"{slot} is a {class_name}, which this version of vargen ({vargen.__version__}) does not have; it may "
                "come from a newer one"
            )
    elif library in OUTSIDE:
        room = OUTSIDE[library].get(class_name, "")
        if not room:
            known = ", ".join(OUTSIDE[library])
            raise ValueError(f"{slot} is a {class_name} of {library}, of which a folder may only name {known}")
    else:
        return _own_class(library, class_name, slot)
    if room not in (rooms := SLOTS.get(slot, (room,))):
        raise ValueError(
            f"{slot} is a {class_name}, which is none of the {' or '.join(rooms)}; save the pipeline again"
        )
    return _check_kind(getattr(import_module(library), class_name, None), class_name, slot)


def _own_class(library: str, class_name: str, slot: str) -> type:
    """A class of the user's own module, which must be imported already: importing it would run what the folder names."""
    module = sys.modules.get(library)
    top = library.split(".")[0]
    if module is None or top in ("vargen", *OUTSIDE):
        hint = f"name it as {top} does" if top in ("vargen", *OUTSIDE) else f"import {library} before loading"
        raise ValueError(f"{slot} is a {class_name} of the module {library}; {hint}")
    from diffusers import ConfigMixin, DiffusionPipeline, pipelines

    if library in dir(pipelines):
        raise ValueError(f"{slot} is a class of the module {library}, a name that diffusers uses; rename the module")
    kind = getattr(module, "__dict__", {}).get(class_name)  # as it is: a module may import on access
    if (
        not isinstance(kind, type)
        or not issubclass(kind, ConfigMixin)
        or issubclass(kind, DiffusionPipeline)
        or kind.__module__ != library
    ):
        raise ValueError(
            f"{slot} is said to be a {class_name} of {library}, which defines no such component class (one based on "
            "diffusers' ConfigMixin)"
        )
    return _check_kind(kind, class_name, slot)


def _check_kind(kind: Any, class_name: str, slot: str) -> type:
    methods = ("save_pretrained", "from_pretrained")
    if not isinstance(kind, type) or not all(callable(getattr(kind, name, None)) for name in methods):
        raise ValueError(
            f"{slot} is said to be a {class_name}, which is no class with from_pretrained and save_pretrained"
        )
    return kind


def _is_name(text: Any, dotted: bool = False) -> bool:
    if not isinstance(text, str) or len(text) > 200:
        return False
    return all(part.isidentifier() for part in (text.split(".") if dotted else [text]))
