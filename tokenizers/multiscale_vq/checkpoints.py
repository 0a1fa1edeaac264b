"""Official VAR tokenizers in the layout of ``MultiScaleVQTokenizer``: taming's names, one fused query-key-value kernel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vargen.checkpoints.bounds import check_given, count_layers, read_shape
from vargen.checkpoints.reader import CheckpointError, build_around, check_family, load_original, split_key
from vargen.tokenizers.vq.checkpoints import infer_config, llamagen_to_taming, taming_to_llamagen

if TYPE_CHECKING:
    from vargen.tokenizers.multiscale_vq.model import MultiScaleVQTokenizer

FAMILY = "var-vqvae"
HITS = "quantize.ema_vocab_hit_SV"
_FUSED = re.compile(r"(.*\.)qkv\.(weight|bias)")
_PARTED = re.compile(r"((?:encoder|decoder)\..*\.)([qkv])\.(weight|bias)")


def read_multiscale_checkpoint(
    cls: type[MultiScaleVQTokenizer], checkpoint: str | Path | Mapping[str, Any], config: Mapping[str, Any]
) -> MultiScaleVQTokenizer:
    """Build a tokenizer from an official checkpoint; see ``MultiScaleVQTokenizer.from_original``."""
    key, config = split_key(config)
    config = check_given(cls, config)
    state_dict = load_original(checkpoint, key=key or ("trainer.vae_local" if _is_training(checkpoint) else None))
    check_family(state_dict, FAMILY)
    native = to_native(state_dict)
    settings = {**infer_multiscale_config(native, config), **config}
    hits = (len(settings["scales"]), settings["codebook_size"])
    if HITS in native and tuple(native[HITS].shape) != hits:
        native[HITS] = torch.zeros(1).expand(hits)  # a statistic of another scale list
    return build_around(lambda: cls(**settings), native, family=FAMILY).eval()


def _is_training(checkpoint: Any) -> bool:
    if not isinstance(checkpoint, Mapping):
        return False
    trainer = checkpoint.get("trainer")
    return isinstance(trainer, Mapping) and "vae_local" in trainer


def to_native(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an official state dict to the names of ``vargen.tokenizers.layers.conv`` and part the fused kernels."""
    native: dict[str, Tensor] = {}
    for name, value in taming_to_llamagen(state_dict).items():
        if (fused := _FUSED.fullmatch(name)) is None:
            native[name] = value
            continue
        if value.ndim == 0 or len(value) % 3:
            raise CheckpointError(f"{name} must hold queries, keys and values, got shape {tuple(value.shape)}")
        for letter, part in zip("qkv", value.split(len(value) // 3), strict=True):
            native[f"{fused[1]}{letter}.{fused[2]}"] = part.contiguous()
    return native


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``to_native``: the layout that the official code reads."""
    fused: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if (parted := _PARTED.fullmatch(name)) is None:
            fused[name] = value
        elif parted[2] == "q":
            letters = (f"{parted[1]}{letter}.{parted[3]}" for letter in "qkv")
            fused[f"{parted[1]}qkv.{parted[3]}"] = torch.cat([state_dict[letter] for letter in letters])
    return llamagen_to_taming(fused)


def infer_multiscale_config(state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the sizes of a tokenizer from a state dict in native names; ``given`` settles what shapes cannot tell.

    Raises:
        CheckpointError: keys are missing, or ``scales`` is neither given nor that of a published file.
    """
    from vargen.tokenizers.multiscale_vq.model import SCALES_256

    config = infer_config(state_dict)
    config.pop("z_channels")
    config["quant_conv_kernel_size"] = read_shape(state_dict, "post_quant_conv.weight", 4)[-1]
    config.update(_phi_config(state_dict))
    if "scales" not in given:
        if HITS not in state_dict or read_shape(state_dict, HITS, 2)[0] != len(SCALES_256):
            raise CheckpointError("the file does not tell its scales; pass scales=(1, 2, ...)")
        config["scales"] = SCALES_256
    return config


def _phi_config(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    if shared := count_layers(state_dict, "quantize.quant_resi.qresi_ls.", least=0):
        return {"num_phi": shared}
    if "quantize.quant_resi.qresi.weight" in state_dict:
        return {"num_phi": 1}
    if any(k.startswith("quantize.quant_resi.") for k in state_dict):
        return {"num_phi": 0}
    return {"phi_ratio": 0.0}
