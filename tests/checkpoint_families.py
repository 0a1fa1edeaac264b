"""A tiny checkpoint of every family in its official layout, and what reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from vargen.backbones.infinity.model import InfinityTransformer
from vargen.backbones.infinity.sizes import to_official as infinity_official
from vargen.backbones.llamagen.any_order import AnyOrderTransformer
from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.backbones.mar.model import MARTransformer
from vargen.backbones.nar.model import NARTransformer
from vargen.backbones.nbp.model import NBPTransformer
from vargen.backbones.nbp.sizes import PREFIX
from vargen.backbones.par.model import PARTransformer
from vargen.backbones.switti.model import SwittiTransformer
from vargen.backbones.switti.sizes import to_official as switti_official
from vargen.backbones.var.model import VARTransformer
from vargen.backbones.xar.model import XARTransformer
from vargen.draft_models.eagle import EagleDrafter
from vargen.tokenizers.kl.autoencoder import load_kl16, to_latent_diffusion
from vargen.tokenizers.multiscale_bsq.checkpoints import to_official as bsq_official
from vargen.tokenizers.multiscale_bsq.model import MultiScaleBSQTokenizer
from vargen.tokenizers.multiscale_vq.checkpoints import to_official
from vargen.tokenizers.multiscale_vq.model import MultiScaleVQTokenizer
from vargen.tokenizers.video_fsq.model import VideoFSQTokenizer
from vargen.tokenizers.vq.checkpoints import llamagen_to_taming
from vargen.tokenizers.vq.model import VQTokenizer

GPT: dict[str, Any] = {"dim": 8, "num_layers": 2, "num_heads": 2, "codebook_size": 6, "num_classes": 3, "ffn_dim": 16}
CONV: dict[str, Any] = {"base_channels": 4, "channel_multipliers": [1, 2], "num_res_blocks": 1, "norm_num_groups": 2}
VIDEO: dict[str, Any] = {
    **{**CONV, "channel_multipliers": [1]},
    **{"temporal_downsample": [], "num_mid_blocks": 0, "levels": [3, 3], "patch_size": [1, 2, 2]},
}


@dataclass(frozen=True)
class Example:
    """Weights in the official layout with the settings that shapes do not tell."""

    load: Callable[..., nn.Module]
    make: Callable[[], dict[str, Tensor]]
    settings: dict[str, Any] = field(default_factory=dict)
    numbered: str | None = None  # what stands before the number of a layer


def _state(cls: Callable[..., nn.Module], **config: Any) -> Callable[[], dict[str, Tensor]]:
    return lambda: dict(cls(**config).state_dict())


def _with(weights: dict[str, Tensor], **more: Tensor) -> dict[str, Tensor]:
    return {**weights, **more}


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 8],
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=2,
    )


_GRID = {"num_heads": 2, "grid_size": (2, 2)}
_CAPTION = {"condition_type": "caption", "caption_dim": 5, "num_condition_tokens": 2}
_SLOTS = {"condition_type": "attributes", "num_attributes": 4, "num_condition_tokens": 2}
_SCALES = {"scales": (1, 2), "codebook_size": 6, "codebook_dim": 4}
_VAR = {"dim": 8, "num_layers": 2, "num_heads": 2, "num_classes": 3}
_INFINITY = {
    "dim": 8,
    "num_layers": 2,
    "num_heads": 2,
    "num_bits": 3,
    "scales": (1, 2),
    "text_dim": 6,
    "text_length": 4,
}
_SWITTI = {"dim": 8, "num_layers": 2, "num_heads": 2, "text_dim": 6, "pooled_dim": 5, "ffn_dim": 12}
_SWITTI |= {"scales": (1, 2), "codebook_size": 6, "codebook_dim": 4}
_MAR = {"grid_size": (2, 2), "latent_channels": 2, "mlp_ratio": 2.0, "num_classes": 3, "buffer_size": 2}
_MAR_SIZES = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("dim", 8), ("depth", 2))}
_MAR_HEADS = {"encoder_num_heads": 2, "decoder_num_heads": 2}
_MAR_HEAD = {"head_depth": 2, "head_width": 8, "num_sampling_steps": "4"}
_XAR = {"dim": 8, "encoder_depth": 1, "decoder_depth": 2, "num_heads": 2, "latent_channels": 2, "num_classes": 3}
_NBP = {"grid_size": (1, 2, 2), "block": (1, 1, 2), "num_heads": 2}
_NBP_SIZES = {"dim": 8, "num_layers": 2, "max_positions": 16, "codebook_size": 6}

FAMILIES: dict[str, Example] = {
    "LlamaGen": Example(
        LlamaGenTransformer.from_original, _state(LlamaGenTransformer, **GPT, grid_size=(2, 2)), _GRID, "layers."
    ),
    "LlamaGen captions": Example(
        LlamaGenTransformer.from_original, _state(LlamaGenTransformer, **GPT, **_CAPTION), _GRID, "layers."
    ),
    "LlamaGen attributes": Example(
        LlamaGenTransformer.from_original, _state(LlamaGenTransformer, **GPT, **_SLOTS), _GRID, "layers."
    ),
    "NAR": Example(NARTransformer.from_original, _state(NARTransformer, **GPT), _GRID, "layers."),
    "NAR video": Example(
        NARTransformer.from_original,
        _state(NARTransformer, **GPT, grid_size=(2, 2, 2)),
        {**_GRID, "grid_size": (2, 2, 2)},
        "layers.",
    ),
    "PAR": Example(
        PARTransformer.from_original,
        _state(PARTransformer, **GPT, grid_size=(4, 4)),
        {**_GRID, "grid_size": (4, 4)},
        "layers.",
    ),
    "any order": Example(AnyOrderTransformer.from_original, _state(AnyOrderTransformer, **GPT), _GRID, "layers."),
    "VAR": Example(
        VARTransformer.from_original,
        lambda: _with(dict(VARTransformer(**_VAR, **_SCALES).state_dict()), lvl_1L=torch.tensor([[0, 1, 1, 1, 1]])),
        {},
        "blocks.",
    ),
    "Infinity": Example(
        InfinityTransformer.from_original,
        lambda: infinity_official(InfinityTransformer(**_INFINITY).state_dict(), num_chunks=2),
        {"scales": (1, 2)},
        "block_chunks.",
    ),
    "Switti": Example(
        SwittiTransformer.from_original,
        lambda: switti_official(SwittiTransformer(**_SWITTI).state_dict()),
        {"num_heads": 2, "scales": (1, 2), "autoregressive": False},
        "blocks.",
    ),
    "MAR": Example(
        MARTransformer.from_original,
        _state(MARTransformer, **_MAR, **_MAR_SIZES, **_MAR_HEADS, **_MAR_HEAD),
        {**_MAR_HEADS, "num_sampling_steps": "4"},
        "decoder_blocks.",
    ),
    "xAR": Example(
        XARTransformer.from_original,
        _state(XARTransformer, **_XAR, grid_size=(2, 2), cells=(2, 2)),
        {"num_heads": 2},
        "encoder_blocks.",
    ),
    "NBP": Example(
        NBPTransformer.from_original,
        lambda: {
            PREFIX + name: value
            for name, value in NBPTransformer(**_NBP, **_NBP_SIZES, num_condition_tokens=2, text_vocabulary=20)
            .state_dict()
            .items()
        },
        {**_NBP, "codebook_size": 6},
        PREFIX + "blocks.",
    ),
    "Eagle": Example(
        EagleDrafter.from_original,
        _state(
            EagleDrafter,
            dim=8,
            num_layers=2,
            num_heads=2,
            ffn_dim=16,
            codebook_size=6,
            grid_size=(2, 2),
            num_condition_tokens=1,
        ),
        {**_GRID, "num_condition_tokens": 1},
        "layers.",
    ),
    "VQ": Example(
        VQTokenizer.from_original,
        _state(VQTokenizer, **CONV, z_channels=4, codebook_size=6, codebook_dim=4),
        {"norm_num_groups": 2},
        "encoder.conv_blocks.",
    ),
    "taming": Example(
        VQTokenizer.from_original,
        lambda: llamagen_to_taming(
            VQTokenizer(**CONV, z_channels=4, codebook_size=6, codebook_dim=4, l2_norm=False).state_dict()
        ),
        {"norm_num_groups": 2},
        "decoder.up.",
    ),
    "multi-scale VQ": Example(
        MultiScaleVQTokenizer.from_original,
        lambda: to_official(MultiScaleVQTokenizer(**CONV, **_SCALES, num_phi=2).state_dict()),
        {"norm_num_groups": 2, "scales": (1, 2)},
        "quantize.quant_resi.qresi_ls.",
    ),
    "binary multi-scale": Example(
        MultiScaleBSQTokenizer.from_original,
        lambda: bsq_official(MultiScaleBSQTokenizer(**CONV, codebook_dim=4, scales=(1, 2)).state_dict()),
        {"norm_num_groups": 2, "scales": (1, 2)},
        "decoder.up.",
    ),
    "video FSQ": Example(VideoFSQTokenizer.from_original, _state(VideoFSQTokenizer, **VIDEO), VIDEO),
    "KL": Example(
        load_kl16, lambda: to_latent_diffusion(_autoencoder().state_dict()), {"norm_num_groups": 2}, "encoder.down."
    ),
}


@cache
def _weights(name: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return FAMILIES[name].make()


def weights(name: str) -> dict[str, Tensor]:
    """A state dict of its own over tensors that all callers share."""
    return dict(_weights(name))
