"""A tiny random Janus with a working processor: try every call, and every notebook cell, without a download.

It draws 4 x 4 codes and paints noise; its distribution is peaked enough that samplers and guidance can be told apart.
"""

from __future__ import annotations

from typing import Any

import torch

SPECIAL = ["<pad>", "<s>", "</s>", "<begin_of_image>", "<end_of_image>", "<image_placeholder>", "<unk>"]
WORDS = [
    "a",
    "an",
    "the",
    "of",
    "on",
    "with",
    "red",
    "green",
    "blue",
    "golden",
    "small",
    "large",
    "fox",
    "elf",
    "cloak",
    "sword",
    "forest",
    "mountain",
    "river",
    "castle",
]
CHAT = "{% for m in messages %}User: {% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %} Assistant:"


def tiny_janus(seed: int = 0) -> tuple[Any, Any]:
    """Build ``(model, processor)``: about 350 thousand random weights, a word-level tokenizer of some thirty words."""
    from transformers import JanusConfig, JanusForConditionalGeneration

    processor = _processor()
    vocab = len(processor.tokenizer)
    text: dict[str, Any] = {"model_type": "llama", "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 64}
    text |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    vision |= {"projection_dim": 32, "mlp_ratio": 2.0, "num_image_tokens": 16, "depth": 2}
    vq: dict[str, Any] = {
        "embed_dim": 8,
        "num_embeddings": 64,
        "latent_channels": 32,
        "base_channels": 32,
        "num_hidden_layers": 2,
    }
    vq |= {"channel_multiplier": [1, 1, 1], "num_res_blocks": 1, "projection_dim": 32, "image_token_embed_dim": 32}
    vq["num_patches"] = 4
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=5)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration(config).eval()
        _sharpen(model)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0, guidance_scale=5.0)
    model.generation_config.generation_kwargs = {"boi_token_id": 3}
    return model, processor


@torch.no_grad()
def _sharpen(model: Any) -> None:
    """Weights scaled by fan-in: the default initialisation makes all logits nearly equal."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "norm" not in name:
            weight.normal_(std=1.2 / weight[0].numel() ** 0.5)
        elif name.endswith("bias"):
            weight.zero_()
    for table in (
        model.get_input_embeddings(),
        model.model.generation_embeddings,
        model.model.vqmodel.quantize.embedding,
    ):
        table.weight.normal_()


def _processor() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import JanusImageProcessor, JanusProcessor, PreTrainedTokenizerFast

    names = [*SPECIAL, "User:", "Assistant:", *WORDS]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )
    return JanusProcessor(JanusImageProcessor(), tokenizer, chat_template=CHAT, num_image_tokens=16)
