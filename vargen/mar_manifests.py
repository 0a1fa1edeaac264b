"""What official files of the continuous family contain, by size: KL-16, MAR (arXiv:2406.11838) and xAR (arXiv:2502.20388)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vargen.manifests import Manifest

KL16_NAME, KL16_PARAMETERS = "kl16", 66_456_019
KL16_WIDTHS = [128, 128, 256, 256, 512]


def kl_manifest(state_dict: Mapping[str, Tensor]) -> Manifest:
    """Keys and shapes of a KL autoencoder in the latent-diffusion layout."""
    from diffusers import AutoencoderKL

    from vargen.tokenizers.kl import infer_kl_config, to_latent_diffusion

    config = infer_kl_config(state_dict)
    published = config["block_out_channels"] == KL16_WIDTHS and config["latent_channels"] == 16
    with torch.device("meta"):  # one norm group: changes no shape and fits every width
        model = AutoencoderKL(**{**config, "norm_num_groups": 1})
    shapes = {name: tuple(value.shape) for name, value in to_latent_diffusion(model.state_dict()).items()}
    size, count = (KL16_NAME, KL16_PARAMETERS) if published else (None, None)
    return Manifest(shapes, size, count, optional=("loss.*",))
