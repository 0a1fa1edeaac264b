"""Loader of Emu3 in the layout of its authors: two repositories, no remote code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vargen.adapters.families import emu3_layout as layout
from vargen.adapters.families.building import build_renamed, check_rope, merged
from vargen.adapters.families.emu3_tokenizer import IMAGE
from vargen.checkpoints.folders import read_config
from vargen.checkpoints.reader import check_family, load_original

Source = str | Path | Mapping[str, Tensor]

TITLE = "Emu3 in its authors' layout"
BESIDE = "vision_tokenizer"  # folder inside the model's, and what stands before its names in errors


def load_emu3(
    checkpoint: Source,
    vision_tokenizer: Source | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Load Emu3 as its authors publish it into transformers' class.

    Args:
        checkpoint: the language model: a folder with ``config.json`` and the weights (shards with an index, or one
            file), one file, or a state dict.
        vision_tokenizer: ``BAAI/Emu3-VisionTokenizer``, likewise; default the folder ``vision_tokenizer`` inside that of
            the model. Without one the model draws codes and has no pixels.
        config: settings of ``Emu3TextConfig`` that neither shapes nor ``config.json`` tell, such as
            ``{"num_attention_heads": 32}``, and the ids of the authors' config (``boi_token_id``, ...).
        options: of ``from_pretrained``, such as ``dtype`` and ``device_map``; without ``dtype`` the whole model has that
            of the language model's file.

    Returns:
        An ``Emu3ForConditionalGeneration``.

    Raises:
        CheckpointError: keys or shapes that do not fit.
        ValueError: settings that nothing tells.
    """
    from transformers import Emu3Config

    state_dict = load_original(checkpoint)
    check_family(state_dict, ("emu3-original", "hf-llama"))
    stored = ({} if isinstance(checkpoint, Mapping) else read_config(checkpoint)) | dict(config or {})
    check_rope(stored, "Emu3")
    text = merged(layout.infer_settings(state_dict, stored), _known(config))
    _check_heads(text)
    vision = _vision_tokenizer(checkpoint, vision_tokenizer)
    vq = {} if vision is None else layout.infer_vq_settings(vision)
    names = layout.vocabulary_map(stored, text["vocab_size"], _num_codes(vq, text["vocab_size"]))
    built = Emu3Config(
        text_config=text,
        vq_config=vq or None,
        vocabulary_map=names | {IMAGE: names["<|endoftext|>"] + 3},  # the first of the unused special tokens
        tie_word_embeddings=False,
    )
    precision = state_dict["model.embed_tokens.weight"].dtype
    for name, value in (vision or {}).items():
        state_dict[f"{BESIDE}.{name}"] = value.to(precision) if value.is_floating_point() else value
    kind = _class(with_pixels=vision is not None)
    model = build_renamed(kind, built, state_dict, options, rename=_rename, restore=_restore, title=TITLE)
    model.generation_config.update(**{name: text[name] for name in layout.TEXT_TOKENS}, do_sample=True, top_k=2048)
    return model


def _known(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings of the language model among those given; ids of structural tokens are read by ``vocabulary_map``."""
    ids = {field for field, _ in layout.TOKENS.values()} - set(layout.TEXT_TOKENS)
    return {name: value for name, value in (config or {}).items() if name not in ids}


def _check_heads(text: Mapping[str, Any]) -> None:
    heads, width = text["num_attention_heads"], text["hidden_size"]
    if heads is None:
        raise ValueError(
            f"nothing tells the attention heads of an Emu3 of width {width}; put config.json beside the weights, or give "
            "config={'num_attention_heads': ...}"
        )
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"num_attention_heads must divide the width {width}, got {heads}")


def _vision_tokenizer(checkpoint: Source, given: Source | None) -> dict[str, Tensor] | None:
    if given is None and isinstance(checkpoint, str | Path) and (Path(checkpoint) / BESIDE).is_dir():
        given = Path(checkpoint) / BESIDE
    if given is None:
        return None
    loaded = load_original(given)
    check_family(loaded, "emu3-vision-tokenizer")
    return loaded


def _num_codes(vq: Mapping[str, Any], rows: int) -> int:
    if vq:
        return int(vq["codebook_size"])
    if rows != layout.VOCABULARY:
        raise ValueError(
            f"nothing tells how many of the {rows} tokens are codes (the published vocabulary has {layout.VOCABULARY}); "
            "give vision_tokenizer='...', the folder of Emu3-VisionTokenizer"
        )
    return layout.CODES


def _rename(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{BESIDE}."
    own = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
    vision = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    renamed = {layout.VQ + key: value for key, value in layout.vq_to_transformers(vision).items()}
    return layout.to_transformers(own) | renamed


def _restore(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    vision = {key.removeprefix(layout.VQ): value for key, value in state_dict.items() if key.startswith(layout.VQ)}
    restored = {f"{BESIDE}.{key}": value for key, value in layout.vq_to_official(vision).items()}
    return layout.to_official(state_dict) | restored


def _class(*, with_pixels: bool) -> Any:
    """The class of transformers, or one that holds no vision tokenizer and says so where it is saved."""
    from transformers import Emu3ForConditionalGeneration

    if with_pixels:
        return Emu3ForConditionalGeneration

    class Emu3WithoutPixels(Emu3ForConditionalGeneration):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.vqmodel = None

        def save_pretrained(self, *_: Any, **__: Any) -> None:
            raise ValueError(
                "this Emu3 was loaded without its vision tokenizer, and transformers would fill the gap with random "
                "numbers; load it with vision_tokenizer='...' and save that"
            )

    return Emu3WithoutPixels
