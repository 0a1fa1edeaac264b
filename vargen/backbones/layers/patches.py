"""Latents of an autoencoder as tokens, and back.

Letters: B images, C latent channels, h w grid of tokens, p patch side.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def to_tokens(latents: Tensor, patch_size: int = 1) -> Tensor:
    """Latents ``[B, C, h p, w p]`` to tokens ``[B, h w, C p p]``, row by row; numbers channel first."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def to_latents(tokens: Tensor, grid_size: tuple[int, int], patch_size: int = 1) -> Tensor:
    """Undo ``to_tokens``."""
    h, w = grid_size
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=patch_size, q=patch_size)
