"""What backbones over continuous tokens share: a grid of tokens, a diffusion head, the way to latents and back.

Such a backbone returns states z and never draws; samplers run its head (``vargen.backbones.layers.diffusion_head``).

Letters: B images, N tokens, D numbers of a token, C latent channels, p patch side.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from vargen.backbones.layers.conditions import ClassEmbedding
from vargen.backbones.layers.diffusion_head import DiffusionHead
from vargen.backbones.mar.layers import to_latents, to_tokens


class LabelBuffer(nn.Embedding):
    """Class vectors without a null row: the null label ``num_classes`` is the model's ``fake_latent``."""

    has_null = True

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__(num_classes, dim)
        self.num_classes = num_classes

    @property
    def embedding_table(self) -> Any:
        """What ``ClassEmbedding.check`` looks at: a table that has the null row."""
        return _TableView(self.weight, self.num_classes + 1)

    def check(self, condition: Any, values: bool = True) -> Tensor:
        """Return the labels ``[B]`` int64 on the module's device, or say what is wrong with them; None is no class."""
        return ClassEmbedding.check(cast(Any, self), condition, values)

    def null(self, condition: Tensor) -> Tensor:
        """The null label of the same batch."""
        return torch.full_like(condition, self.num_classes)

    def drop(self, condition: Tensor, dropped: Tensor) -> Tensor:
        """Replace the labels of the samples ``dropped [B]`` by null."""
        return torch.where(dropped, self.null(condition), condition)


class _TableView:
    def __init__(self, weight: Tensor, num_embeddings: int) -> None:
        self.weight, self.num_embeddings = weight, num_embeddings


class ContinuousBackbone:
    """What every backbone over continuous tokens has: a grid of them, a head, and the way to latents and back."""

    config: Any
    diffloss: DiffusionHead
    grid_size: tuple[int, int]

    @property
    def num_codes(self) -> int:
        """N."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def token_dim(self) -> int:
        """D."""
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
