"""Blocks, sizes and key layout of MAR (Li et al., 2024, arXiv:2406.11838): a masked autoencoder's two transformers.

Letters: R rows, w items, E width of the encoder, Z width of the decoder, N tokens, D numbers of a token, p patch side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.backbones.layers.cache.kv_cache import Attend
from vargen.checkpoints.bounds import CheckpointError, count_layers, read_shape

# name -> width, depth of either transformer, heads, blocks and width of the head
SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "base": (768, 12, 12, 6, 1024),
    "large": (1024, 16, 16, 8, 1280),
    "huge": (1280, 20, 16, 12, 1536),
}


class ViTAttention(nn.Module):
    """Fused projection with bias."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Attend from and to ``x [R, w, E]``."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj_drop(self.proj(attend(query, key, value).transpose(1, 2).flatten(2)))


class ViTFeedForward(nn.Module):
    """Two linear layers, GELU between."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each item on its own."""
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class ViTBlock(nn.Module):
    """Attention and feed-forward, a layer norm in front of each."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = ViTAttention(dim, num_heads, dropout)
        self.mlp = ViTFeedForward(dim, int(dim * mlp_ratio), dropout)

    def forward(self, x: Tensor, rope: Tensor | None, attend: Attend) -> Tensor:
        """Map ``x [R, w, E]`` to ``[R, w, E]``; positions are in the input, ``rope`` is not used."""
        x = x + self.attn(self.norm1(x), attend)
        return x + self.mlp(self.norm2(x))


def to_tokens(latents: Tensor, patch_size: int = 1) -> Tensor:
    """Latents ``[B, C, h p, w p]`` to tokens ``[B, h w, C p p]``, row by row; numbers channel first."""
    height, width = latents.shape[-2] // patch_size, latents.shape[-1] // patch_size
    parts = latents.unflatten(-1, (width, patch_size)).unflatten(-3, (height, patch_size))  # B C h p w q
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def to_latents(tokens: Tensor, grid_size: tuple[int, int], patch_size: int = 1) -> Tensor:
    """Undo ``to_tokens``."""
    parts = tokens.unflatten(1, grid_size).unflatten(-1, (-1, patch_size, patch_size))  # B h w C p q
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def draw_mask_ratio(low: float, std: float = 0.25, generator: torch.Generator | None = None) -> float:
    """Share of tokens to mask in a step: normal around 1, cut to [low, 1]."""
    normal = torch.distributions.Normal(1.0, std)
    edges = normal.cdf(torch.tensor([low, 1.0], dtype=torch.float64))
    u = torch.rand((), generator=generator, dtype=torch.float64)
    return float(normal.icdf(edges[0] + u * (edges[1] - edges[0])).clamp(low, 1.0))


def mar_size_config(size: str) -> dict[str, Any]:
    """Constructor arguments of a published size: "base", "large" or "huge"."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; published sizes are {', '.join(SIZES)}")
    dim, depth, heads, head_depth, head_width = SIZES[size]
    return {
        "encoder_dim": dim,
        "encoder_depth": depth,
        "encoder_num_heads": heads,
        "decoder_dim": dim,
        "decoder_depth": depth,
        "decoder_num_heads": heads,
        "head_depth": head_depth,
        "head_width": head_width,
    }


def infer_mar_config(state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read a MAR configuration off the shapes; ``given`` settles what shapes cannot tell.

    Raises:
        ValueError: keys of MAR are missing, or ``grid_size`` or heads are neither given nor readable.
    """
    needed = ("z_proj.weight", "encoder_pos_embed_learned", "diffusion_pos_embed_learned", "decoder_embed.weight")
    if missing := [key for key in needed if key not in state_dict]:
        raise ValueError(
            f"not a MAR checkpoint: it lacks {', '.join(missing)}; pass a state dict in the official layout"
        )
    encoder_dim, token_dim = read_shape(state_dict, "z_proj.weight", 2)
    decoder_dim = read_shape(state_dict, "decoder_embed.weight", 2)[0]
    num_tokens = read_shape(state_dict, "diffusion_pos_embed_learned", 3)[1]
    buffer_size = read_shape(state_dict, "encoder_pos_embed_learned", 3)[1] - num_tokens
    if buffer_size < 1:
        raise CheckpointError(f"encoder_pos_embed_learned holds no condition in front of its {num_tokens} tokens")
    patch_size = given.get("patch_size", 1)
    config: dict[str, Any] = {
        "grid_size": _grid(num_tokens, given),
        "latent_channels": token_dim // patch_size**2,
        "encoder_dim": encoder_dim,
        "encoder_depth": count_layers(state_dict, "encoder_blocks."),
        "decoder_dim": decoder_dim,
        "decoder_depth": count_layers(state_dict, "decoder_blocks."),
        "mlp_ratio": read_shape(state_dict, "encoder_blocks.0.mlp.fc1.weight", 2)[0] / encoder_dim,
        "buffer_size": buffer_size,
        "head_depth": count_layers(state_dict, "diffloss.net.res_blocks."),
        "head_width": read_shape(state_dict, "diffloss.net.input_proj.weight", 2)[0],
    }
    if "class_emb.weight" in state_dict:
        config["num_classes"] = read_shape(state_dict, "class_emb.weight", 2)[0]
    heads = {dim: heads for dim, _, heads, *_ in SIZES.values()}
    for part, dim in (("encoder", encoder_dim), ("decoder", decoder_dim)):
        name = f"{part}_num_heads"
        if name not in given and dim not in heads:
            raise ValueError(f"{name} cannot be read off the shapes (width {dim}); pass {name}=...")
        config[name] = heads.get(dim)
    return {**config, **given}


def _grid(num_tokens: int, given: Mapping[str, Any]) -> tuple[int, int]:
    if "grid_size" in given:
        return tuple(given["grid_size"])  # type: ignore[return-value]
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"grid_size cannot be read off {num_tokens} tokens; pass grid_size=(height, width)")
    return side, side
