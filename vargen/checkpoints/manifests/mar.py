"""What official files of the continuous family contain, by size: KL-16, MAR (arXiv:2406.11838) and xAR (arXiv:2502.20388)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vargen.checkpoints.manifests.base import Manifest

KL16_NAME, KL16_PARAMETERS = "kl16", 66_456_019
KL16_WIDTHS = [128, 128, 256, 256, 512]
XAR_PARAMETERS = {"xar_B": 172_638_224, "xar_L": 608_397_968, "xar_H": 1_186_024_096}
MAR_PARAMETERS = {"base": 207_924_768, "large": 478_326_304, "huge": 942_403_104}


def kl_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Keys and shapes of a KL autoencoder in the latent-diffusion layout."""
    from vargen.tokenizers.kl.autoencoder import build_autoencoder, infer_kl_config, to_latent_diffusion

    config = infer_kl_config(state_dict)
    published = config["block_out_channels"] == KL16_WIDTHS and config["latent_channels"] == 16
    with torch.device("meta"):  # one norm group: changes no shape and fits every width
        model = build_autoencoder({**config, "norm_num_groups": 1})
    shapes = {name: tuple(value.shape) for name, value in to_latent_diffusion(model.state_dict()).items()}
    size, count = (KL16_NAME, KL16_PARAMETERS) if published else (None, None)
    return Manifest(shapes, size, count, optional=("loss.*",))


def mar_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Keys and shapes of a MAR transformer of the file's width and depth."""
    from vargen.backbones.mar.layers import SIZES, infer_mar_config, mar_size_config
    from vargen.backbones.mar.model import MARTransformer

    heads = {f"{part}_num_heads": 1 for part in ("encoder", "decoder")}  # change no shape
    config = infer_mar_config(state_dict, heads)
    size = next((n for n in SIZES if {**mar_size_config(n), **heads}.items() <= config.items()), None)
    with torch.device("meta"):
        model = MARTransformer(**config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    published = size is not None and config["num_classes"] == 1000 and config["buffer_size"] == 64
    name, count = (f"mar_{size}", MAR_PARAMETERS[str(size)]) if published else (None, None)
    return Manifest(shapes, name, count)


def xar_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Keys and shapes of an xAR transformer of the file's width and depth."""
    from vargen.backbones.xar.model import RECOMPUTED, SIZES, XARTransformer, infer_xar_config

    config = infer_xar_config(state_dict, {"num_heads": 1})
    with torch.device("meta"):
        model = XARTransformer(**config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = (config["dim"], config["encoder_depth"])
    size = next((f"xar_{name}" for name, (dim, depth, _) in SIZES.items() if (dim, depth) == found), None)
    return Manifest(shapes, size, XAR_PARAMETERS.get(size or ""), optional=RECOMPUTED)
