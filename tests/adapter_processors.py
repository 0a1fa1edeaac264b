"""Processors of transformers over word-level tokenizers that fit the tiny models of tests/golden/hf; nothing is downloaded."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.adapter_cases import HF

WORDS = ["a", "red", "fox", "golden", "castle", "on", "the", "mountain", "lowres,", "You", "USER:", "ASSISTANT:"]


def _tokenizer(vocabulary: dict[str, int], special: dict[str, str], *, bos: bool = False, **names: str) -> Any:
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=names["unk_token"]))
    isolated = pre_tokenizers.Split(Regex(r"[0-9*]"), "isolated")
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), isolated])
    if bos:
        token = names["bos_token"]
        words.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", special_tokens=[(token, vocabulary[token])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        padding_side="left",
        extra_special_tokens=special,
        additional_special_tokens=[],
        **names,
    )


def _vocabulary(name: str, plain: str = "t") -> dict[str, int]:
    """The model's own names, the unnamed ones (t9, t10, ...) replaced by words, digits and signs."""
    vocabulary = json.loads((HF / name / "config.json").read_text())["vocabulary_map"]
    free = iter(sorted((i, key) for key, i in vocabulary.items() if key[0] == plain and key[1:].isdigit()))
    wanted = ["<unk>", *"0123456789*", *WORDS]
    for word in wanted:
        if word not in vocabulary:
            i, key = next(free)
            del vocabulary[key]
            vocabulary[word] = i
    return vocabulary


def emu3_processor() -> Any:
    from transformers import Emu3ImageProcessor, Emu3Processor

    special = {
        "image_token": "<image>",
        "boi_token": "<|image start|>",
        "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
    }
    names = {"bos_token": "<|extra_203|>", "eos_token": "<|extra_204|>", "pad_token": "<|endoftext|>"}
    tokenizer = _tokenizer(_vocabulary("emu3"), special, unk_token="<unk>", **names)
    return Emu3Processor(Emu3ImageProcessor(), tokenizer)


def chameleon_processor() -> Any:
    from transformers import ChameleonImageProcessor, ChameleonProcessor

    special = {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"}
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "sep_token": "<reserved08706>"}
    tokenizer = _tokenizer(_vocabulary("chameleon"), special, bos=True, unk_token="<unk>", **names)
    images = ChameleonImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return ChameleonProcessor(images, tokenizer, image_seq_length=16)


def glm_image_processor() -> Any:
    from transformers import GlmImageImageProcessor, GlmImageProcessor

    names = ["<unk>", "<g>", "</g>", "<user>", *"0123456789", *WORDS]
    vocabulary = {f"code{i}": i for i in range(64)} | {"<s>": 64, "</s>": 65}
    vocabulary |= {name: 100 + i for i, name in enumerate(names)} | {"<pad>": 154, "<image>": 155}
    special = {"image_token": "<image>", "grid_bos_token": "<g>", "grid_eos_token": "</g>"}
    tokenizer = _tokenizer(
        vocabulary, special, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    chat = "{% for m in messages %}<user> {% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    return GlmImageProcessor(GlmImageImageProcessor(), tokenizer, chat_template=chat)
