"""Janus and Janus-Pro in the layout of their authors (``MultiModalityCausalLM``): names, and the sizes that shapes tell.

Nothing is permuted; the three projections of SigLIP's attention lie in one matrix.

Letters: D width of the language model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vargen.checkpoints.bounds import count_layers, read_shape
from vargen.checkpoints.reader import CheckpointError
from vargen.tokenizers.vq.checkpoints import infer_config

STATISTIC = "gen_vision_model.quantize.codebook_used"  # codes that were used last in training
IGNORED = (STATISTIC, "vision_model.vision_tower.attn_pool.*")  # read by nothing
VISION, VQ = "vision_model.vision_tower.", "gen_vision_model."
# (authors, transformers); what begins a name
PARTS = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("gen_embed.", "model.generation_embeddings."),
    ("gen_head.output_mlp_projector.", "model.generation_head.proj_out."),
    ("gen_head.vision_head.", "model.generation_head.vision_head."),
    ("gen_aligner.", "model.generation_aligner."),
    (VQ, "model.vqmodel."),
    ("aligner.", "model.aligner."),
    (VISION, "model.vision_model."),
)
# names inside the vision tower
_TOWER = (
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("pos_embed", "embeddings.position_embedding.weight"),
    ("norm.", "post_layernorm."),
    ("blocks.", "encoder.layers."),
)
_BLOCK = (("norm1.", "layer_norm1."), ("norm2.", "layer_norm2."), ("attn.proj.", "self_attn.projection_layer."))
_MIDDLE = ("block_1", "attn_1", "block_2")
_QKV = ("q_proj", "k_proj", "v_proj")
# authors' width, layers -> heads, feed-forward width
SIZES = {
    "1.3B": (2048, 24, 16, 5632),  # Janus-1.3B and Janus-Pro-1B
    "7B": (4096, 30, 32, 11008),  # Janus-Pro-7B
}
SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16}  # of the published towers, by width


def to_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' weights to those of ``JanusForConditionalGeneration``."""
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = _renamed(key, 0)
        if name.endswith("position_embedding.weight"):
            renamed[name] = value.squeeze(0)
        elif ".attn.qkv." in name:
            parts = zip(_QKV, value.chunk(3), strict=True)
            renamed |= {name.replace("attn.qkv", f"self_attn.{part}"): rows for part, rows in parts}
        else:
            renamed[name] = value
    return renamed


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``to_transformers``."""
    restored: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if key.startswith("model.vision_model.") and ".self_attn.q_proj." in key:
            rows = [state_dict[key.replace("q_proj", part)] for part in _QKV]
            restored[_renamed(key.replace("self_attn.q_proj", "attn.qkv"), 1)] = torch.cat(rows)
        elif key.startswith("model.vision_model.") and re.search(r"\.self_attn\.[kv]_proj\.", key):
            continue
        else:
            name = _renamed(key, 1)
            restored[name] = value[None] if name.endswith("pos_embed") else value
    return restored


def _renamed(key: str, source: int) -> str:
    """A name of one layout (0: the authors', 1: transformers') in the other."""
    target = 1 - source
    part = next((pair for pair in PARTS if key.startswith(pair[source])), None)
    if part is None:
        raise CheckpointError(f"the layout of Janus has no {key}")
    inner = key.removeprefix(part[source])
    if part[0] == VISION:
        inner = _tower(inner, source)
    elif part[0] == VQ:
        inner = _image_tokenizer(inner, source)
    elif part[0].endswith("aligner."):
        inner = _aligner(inner, source)
    return part[target] + inner


def _tower(inner: str, source: int) -> str:
    pair = next((pair for pair in _TOWER if inner.startswith(pair[source])), None)
    inner = inner if pair is None else pair[1 - source] + inner.removeprefix(pair[source])
    layer = re.fullmatch(r"((?:blocks|encoder\.layers)\.\d+\.)(.+)", inner)
    block = layer and next((pair for pair in _BLOCK if layer[2].startswith(pair[source])), None)
    return inner if not (layer and block) else layer[1] + block[1 - source] + layer[2].removeprefix(block[source])


def _aligner(inner: str, source: int) -> str:
    """Linear layers at even places of a sequence, or the first one and a list of the others."""
    if source == 0:
        found = re.fullmatch(r"layers\.(\d*[02468])\.(.+)", inner)
        if found is None:
            return inner
        return f"fc1.{found[2]}" if found[1] == "0" else f"hidden_layers.{int(found[1]) // 2 - 1}.{found[2]}"
    inner = re.sub(r"^fc1\.", "layers.0.", inner)
    return re.sub(r"^hidden_layers\.(\d+)\.", lambda m: f"layers.{2 * int(m[1]) + 2}.", inner)


def _image_tokenizer(inner: str, source: int) -> str:
    """LlamaGen's names, or taming's with LlamaGen's order of the levels."""
    if source == 0:
        inner = re.sub(r"^(encoder|decoder)\.mid\.([012])\.", lambda m: f"{m[1]}.mid.{_MIDDLE[int(m[2])]}.", inner)
        inner = re.sub(r"^(encoder|decoder)\.conv_blocks\.", lambda m: f"{m[1]}.{_levels(m[1])}.", inner)
        return re.sub(r"^(\w+\.(?:down|up)\.\d+)\.res\.", r"\1.block.", inner)
    inner = re.sub(r"\.mid\.(block_1|attn_1|block_2)\.", lambda m: f".mid.{_MIDDLE.index(m[1])}.", inner)
    inner = re.sub(r"^(encoder\.down|decoder\.up)\.", lambda m: f"{m[1].split('.')[0]}.conv_blocks.", inner)
    return re.sub(r"^(\w+\.conv_blocks\.\d+)\.block\.", r"\1.res.", inner)


def _levels(side: str) -> str:
    return "down" if side == "encoder" else "up"


def infer_settings(state_dict: Mapping[str, Tensor], language: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of ``JanusConfig``: sizes from the shapes, the rest from the authors' config, else as published.

    Args:
        state_dict: in the authors' layout.
        language: ``language_config`` of the authors' ``config.json``; it leaves out what is Llama's default.

    Raises:
        CheckpointError: a tensor that tells a size is missing or of another rank.
    """
    vocabulary, width = read_shape(state_dict, "language_model.model.embed_tokens.weight", 2)
    layers = count_layers(state_dict, "language_model.model.layers.")
    published = next((size[2] for size in SIZES.values() if size[:2] == (width, layers)), None)
    heads = language.get("num_attention_heads", published or (32 if language else None))
    text = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": read_shape(state_dict, "language_model.model.layers.0.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": language.get("num_key_value_heads", heads),
        "max_position_embeddings": language.get("max_position_embeddings", 16384),
        "rms_norm_eps": language.get("rms_norm_eps", 1e-6),
        "rope_parameters": {"rope_type": "default", "rope_theta": language.get("rope_theta", 10000.0)},
        "tie_word_embeddings": False,
    }
    return {
        "text_config": text,
        "vision_config": _vision_settings(state_dict, width),
        "vq_config": _vq_settings(state_dict, width),
        # transformers would tie the text head to the embedding and overwrite it: other images, and no error
        "tie_word_embeddings": False,
    }


def _vision_settings(state_dict: Mapping[str, Tensor], width: int) -> dict[str, Any]:
    own, channels, patch, _ = read_shape(state_dict, f"{VISION}patch_embed.proj.weight", 4)
    patches = read_shape(state_dict, f"{VISION}pos_embed", 3)[1]
    side = round(patches**0.5)
    return {
        "hidden_size": own,
        "num_hidden_layers": count_layers(state_dict, f"{VISION}blocks."),
        "num_attention_heads": SIGLIP_HEADS.get(own),
        "num_channels": channels,
        "image_size": side * patch,
        "patch_size": patch,
        "mlp_ratio": read_shape(state_dict, f"{VISION}blocks.0.mlp.fc1.weight", 2)[0] / own,
        "layer_norm_eps": 1e-6,
        "projection_dim": width,
        "depth": _depth(state_dict, "aligner."),
        "num_image_tokens": patches,
    }


def _vq_settings(state_dict: Mapping[str, Tensor], width: int) -> dict[str, Any]:
    sizes = infer_config({key.removeprefix(VQ): value for key, value in state_dict.items() if key.startswith(VQ)})
    return {
        "embed_dim": sizes["codebook_dim"],
        "num_embeddings": sizes["codebook_size"],
        "latent_channels": sizes["z_channels"],
        "in_channels": sizes["in_channels"],
        "base_channels": sizes["base_channels"],
        "channel_multiplier": sizes["channel_multipliers"],
        "num_res_blocks": sizes["num_res_blocks"],
        "projection_dim": width,
        "image_token_embed_dim": width,
        "num_hidden_layers": _depth(state_dict, "gen_aligner."),
    }


def _depth(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """Linear layers of an aligner: GELUs between them are numbered too."""
    return len([key for key in state_dict if re.fullmatch(re.escape(prefix) + r"layers\.\d+\.weight", key)])
