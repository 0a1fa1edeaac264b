"""Checkpoints of the Chameleon family in other layouts than that of transformers.

Meta's own files (Chameleon-7B, ``GAIR/Anole-7b-v0.1``): another order of rotary channels and other names. Lumina-mGPT:
transformers' layout with the norms of queries and keys stored once a rank instead of once a head. The image tokenizer
comes as a file of its own (``vqgan.ckpt``): its encoder and codebook go into the model, its decoder is the adapter's
``vq_decoder``.

Letters: D width, H heads, d head width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vargen.adapters.families.building import build
from vargen.checkpoints.bounds import count_layers, read_shape
from vargen.checkpoints.reader import CheckpointError, load_original
from vargen.validation.folders import REFUSED_SETTINGS, read_settings

Source = str | Path | Mapping[str, Tensor]

OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
INNER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_normalization": "self_attn.q_norm",
    "attention.k_normalization": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
VOCABULARY_BYTES = 64 << 20  # of a tokenizer file; 65 k names and their merges take 5 MB
PLACEHOLDER = ("<reserved08707>", "<image>")  # the name of Meta's vocabulary, and that of transformers


def load_meta_chameleon(
    checkpoint: Source,
    vqgan: Source,
    vocabulary: str | Path | Mapping[str, int],
    *,
    config: Any = None,
    **options: Any,
) -> Any:
    """Load Meta's layout (``consolidated.pth`` of Chameleon-7B or Anole-7B) into transformers' class.

    Args:
        checkpoint: the language model, a file or a state dict.
        vqgan: the image tokenizer, ``vqgan.ckpt``; its decoder is left out here.
        vocabulary: ``text_tokenizer.json``, or names to ids.
        config: settings of ``ChameleonConfig`` that shapes do not tell, such as ``swin_norm`` or ``vq_config``.
        options: of ``from_pretrained``, such as ``dtype`` and ``device_map``.

    Returns:
        A ``ChameleonForConditionalGeneration``.

    Raises:
        CheckpointError: keys or shapes that do not fit.
    """
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    loaded = load_original(checkpoint)
    if "layers.0.attention.wq.weight" not in loaded or "layers.0.attention.q_normalization.weight" not in loaded:
        raise CheckpointError("expected Meta's layout of Chameleon (layers.0.attention.wq, q_normalization, ...)")
    head_dim = read_shape(loaded, "layers.0.attention.q_normalization.weight", 1)[0]
    rows, width = read_shape(loaded, "layers.0.attention.wq.weight", 2)
    sizes = {
        "vocab_size": read_shape(loaded, "tok_embeddings.weight", 2)[0],
        "hidden_size": width,
        "intermediate_size": read_shape(loaded, "layers.0.feed_forward.w1.weight", 2)[0],
        "num_hidden_layers": count_layers(loaded, "layers."),
        "num_attention_heads": rows // head_dim,
        "num_key_value_heads": read_shape(loaded, "layers.0.attention.wk.weight", 2)[0] // head_dim,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }
    names = _vocabulary(vocabulary)
    built = ChameleonConfig(**(sizes | {"vocabulary_map": names} | dict(config or {})))
    state = meta_to_transformers(loaded, head_dim)
    return build(ChameleonForConditionalGeneration, built, state | _image_tokenizer(vqgan), options)


def meta_to_transformers(loaded: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """Rename Meta's weights and sort the channels of each head: rotary pairs (2i, 2i + 1) become (i, i + d/2)."""
    state = {}
    for key, value in loaded.items():
        name, kind = key.rsplit(".", 1)
        if name == "rope":  # a table of frequencies
            continue
        inner = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if inner is None:
            target = OUTER.get(name)
        else:
            target = f"model.layers.{inner[1]}.{INNER[inner[2]]}" if inner[2] in INNER else None
        if target is None:
            raise CheckpointError(f"Meta's layout of Chameleon has no {key}")
        if target.endswith(("q_proj", "k_proj")):
            value = value.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        elif target.endswith(("q_norm", "k_norm")):
            projection = loaded[f"layers.{inner[1]}.attention.w{target[-6]}.weight"]  # type: ignore[index]
            heads = len(projection) // head_dim
            value = value.unflatten(0, (head_dim // 2, 2)).T.flatten().expand(heads, -1)
        state[f"{target}.{kind}"] = value.contiguous()
    return state


def load_lumina(folder: str | Path, vqgan: Source | None = None, **options: Any) -> Any:
    """Load a Lumina-mGPT snapshot into transformers' class.

    Args:
        folder: a local snapshot with ``config.json`` and the safetensors shards.
        vqgan: ``vqgan.ckpt``, needed where the snapshot holds no ``model.vqmodel.*``.
        options: of ``from_pretrained``, such as ``dtype`` and ``device_map``.

    Raises:
        ValueError: no ``config.json`` there.
        CheckpointError: keys or shapes that do not fit, or no image tokenizer.
    """
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no config.json; download the snapshot of Alpha-VLLM/Lumina-mGPT-7B-768 first"
        )
    stored = read_settings(path)
    for name in ("mask_image_logits", "dropout", "architectures", "model_type", *REFUSED_SETTINGS):
        stored.pop(name, None)
    config = ChameleonConfig(**stored)
    state: dict[str, Tensor] = {}
    for shard in sorted(Path(folder).glob("*.safetensors")):
        state |= load_original(shard)
    heads = {"q_norm": config.num_attention_heads, "k_norm": config.num_key_value_heads}
    for key, value in state.items():
        norm = key.split(".")[-2]
        if norm in heads and len(value) < heads[norm]:  # one row for each rank of the training
            state[key] = value.repeat_interleave(heads[norm] // len(value), dim=0)
    if vqgan is not None:
        state |= _image_tokenizer(vqgan)
    elif not any(key.startswith("model.vqmodel.") for key in state):
        raise CheckpointError(f"{folder} holds no image tokenizer (model.vqmodel.*); give vqgan='vqgan.ckpt'")
    return build(ChameleonForConditionalGeneration, config, state, options)


def _image_tokenizer(vqgan: Source) -> dict[str, Tensor]:
    parts = ("encoder.", "quant_conv.", "post_quant_conv.", "quantize.")
    loaded = load_original(vqgan)
    return {f"model.vqmodel.{key}": value for key, value in loaded.items() if key.startswith(parts)}


def _vocabulary(source: str | Path | Mapping[str, int]) -> dict[str, int]:
    if isinstance(source, Mapping):
        names = dict(source)
    else:
        names = read_settings(source, VOCABULARY_BYTES)["model"]["vocab"]
    old, new = PLACEHOLDER
    if new not in names and old in names:
        names[new] = names.pop(old)
    return names
