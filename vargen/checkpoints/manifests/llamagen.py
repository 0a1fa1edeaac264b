"""Contents of LlamaGen transformers and tokenizers and of taming's VQGANs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vargen.checkpoints.bounds import count_layers, read_shape
from vargen.checkpoints.manifests.base import Manifest, Shape

# name -> (layers, heads, width, hidden width of the feed-forward, parameters c2i, parameters t2i); llamagen table 1
LLAMAGEN_SIZES: dict[str, tuple[int, int, int, int, int, int]] = {
    "GPT-B": (12, 12, 768, 2048, 110_888_448, 112_282_368),
    "GPT-L": (24, 16, 1024, 2816, 342_910_976, 345_031_680),
    "GPT-XL": (36, 20, 1280, 3584, 774_699_520, 777_678_080),
    "GPT-XXL": (48, 24, 1536, 4096, 1_410_972_672, 1_414_940_160),
    "GPT-XXXL": (48, 40, 2560, 6912, 3_893_027_840, 3_902_261_760),
    "GPT-1B": (22, 32, 2048, 5632, 1_199_616_000, 1_205_954_560),
    "GPT-3B": (24, 32, 3200, 8704, 3_096_659_200, 3_110_249_600),
    "GPT-7B": (32, 32, 4096, 11008, 6_614_589_440, 6_635_655_168),
}
LLAMAGEN_VOCABULARY, LLAMAGEN_CLASSES, LLAMAGEN_CAPTION = 16384, 1001, (120, 2048)
VQ_PARAMETERS = {"VQ-16": 71_883_403, "VQ-8": 70_109_835}


def llamagen_shapes(
    num_layers: int, width: int, hidden: int, vocabulary: int, condition: tuple[int] | tuple[int, int]
) -> dict[str, Shape]:
    """List keys and shapes of a LlamaGen transformer.

    Args:
        num_layers: blocks.
        width: model dimension D.
        hidden: width of the feed-forward.
        vocabulary: V.
        condition: ``(rows of the class table,)`` for class-to-image, ``(caption length, caption width)`` for text.
    """
    shapes: dict[str, Shape] = {
        "tok_embeddings.weight": (vocabulary, width),
        "norm.weight": (width,),
        "output.weight": (vocabulary, width),
    }
    if len(condition) == 1:
        shapes["cls_embedding.embedding_table.weight"] = (condition[0], width)
    else:
        shapes["cls_embedding.uncond_embedding"] = condition
        shapes["cls_embedding.cap_proj.fc1.weight"] = (width, condition[1])
        shapes["cls_embedding.cap_proj.fc2.weight"] = (width, width)
    for i in range(num_layers):
        layer = f"layers.{i}."
        shapes[layer + "attention.wqkv.weight"] = (3 * width, width)
        shapes[layer + "attention.wo.weight"] = (width, width)
        shapes[layer + "feed_forward.w1.weight"] = shapes[layer + "feed_forward.w3.weight"] = (hidden, width)
        shapes[layer + "feed_forward.w2.weight"] = (width, hidden)
        shapes[layer + "attention_norm.weight"] = shapes[layer + "ffn_norm.weight"] = (width,)
    return shapes


def llamagen_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """LlamaGen transformers; sizes that were never published are inferred from shapes."""
    num_layers = count_layers(state_dict, "layers.")
    vocabulary, width = read_shape(state_dict, "tok_embeddings.weight", 2)
    text = any(k.startswith("cls_embedding.cap_proj.") for k in state_dict)
    size = next((n for n, (depth, _, d, *_) in LLAMAGEN_SIZES.items() if (depth, d) == (num_layers, width)), None)
    buffers = ("cls_embedding.uncond_embedding",)
    optional = ("freqs_cis", "*.kv_cache.*")
    if size is not None:
        hidden, *counts = LLAMAGEN_SIZES[size][3:]
        condition = LLAMAGEN_CAPTION if text else (LLAMAGEN_CLASSES,)
        shapes = llamagen_shapes(num_layers, width, hidden, LLAMAGEN_VOCABULARY, condition)
        return Manifest(shapes, size, counts[text], buffers, optional)
    hidden = read_shape(state_dict, "layers.0.feed_forward.w1.weight", 2)[0]
    key = "cls_embedding.uncond_embedding" if text else "cls_embedding.embedding_table.weight"
    rows, columns = read_shape(state_dict, key, 2)
    condition = (rows, columns) if text else (rows,)
    shapes = llamagen_shapes(num_layers, width, hidden, vocabulary, condition)
    return Manifest(shapes, None, None, buffers, optional)


def vq_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """LlamaGen tokenizers."""
    from vargen.tokenizers.vq.checkpoints import IGNORED, infer_config
    from vargen.tokenizers.vq.model import SIZES

    config = infer_config(state_dict)
    named = (n for n, c in SIZES.items() if c["channel_multipliers"] == config["channel_multipliers"])
    size = next(named, None) if config["base_channels"] == 128 else None  # 128: the width of every published size
    shapes = _vq_shapes(SIZES[size] if size else config)
    return Manifest(shapes, size, VQ_PARAMETERS.get(size or ""), optional=IGNORED)


def taming_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """VQGANs in the layout of taming-transformers; what trained them is ignored."""
    from vargen.tokenizers.vq.checkpoints import infer_config, llamagen_to_taming, taming_to_llamagen

    config = infer_config(taming_to_llamagen(state_dict))
    shapes = _vq_shapes(config)
    return Manifest(llamagen_to_taming(shapes), optional=("loss.*",))


def _vq_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    import torch

    from vargen.tokenizers.vq.model import VQTokenizer

    with torch.device("meta"):  # one norm group: changes no shape and fits every width
        model = VQTokenizer(**{**config, "norm_num_groups": 1})
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}
