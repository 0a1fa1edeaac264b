"""What official files of models that transformers runs contain: keys and shapes of its classes, under the authors' names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vargen.checkpoints.bounds import read_shape
from vargen.checkpoints.manifests.base import Manifest, Shape
from vargen.checkpoints.manifests.published import PARAMETERS

_STATISTICS = ("*.running_mean", "*.running_var", "*.num_batches_tracked")


def _shapes(kind: Any, config: Any, restore: Any) -> dict[str, Shape]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in restore(kind(config).state_dict()).items()}


def _heads(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, int]:
    """Heads that give the rows of queries and keys; how many there are really changes no shape."""
    queries, keys = (read_shape(state_dict, f"{prefix}layers.0.self_attn.{n}_proj.weight", 2)[0] for n in "qk")
    width = math.gcd(queries, keys)
    return {"num_attention_heads": queries // width, "num_key_value_heads": keys // width}


def janus_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Janus and Janus-Pro."""
    from transformers import JanusConfig, JanusForConditionalGeneration

    from vargen.adapters.families.janus_layout import SIZES, STATISTIC, infer_settings, to_official

    settings = infer_settings(state_dict, {})
    text, vision = settings["text_config"], settings["vision_config"]
    found = (text["hidden_size"], text["num_hidden_layers"])
    size = next((name for name, sizes in SIZES.items() if sizes[:2] == found), None)
    text |= _heads(state_dict, "language_model.model.")
    vision["num_attention_heads"] = 1  # changes no shape
    shapes = _shapes(JanusForConditionalGeneration, JanusConfig(**settings), to_official)
    count = PARAMETERS["janus-original"][size] if size else None
    pool = _pooling(vision["hidden_size"], int(vision["hidden_size"] * vision["mlp_ratio"]))
    if pool.keys() & state_dict.keys():
        shapes |= pool
    elif count is not None:  # the published count has them
        count -= sum(map(math.prod, pool.values()))
    return Manifest(shapes, size and f"Janus {size}", count, optional=(STATISTIC,))


def _pooling(width: int, hidden: int) -> dict[str, Shape]:
    """The head of SigLIP, which the authors store and never run."""
    rows = {"q": (width, width), "kv": (2 * width, width), "proj": (width, width)}
    rows |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    shapes: dict[str, Shape] = {"latent": (1, 1, width), "norm.weight": (width,), "norm.bias": (width,)}
    for name, shape in rows.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {f"vision_model.vision_tower.attn_pool.{name}": shape for name, shape in shapes.items()}


def emu3_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """The language model of Emu3."""
    from transformers import Emu3ForCausalLM, Emu3TextConfig

    from vargen.adapters.families.emu3_layout import SIZES, TEXT_TOKENS, VOCABULARY, infer_settings

    settings = infer_settings(state_dict, {})
    found = (settings["hidden_size"], settings["num_hidden_layers"])
    size = next((name for name, sizes in SIZES.items() if sizes[:2] == found), None)
    size = size if settings["vocab_size"] == VOCABULARY else None
    settings |= dict.fromkeys(TEXT_TOKENS, 0)  # ids may lie behind the rows of another vocabulary
    settings |= {} if size else _heads(state_dict, "model.")
    shapes = _shapes(Emu3ForCausalLM, Emu3TextConfig(**settings), dict)
    return Manifest(shapes, size and f"Emu3 {size}", PARAMETERS["emu3-original"][size] if size else None)


def emu3_vq_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Emu3's vision tokenizer."""
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    from vargen.adapters.families.emu3_layout import infer_vq_settings, vq_to_official

    settings = infer_vq_settings(state_dict)
    shapes = _shapes(Emu3VQVAE, Emu3VQVAEConfig(**settings), vq_to_official)
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}
    default = Emu3VQVAEConfig()
    published = all(_plain(getattr(default, name)) == _plain(value) for name, value in settings.items())
    size = "Emu3-VisionTokenizer" if published else None
    count = PARAMETERS["emu3-vision-tokenizer"][size] if size else None
    return Manifest(shapes, size, count, _STATISTICS[:2], _STATISTICS[2:])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
