"""What official VAR checkpoints contain, by size (Tian et al., 2024, arXiv:2404.02905)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vargen.checkpoints.bounds import CheckpointError, read_shape
from vargen.checkpoints.manifests.base import Manifest, Shape

# size -> parameters, buffers left out; d12 was never released
VAR_PARAMETERS = {
    "d12": 133_186_960,
    "d16": 310_283_520,
    "d20": 600_917_136,
    "d24": 1_033_399_360,
    "d30": 2_010_020_356,
    "d36": 2_353_893_904,
}
MAX_SCALES = 64  # as ``check_scales`` allows
VAE_NAME, VAE_CHANNELS, VAE_PARAMETERS = "vae_ch160v4096z32", 160, 108_948_355


def var_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Keys and shapes of a VAR transformer of the file's depth and width."""
    from vargen.backbones.var.model import VARTransformer
    from vargen.backbones.var.sizes import BUFFERS, infer_var_config, var_size_config

    config = infer_var_config(state_dict, {})
    size = f"d{config['num_layers']}"
    published = size in VAR_PARAMETERS and config["dim"] == var_size_config(size)["dim"]
    with torch.device("meta"):
        model = VARTransformer.from_size(size) if published else VARTransformer(**config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return Manifest(shapes, size if published else None, VAR_PARAMETERS[size] if published else None, BUFFERS, BUFFERS)


def var_tokenizer_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Keys and shapes of a multi-scale tokenizer in the official layout."""
    from vargen.tokenizers.multiscale_vq.checkpoints import HITS, infer_multiscale_config, to_native, to_official
    from vargen.tokenizers.multiscale_vq.model import MultiScaleVQTokenizer

    rows = read_shape(state_dict, HITS, 2)[0] if HITS in state_dict else 1
    if rows > MAX_SCALES:
        raise CheckpointError(f"{HITS} counts {rows} scales, at most {MAX_SCALES} are allowed")
    scales = list(range(1, rows + 1))  # shapes depend on how many there are only
    config = infer_multiscale_config(to_native(state_dict), {"scales": scales})
    published = config["base_channels"] == VAE_CHANNELS
    if published:
        config = {}
    with torch.device("meta"):
        model = MultiScaleVQTokenizer(**{**config, "scales": scales, **({} if published else {"norm_num_groups": 1})})
    shapes: dict[str, Shape] = {name: tuple(v.shape) for name, v in to_official(model.state_dict()).items()}
    return Manifest(shapes, VAE_NAME if published else None, VAE_PARAMETERS if published else None, buffers=(HITS,))
