"""Continuous tokens in a pipeline: they stand where codes stand for other models, and an autoencoder decodes them.

Letters: B images, N tokens, D numbers of a token, NaN = not drawn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vargen.features import Feature
from vargen.protocols import Model


def is_continuous(backbone: Model) -> bool:
    """Whether the backbone's tokens are vectors and not codes."""
    return Feature.CONTINUOUS in Feature.of(backbone)


def undrawn_tokens(backbone: Any, num_images: int) -> Tensor:
    """``[B, N, D]`` of images that were not begun."""
    return torch.full((num_images, backbone.num_codes, backbone.token_dim), math.nan, device=backbone.device)


def decode_tokens(autoencoder: Any, backbone: Any, tokens: Tensor, undrawn: float) -> Tensor:
    """Decode tokens ``[B, N, D]`` with diffusers' ``AutoencoderKL`` to ``[B, 3, H, W]``, ``undrawn`` where not drawn."""
    latents = backbone.to_latents(tokens)  # B C h w
    missing = latents.isnan().any(1, keepdim=True)
    scaled = latents.nan_to_num(0.0) / autoencoder.config.scaling_factor
    images: Tensor = autoencoder.decode(scaled.to(autoencoder.dtype)).sample
    if bool(missing.any()):
        side = images.shape[-1] // latents.shape[-1]
        images = images.masked_fill(missing.repeat_interleave(side, -1).repeat_interleave(side, -2), undrawn)
    return images


def check_autoencoder(autoencoder: Any, backbone: Any) -> None:
    """Raise ``ValueError`` unless the autoencoder decodes what the backbone draws."""
    if not is_continuous(backbone) or autoencoder is None:
        return
    channels = getattr(autoencoder.config, "latent_channels", None)
    if channels != backbone.config.latent_channels:
        raise ValueError(
            f"tokenizer and backbone must have the same latent channels, got {channels} ({type(autoencoder).__name__}) "
            f"and {backbone.config.latent_channels}; take both from one model"
        )
