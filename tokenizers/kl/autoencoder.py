"""KL autoencoders of the latent-diffusion layout as diffusers' ``AutoencoderKL`` (Rombach et al., 2022, arXiv:2112.10752).

KL-16, which MAR and xAR share, is such a file (arXiv:2406.11838, ``kl16.ckpt``). Only names differ: the decoder counts its
levels from the other end, and 1x1 convolutions of attention are linear layers. There is no class of our own.

Letters: B images, C latent channels, h w latent grid.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from vargen.checkpoints.bounds import count_layers, read_shape
from vargen.checkpoints.reader import CheckpointError, check_family, load_original, load_strict, split_key
from vargen.tokenizers.settings import LEVELS, UNITS, WIDTH
from vargen.validation.checks import Check, anything, check_list, check_names, check_number

FAMILY = "kl-autoencoder"
KL16_SCALE = 0.2325  # latents times this have unit variance on ImageNet; as MAR and xAR use it
IGNORED = ("loss.",)  # LPIPS and the discriminator of a training file
_PARTS = {
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1": "mid_block.attentions.0",
    "norm_out": "conv_norm_out",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "norm_num_groups"), WIDTH),
    "layers_per_block": UNITS,
    "block_out_channels": partial(check_list, item=WIDTH, lengths=LEVELS, words="a list of 1..10 widths"),
    "scaling_factor": partial(check_number, low=0.0, open_low=True),
}


def load_kl16(checkpoint: str | Path | Mapping[str, Any], **config: Any) -> AutoencoderKL:
    """Load a KL autoencoder in the latent-diffusion layout, strictly.

    Args:
        checkpoint: path (``kl16.ckpt``) or state dict; sizes are inferred from the shapes.
        config: of ``AutoencoderKL``, over what the shapes tell, such as ``scaling_factor`` (0.2325) or
            ``norm_num_groups`` (32).

    Returns:
        The autoencoder in evaluation mode: ``encode(images).latent_dist`` times ``config.scaling_factor`` is what
        backbones read; ``decode(latents / config.scaling_factor).sample`` is the image, unclamped.

    Raises:
        CheckpointError: unreadable file, another family, missing or extra keys, wrong shapes.
    """
    key, config = split_key(config)
    config = _check_given(config)
    state_dict = load_original(checkpoint, key=key)
    check_family(state_dict, (FAMILY, "diffusers-kl"))
    if any(".down_blocks." in key for key in state_dict):
        raise CheckpointError("this file has diffusers' layout already; use diffusers.AutoencoderKL.from_pretrained")
    settings = {**infer_kl_config(state_dict), **config}
    with torch.device("meta"):  # the checkpoint's own tensors take the places
        model = build_autoencoder(settings)
    load_strict(model, to_diffusers(state_dict), family=(FAMILY, "diffusers-kl"))
    return model.eval()


def build_autoencoder(settings: Mapping[str, Any]) -> AutoencoderKL:
    """Build diffusers' class; settings that do not go together are refused in one line.

    Raises:
        ValueError: the class cannot be built.
    """
    _check_given(settings)
    try:
        return AutoencoderKL(**settings)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"no AutoencoderKL can be built from these settings: {reason}") from error


def _check_given(config: Mapping[str, Any]) -> dict[str, Any]:
    """Names and counts; the rest is diffusers' to judge."""
    check_names(config, list(inspect.signature(AutoencoderKL.__init__).parameters)[1:], "AutoencoderKL")
    return {name: _CHECKS.get(name, anything)(name, value) for name, value in config.items()}


def infer_kl_config(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the arguments of ``AutoencoderKL`` off a state dict in the latent-diffusion layout.

    Raises:
        CheckpointError: a key or a level is missing.
    """
    num_levels = count_layers(state_dict, "encoder.down.")
    widths = [read_shape(state_dict, f"encoder.down.{i}.block.0.conv2.weight", 4)[0] for i in range(num_levels)]
    first = read_shape(state_dict, "encoder.conv_in.weight", 4)[0]
    if first != widths[0]:
        raise CheckpointError(
            f"the first convolution has {first} channels and the first level {widths[0]} (a first multiplier of "
            f"{widths[0] / first:g}); diffusers' AutoencoderKL, which this file becomes, has one width for both"
        )
    down = [f"encoder.down.{i}.attn.0.q.weight" in state_dict for i in range(num_levels)]
    up = [f"decoder.up.{i}.attn.0.q.weight" in state_dict for i in reversed(range(num_levels))]
    sides = {"encoder.conv_in.weight": 1, "decoder.conv_out.weight": 0, "post_quant_conv.weight": 0}
    channels_in, channels_out, latent = (read_shape(state_dict, key, 4)[axis] for key, axis in sides.items())
    return {
        "in_channels": channels_in,
        "out_channels": channels_out,
        "down_block_types": ["AttnDownEncoderBlock2D" if attn else "DownEncoderBlock2D" for attn in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if attn else "UpDecoderBlock2D" for attn in up],
        "block_out_channels": widths,
        "layers_per_block": count_layers(state_dict, "encoder.down.0.block."),
        "latent_channels": latent,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in state_dict,
        "norm_num_groups": 32,
        "scaling_factor": KL16_SCALE,
    }


def to_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename latent-diffusion keys to diffusers' and squeeze the 1x1 kernels of attention; ``loss.*`` is dropped."""
    kept = {key: value for key, value in state_dict.items() if not key.startswith(IGNORED)}
    last = count_layers(kept, "decoder.up.", least=0) - 1
    found = {}
    for key, value in kept.items():
        name = _rename(key, last)
        found[name] = value[..., 0, 0] if ".attentions." in name and value.ndim == 4 else value
    return found


def to_latent_diffusion(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``to_diffusers``."""
    last = count_layers(state_dict, "decoder.up_blocks.", least=0) - 1
    found = {}
    for key, value in state_dict.items():
        name = _rename_back(key, last)
        kernel = ".attentions." in key and value.ndim == 2
        found[name] = value[..., None, None] if kernel else value
    return found


def kl_latents(autoencoder: AutoencoderKL, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """Encode images into scaled latents.

    Args:
        autoencoder: with ``config.scaling_factor``.
        images: [B, 3, H, W] in [-1, 1].
        noise: [B, C, h, w] standard normal numbers for a draw from the posterior; None takes its mean.

    Returns:
        [B, C, h, w], about unit variance.
    """
    posterior = autoencoder.encode(images).latent_dist
    latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
    return latents * autoencoder.config.scaling_factor


def _rename(key: str, last: int) -> str:
    key = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", key)
    key = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{last - int(m[1])}.", key)
    key = re.sub(r"(_blocks\.\d+)\.(down|up)sample\.conv\.", r"\1.\2samplers.0.conv.", key)
    key = re.sub(r"(_blocks\.\d+)\.block\.", r"\1.resnets.", key).replace(".nin_shortcut.", ".conv_shortcut.")
    key = re.sub(r"(_blocks\.\d+)\.attn\.", r"\1.attentions.", key)
    for old, new in _PARTS.items():
        key = re.sub(rf"^(encoder|decoder)\.{re.escape(old)}\.", rf"\1.{new}.", key)
    return re.sub(r"(\.attentions\.\d+)\.(\w+)\.", lambda m: f"{m[1]}.{_ATTENTION.get(m[2], m[2])}.", key)


def _rename_back(key: str, last: int) -> str:
    names = {new: old for old, new in _ATTENTION.items()}
    key = re.sub(
        r"(\.attentions\.\d+)\.(group_norm|to_q|to_k|to_v|to_out\.0)\.", lambda m: f"{m[1]}.{names[m[2]]}.", key
    )
    for old, new in _PARTS.items():
        key = re.sub(rf"^(encoder|decoder)\.{re.escape(new)}\.", rf"\1.{old}.", key)
    key = re.sub(r"(_blocks\.\d+)\.attentions\.", r"\1.attn.", key)
    key = re.sub(r"(_blocks\.\d+)\.resnets\.", r"\1.block.", key).replace(".conv_shortcut.", ".nin_shortcut.")
    key = re.sub(r"(_blocks\.\d+)\.(down|up)samplers\.0\.conv\.", r"\1.\2sample.conv.", key)
    key = re.sub(r"^encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1.", key)
    return re.sub(r"^decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}.", key)
