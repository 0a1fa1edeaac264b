"""Text encoders of transformers and their tokenizers, loaded without code of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vargen.validation.classes import component_class
from vargen.validation.folders import check_component, check_settings


def load_text_encoder(name: str | Path, kind: str = "T5EncoderModel", **options: Any) -> Any:
    """Load an encoder, ``T5EncoderModel`` or ``CLIPTextModel``, from a folder or the Hub; its settings may not choose code to run.

    Raises:
        ValueError: they try to.
    """
    cls: Any = component_class("transformers", kind, slot="the text encoder")
    if Path(name).is_dir():
        check_component(name, cls)
    settings, _ = cls.config_class.get_config_dict(name)
    check_settings(Path(name) / "config.json", settings)
    return cls.from_pretrained(name, **options)


def load_text_tokenizer(name: str | Path) -> Any:
    """Load the tokenizer of a text encoder from a folder or the Hub: one of the classes in ``vargen.validation.classes``.

    Raises:
        ValueError: another class, or code of its own.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if Path(name).is_dir():
        check_component(name, AutoTokenizer)
    settings = get_tokenizer_config(name)
    check_settings(Path(name) / "tokenizer_config.json", settings)
    if settings.get("tokenizer_class") is not None:
        component_class("transformers", settings["tokenizer_class"], slot="the tokenizer of captions")
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
