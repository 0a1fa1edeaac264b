"""Emu3 in the layout of its authors: names and sizes of the language model and of the vision tokenizer.

The language model is a Llama whose names lack one part; the tokenizer, a repository of its own, differs in how norms and
attention are called and stores linear layers as convolutions of one pixel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vargen.checkpoints.bounds import count_layers, read_shape
from vargen.checkpoints.reader import CheckpointError

VQ = "model.vqmodel."
SIZES = {"8B": (4096, 32, 32, 8)}  # width, layers, heads, heads of keys: Stage1, Chat and Gen
VOCABULARY, CODES = 184_622, 32_768  # rows of the published embedding; its last ones are the codes
# names in the vocabulary -> (field of the authors' config.json, published id)
TOKENS = {
    "<|endoftext|>": ("pad_token_id", 151643),
    "<|extra_200|>": ("eol_token_id", 151846),
    "<|extra_201|>": ("eof_token_id", 151847),
    "<|extra_203|>": ("bos_token_id", 151849),
    "<|extra_204|>": ("eos_token_id", 151850),
    "<|image token|>": ("img_token_id", 151851),
    "<|image start|>": ("boi_token_id", 151852),
    "<|image end|>": ("eoi_token_id", 151853),
}
TEXT_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")  # those that transformers' text model knows
CODE = "<|visual token {:06d}|>"
_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(.+)")
_RENAMED = {"encoder.down": "encoder.down_block.down", "decoder.up": "decoder.up_block.up"}
_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj_out": "out_proj"}


# the language model


def to_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' language model to the names of ``Emu3ForConditionalGeneration``."""
    return {_language(key, "model.", "model.text_model."): value for key, value in state_dict.items()}


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``to_transformers``; the vision tokenizer is left out."""
    own = {key: value for key, value in state_dict.items() if not key.startswith(VQ)}
    return {_language(key, "model.text_model.", "model."): value for key, value in own.items()}


def _language(key: str, source: str, target: str) -> str:
    if key.startswith(source):
        return target + key.removeprefix(source)
    if key.startswith("lm_head."):
        return key
    raise CheckpointError(f"the layout of Emu3 has no {key}")


def infer_settings(state_dict: Mapping[str, Tensor], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of ``Emu3TextConfig``: sizes from the shapes, the rest from the authors' config, else as published.

    Args:
        state_dict: in the authors' layout.
        stored: their ``config.json``.

    Raises:
        CheckpointError: a tensor that tells a size is missing or of another rank.
    """
    vocabulary, width = read_shape(state_dict, "model.embed_tokens.weight", 2)
    layers = count_layers(state_dict, "model.layers.")
    published = next((size[2:] for size in SIZES.values() if size[:2] == (width, layers)), (None, None))
    heads = stored.get("num_attention_heads", published[0])
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": read_shape(state_dict, "model.layers.0.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": stored.get("num_key_value_heads", published[1] or heads),
        "max_position_embeddings": stored.get("max_position_embeddings", 9216),
        "rms_norm_eps": stored.get("rms_norm_eps", 1e-5),
        "rope_parameters": {"rope_type": "default", "rope_theta": stored.get("rope_theta", 1e6)},
        "attention_dropout": stored.get("attention_dropout", 0.1),
        "tie_word_embeddings": False,
        **{name: stored.get(name, TOKENS[text][1]) for text, (name, _) in TOKENS.items() if name in TEXT_TOKENS},
    }


def vocabulary_map(stored: Mapping[str, Any], rows: int, codes: int) -> dict[str, int]:
    """Names to ids of everything that an image needs: structural tokens by the config, codes as the last rows.

    Args:
        stored: the authors' ``config.json``.
        rows: of the embedding.
        codes: of the vision tokenizer.

    Raises:
        ValueError: ids that are no rows of the embedding, or lie among the codes.
    """
    first = rows - codes
    names = {text: stored.get(field, published) for text, (field, published) in TOKENS.items()}
    for text, token in names.items():
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < first:
            field = TOKENS[text][0]
            raise ValueError(
                f"{field} must be in 0..{first - 1}, before the {codes} codes, got {token!r}; see config.json"
            )
    return names | {CODE.format(code): first + code for code in range(codes)}


# the vision tokenizer


def vq_to_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' vision tokenizer to the names of ``Emu3VQVAE``."""
    renamed = {}
    for key, value in state_dict.items():
        level, middle = _LEVEL.fullmatch(key), re.fullmatch(r"(encoder|decoder)\.mid\.(.+)", key)
        if level:
            inner = re.sub(r"^attn\.(\d+)\.norm\.", r"attn_norms.\1.", level[3])
            name = f"{_RENAMED[level[1]]}.{level[2]}.{inner}"
        elif middle:
            name = f"{middle[1]}.middle_block." + re.sub(r"^attn_1\.norm\.", "attn_norm.", middle[2])
        else:
            name = key
        if linear := re.fullmatch(r"(.+\.(?:attn\.\d+|attn_1)\.)(q|k|v|proj_out)\.(\w+)", name):
            name = f"{linear[1]}{_ATTENTION[linear[2]]}.{linear[3]}"
            value = value.flatten(1) if value.ndim == 4 and value.shape[2:] == (1, 1) else value
        renamed[name] = value
    return renamed


def vq_to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``vq_to_transformers``."""
    short = {long: name for name, long in _ATTENTION.items()}
    restored = {}
    for key, value in state_dict.items():
        name = re.sub(r"^(encoder\.down|decoder\.up)_block\.(?:down|up)\.", r"\1.", key)
        name = re.sub(r"\.attn_norms\.(\d+)\.", r".attn.\1.norm.", name)
        name = re.sub(r"\.middle_block\.", ".mid.", name).replace(".mid.attn_norm.", ".mid.attn_1.norm.")
        if linear := re.fullmatch(r"(.+\.)(q_proj|k_proj|v_proj|out_proj)\.(\w+)", name):
            name = f"{linear[1]}{short[linear[2]]}.{linear[3]}"
            value = value[..., None, None] if value.ndim == 2 else value
        restored[name] = value
    return restored


def infer_vq_settings(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of ``Emu3VQVAEConfig`` from the shapes of the authors' vision tokenizer.

    Raises:
        CheckpointError: a tensor that tells a size is missing, or widths are not multiples of the first one.
    """
    levels = count_layers(state_dict, "encoder.down.")
    base, channels = read_shape(state_dict, "encoder.conv_in.weight", 4)[:2]
    widths = [read_shape(state_dict, f"encoder.down.{i}.block.0.conv2.weight", 4)[0] for i in range(levels)]
    if any(width % base for width in widths):
        raise CheckpointError(f"encoder widths {widths} are not multiples of the first convolution's {base} channels")
    codes, dim = read_shape(state_dict, "quantize.embedding.weight", 2)
    halvings = count_layers(state_dict, "encoder.time_conv.", most=8)
    return {
        "codebook_size": codes,
        "embed_dim": dim,
        "latent_channels": read_shape(state_dict, "encoder.conv_out.weight", 4)[0],
        "in_channels": channels,
        "out_channels": read_shape(state_dict, "decoder.conv_out.weight", 4)[0],
        "temporal_downsample_factor": 2**halvings,
        "base_channels": base,
        "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": count_layers(state_dict, "encoder.down.0.block."),
        "attn_resolutions": [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state_dict],
        "hidden_size": widths[-1],
        "num_attention_heads": 1,  # transformers' class would take more, the authors' has one
        "double_latent": False,
    }
