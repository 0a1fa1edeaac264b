"""What official NAR, PAR and RandAR checkpoints contain, by size (arXiv:2503.10696, arXiv:2412.15119, arXiv:2412.01827)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vargen.checkpoints.bounds import read_shape
from vargen.checkpoints.manifests.base import Manifest

# size -> parameters, class-to-image and text-to-image (buffers left out)
NAR_PARAMETERS = {
    "B": (130_551_552, 131_945_472),
    "M": (295_453_696, 297_574_400),
    "L": (372_536_320, 374_657_024),
    "XL": (815_991_040, 818_969_600),
    "XXL": (1_464_454_656, 1_468_422_144),
}
NAR_VIDEO_PARAMETERS = {
    "abs-S": 37_800_192,
    "abs-B": 125_145_600,
    "abs-L": 368_736_256,
    "abs-LP": 693_588_480,
    "abs-XL": 815_500_800,
}
PAR_PARAMETERS = {  # (size, codes of a group)
    ("L", 4): 342_914_048,
    ("XL", 4): 774_703_360,
    ("XXL", 4): 1_410_977_280,
    ("3B", 4): 3_096_668_800,
    ("3B", 16): 3_096_707_200,
}
RANDAR_PARAMETERS = {"L": 342_912_000, "XL": 774_700_800}
_BUFFERS = ("cls_embedding.uncond_embedding",)
_OPTIONAL = ("freqs_cis", "*.kv_cache.*")
_GRID = (16, 16)  # shapes do not depend on it
_PUBLISHED = {"codebook_size": 16384, "num_classes": 1000, "caption_dim": 2048, "num_condition_tokens": 120}


def nar_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Keys and shapes of a NAR image transformer of the file's depth and width."""
    from vargen.backbones.nar.model import NARTransformer
    from vargen.backbones.nar.sizes import IMAGE_SIZES, infer_nar_config

    config = infer_nar_config(state_dict, {"grid_size": _GRID, **_any_heads(state_dict)})
    size = _named(IMAGE_SIZES, config, NAR_PARAMETERS)
    text = config["condition_type"] == "caption"
    return _manifest(NARTransformer, config, size, NAR_PARAMETERS[size][text] if size else None)


def nar_video_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Keys and shapes of a NAR video transformer of the file's depth and width."""
    from vargen.backbones.nar.model import NARTransformer
    from vargen.backbones.nar.sizes import VIDEO_DEFAULTS, VIDEO_SIZES, infer_nar_config

    slots = read_shape(state_dict, "abs_pe", 3)[1] - 1
    config = infer_nar_config(state_dict, {"grid_size": (1, 1, slots), **_any_heads(state_dict)})
    size = _named(VIDEO_SIZES, config, NAR_VIDEO_PARAMETERS)
    if size:
        config = {**config, **VIDEO_DEFAULTS}
    return _manifest(NARTransformer, config, size, NAR_VIDEO_PARAMETERS[size] if size else None, published={})


def par_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Keys and shapes of a PAR transformer of the file's depth, width and group size."""
    from vargen.backbones.llamagen.sizes import SIZES, infer_config
    from vargen.backbones.par.model import PARTransformer

    group = read_shape(state_dict, "spe_tok_embeddings.special_embeddings.weight", 2)[0] + 1
    given = {"grid_size": (8 * group, 8 * group), "group_size": group, **_any_heads(state_dict)}
    config = infer_config(state_dict, given)
    config.pop("num_kv_heads")
    size = _named(SIZES, config, {name: 0 for name, size in PAR_PARAMETERS if size == group})
    return _manifest(PARTransformer, config, size, PAR_PARAMETERS[size, group] if size else None)


def randar_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Keys and shapes of a RandAR transformer of the file's depth and width."""
    from vargen.backbones.llamagen.any_order import AnyOrderTransformer
    from vargen.backbones.llamagen.sizes import SIZES, infer_config

    config = infer_config(state_dict, {"grid_size": _GRID, **_any_heads(state_dict)})
    size = _named(SIZES, config, RANDAR_PARAMETERS)
    return _manifest(AnyOrderTransformer, config, size, RANDAR_PARAMETERS[size] if size else None)


def _any_heads(state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """A number of heads that fits the width: it changes no shape."""
    return {"num_heads": max(1, read_shape(state_dict, "tok_embeddings.weight", 2)[1] // 4)}


def _named(
    sizes: Mapping[str, tuple[int, int, int]], config: Mapping[str, Any], counts: Mapping[Any, Any]
) -> str | None:
    found = (
        name for name, (layers, _, dim) in sizes.items() if (layers, dim) == (config["num_layers"], config["dim"])
    )
    return next((name for name in found if name in counts), None)


def _manifest(
    kind: Any, config: dict[str, Any], size: str | None, count: int | None, published: Mapping[str, Any] = _PUBLISHED
) -> Manifest:
    if size is not None:
        config = {**config, **published}
        config.pop("ffn_dim", None)  # the published one, whatever the file holds
    with torch.device("meta"):
        model = kind(**config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return Manifest(shapes, size, count, _BUFFERS, _OPTIONAL)
