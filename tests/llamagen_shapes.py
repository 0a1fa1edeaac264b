"""What the official files of LlamaGen's transformers hold, listed by hand from the official code."""

from __future__ import annotations

# layers, heads, width, feed-forward width, parameters with 1000 classes, parameters with captions of width 2048
PUBLISHED = {
    "B": (12, 12, 768, 2048, 110_888_448, 112_282_368),
    "L": (24, 16, 1024, 2816, 342_910_976, 345_031_680),
    "XL": (36, 20, 1280, 3584, 774_699_520, 777_678_080),
    "XXL": (48, 24, 1536, 4096, 1_410_972_672, 1_414_940_160),
    "XXXL": (48, 40, 2560, 6912, 3_893_027_840, 3_902_261_760),
    "1B": (22, 32, 2048, 5632, 1_199_616_000, 1_205_954_560),
    "3B": (24, 32, 3200, 8704, 3_096_659_200, 3_110_249_600),
    "7B": (32, 32, 4096, 11008, 6_614_589_440, 6_635_655_168),
}


def official_shapes(size: str, condition_type: str, num_codes: int = 16384) -> dict[str, tuple[int, ...]]:
    """Keys and shapes for ``condition_type`` "class" or "caption"."""
    layers, _, dim, ffn_dim, *_ = PUBLISHED[size]
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (num_codes, dim),
        "norm.weight": (dim,),
        "output.weight": (num_codes, dim),
    }
    if condition_type == "class":
        shapes["cls_embedding.embedding_table.weight"] = (1001, dim)
    else:
        shapes["cls_embedding.uncond_embedding"] = (120, 2048)
        shapes["cls_embedding.cap_proj.fc1.weight"] = (dim, 2048)
        shapes["cls_embedding.cap_proj.fc2.weight"] = (dim, dim)
    for i in range(layers):
        shapes[f"layers.{i}.attention.wqkv.weight"] = (3 * dim, dim)
        shapes[f"layers.{i}.attention.wo.weight"] = (dim, dim)
        shapes[f"layers.{i}.feed_forward.w1.weight"] = (ffn_dim, dim)
        shapes[f"layers.{i}.feed_forward.w3.weight"] = (ffn_dim, dim)
        shapes[f"layers.{i}.feed_forward.w2.weight"] = (dim, ffn_dim)
        shapes[f"layers.{i}.attention_norm.weight"] = (dim,)
        shapes[f"layers.{i}.ffn_norm.weight"] = (dim,)
    return shapes
