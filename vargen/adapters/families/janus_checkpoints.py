"""Loader of Janus and Janus-Pro in the layout of their authors, without their remote code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vargen.adapters.families.building import build_renamed, check_rope, merged
from vargen.adapters.families.janus_layout import IGNORED, infer_settings, to_official, to_transformers
from vargen.checkpoints.folders import read_config
from vargen.checkpoints.reader import check_family, load_original
from vargen.validation.checks import check_names
from vargen.validation.folders import one_line
from vargen.validation.reading import read_text

Source = str | Path | Mapping[str, Tensor]

TITLE = "Janus in its authors' layout"
ROLES = ("<|User|>", "<|Assistant|>")  # of Janus-Pro; Janus-1.3B was trained with ("User", "Assistant")
TOKENIZER = "tokenizer.json"
TOKENIZER_BYTES = 64 << 20  # 100 k names and their merges take 5 to 10 MB
# names in the authors' vocabulary
NAMES = {
    "bos": "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "eos": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "pad": "<\uff5c\u2581pad\u2581\uff5c>",
    "begin_of_image": "<begin_of_image>",
    "end_of_image": "<end_of_image>",
    "image_placeholder": "<image_placeholder>",
}
NEEDED = ("bos", "pad", "begin_of_image")  # by guidance
# a picture to look at is a line of its own; ``user`` and ``assistant`` are set in front
CHAT = (
    "{% for m in messages %}{{ user if m['role'] in ('user', user) else assistant }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image_placeholder>\\n' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ '\\n\\n' if not loop.last }}{% endfor %}{% if add_generation_prompt %}{{ '\\n\\n' + assistant + ':' }}{% endif %}"
)


def load_janus(
    checkpoint: Source,
    *,
    config: Mapping[str, Any] | None = None,
    token_ids: Mapping[str, int] | None = None,
    **options: Any,
) -> Any:
    """Load Janus or Janus-Pro as its authors publish it into transformers' class.

    Args:
        checkpoint: a folder with ``config.json`` and the weights (shards with an index, or one file), one file, or a
            state dict.
        config: settings of ``JanusConfig`` that neither shapes nor ``config.json`` tell, such as
            ``{"text_config": {"num_attention_heads": 16}}``.
        token_ids: of ``bos``, ``pad`` and ``begin_of_image`` (also ``eos``, ``end_of_image``, ``image_placeholder``),
            where no ``tokenizer.json`` lies beside the weights.
        options: of ``from_pretrained``, such as ``dtype`` and ``device_map``.

    Returns:
        A ``JanusForConditionalGeneration``; its text head is not tied to the embedding.

    Raises:
        CheckpointError: keys or shapes that do not fit.
        ValueError: settings that nothing tells.
    """
    from transformers import JanusConfig, JanusForConditionalGeneration

    check_names(token_ids or {}, tuple(NAMES), "token_ids")
    state_dict = load_original(checkpoint)
    check_family(state_dict, "janus-original")
    beside = None if isinstance(checkpoint, Mapping) else checkpoint
    language = ({} if beside is None else read_config(beside)).get("language_config") or {}
    check_rope(language, "language_config")
    tokens = {**({} if beside is None else read_token_ids(beside)), **(token_ids or {})}
    settings = merged(infer_settings(state_dict, language), config)
    _check_settings(settings, tokens, beside)
    settings |= {"image_token_id": tokens["image_placeholder"]} if "image_placeholder" in tokens else {}
    model = build_renamed(
        JanusForConditionalGeneration,
        JanusConfig(**settings),
        state_dict,
        options,
        rename=to_transformers,
        restore=to_official,
        title=TITLE,
        ignore=IGNORED,
    )
    _set_generation(model, tokens)
    return model


def _check_settings(settings: Mapping[str, Any], tokens: Mapping[str, int], beside: str | Path | None) -> None:
    if settings["tie_word_embeddings"]:
        raise ValueError(
            "tie_word_embeddings must be False: Janus has a text head of its own, which would overwrite the embedding"
        )
    for part in ("text_config", "vision_config"):
        heads, width = settings[part]["num_attention_heads"], settings[part]["hidden_size"]
        if heads is None:
            raise ValueError(
                f"nothing tells the attention heads of a Janus of width {width} ({part}); put config.json beside the "
                f"weights, or give config={{'{part}': {{'num_attention_heads': ...}}}}"
            )
        if not isinstance(heads, int) or heads < 1 or width % heads:
            raise ValueError(f"{part}: num_attention_heads must divide the width {width}, got {heads}")
    missing = [name for name in NEEDED if name not in tokens]
    if missing:
        where = "the weights" if beside is None else beside
        raise ValueError(
            f"nothing tells the token ids of {', '.join(missing)}: no {TOKENIZER} beside {where}; copy it there, or give "
            "token_ids={'bos': ..., 'pad': ..., 'begin_of_image': ...}"
        )
    rows = settings["text_config"]["vocab_size"]
    for name, token in tokens.items():
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < rows:
            raise ValueError(
                f"the token id of {name} must be in 0..{rows - 1}, the rows of the embedding, got {token}"
            )


def _set_generation(model: Any, tokens: Mapping[str, int]) -> None:
    """Sample as the authors do; transformers itself would take the 50 likeliest codes."""
    stored = model.generation_config
    stored.update(bos_token_id=tokens["bos"], eos_token_id=tokens.get("eos"), pad_token_id=tokens["pad"])
    stored.update(do_sample=True, guidance_scale=5.0, temperature=1.0, top_k=0)
    stored.generation_kwargs = {"boi_token_id": tokens["begin_of_image"]}


# the vocabulary


def read_token_ids(path: str | Path) -> dict[str, int]:
    """Ids of the tokens that have a meaning, by name, from the ``tokenizer.json`` beside the weights; empty without one.

    Raises:
        ValueError: it cannot be read, or lacks one.
    """
    words = _read_tokenizer(path)
    if words is None:
        return {}
    found = {name: words.token_to_id(text) for name, text in NAMES.items()}
    missing = [NAMES[name] for name, token in found.items() if token is None]
    if missing:
        raise ValueError(f"{_folder(path) / TOKENIZER} lacks the tokens {', '.join(missing)}; is it that of Janus?")
    return {name: int(token) for name, token in found.items()}


def janus_processor(path: str | Path, model: Any, *, roles: Sequence[str] = ROLES) -> Any:
    """The processor of transformers over the ``tokenizer.json`` beside the weights; None where there is none.

    Args:
        path: the folder, or a file in it.
        model: from ``load_janus``.
        roles: of user and assistant in a chat, as the model was trained.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import JanusImageProcessor, JanusProcessor, PreTrainedTokenizerFast

    if len(roles) != 2 or not all(
        isinstance(role, str) and role.isprintable() and not set(role) & {"'", "\\"} for role in roles
    ):
        raise ValueError(f"roles must be two names, of user and assistant, such as {ROLES}, got {roles!r}")
    words = _read_tokenizer(path)
    if words is None:
        return None
    ids = read_token_ids(path)
    bos = NAMES["bos"]  # the authors' tokenizer class puts it in front, whatever the file says
    words.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ids["bos"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        **{f"{name}_token": NAMES[name] for name in ("bos", "eos", "pad")},
        padding_side="left",
        extra_special_tokens={
            "image_token": NAMES["image_placeholder"],
            "boi_token": NAMES["begin_of_image"],
            "eoi_token": NAMES["end_of_image"],
        },
    )
    vision = model.config.vision_config
    images = JanusImageProcessor(size={"height": vision.image_size, "width": vision.image_size})
    chat = "{{% set user = '{}' %}}{{% set assistant = '{}' %}}".format(*roles) + CHAT
    return JanusProcessor(images, tokenizer, chat_template=chat, num_image_tokens=vision.num_image_tokens)


def _folder(path: str | Path) -> Path:
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _read_tokenizer(path: str | Path) -> Any:
    from tokenizers import Tokenizer

    file = _folder(path) / TOKENIZER
    if not file.is_file():
        return None
    with one_line(file):
        return Tokenizer.from_str(read_text(file, limit=TOKENIZER_BYTES))
