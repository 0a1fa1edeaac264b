"""What backbones over continuous tokens share: a grid of tokens, a diffusion head, the way to latents and back.

Such a backbone returns states z and never draws; samplers run its head (``vargen.backbones.layers.diffusion_head``).

Letters: B images, N tokens, D numbers of a token, C latent channels, p patch side.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vargen.backbones.layers.diffusion_head import DiffusionHead
from vargen.backbones.layers.patches import to_latents, to_tokens
from vargen.hooks import HookedModel


class ContinuousBackbone(HookedModel):
    """What every backbone over continuous tokens has: a grid of them, a head, and the way to latents and back."""

    _group_offload_block_modules = ("diffloss",)  # samplers run the head on its own, between passes of the backbone
    config: Any
    diffloss: DiffusionHead
    grid_size: tuple[int, int]

    @property
    def num_codes(self) -> int:
        """Tokens of an image, N."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def token_dim(self) -> int:
        """Numbers of a token, D."""
        return self.diffloss.token_dim

    @property
    def head(self) -> DiffusionHead:
        """The diffusion head; samplers run it, the backbone never does."""
        return self.diffloss

    def to_tokens(self, latents: Tensor) -> Tensor:
        """Scaled latents of the autoencoder ``[B, C, h p, w p]`` to tokens ``[B, N, D]``."""
        return to_tokens(latents, self.config.patch_size)

    def to_latents(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, N, D]`` to scaled latents ``[B, C, h p, w p]``."""
        return to_latents(tokens, self.grid_size, self.config.patch_size)
