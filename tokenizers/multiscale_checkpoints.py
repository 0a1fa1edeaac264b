"""Official VAR tokenizers in the layout of ``MultiScaleVQTokenizer``: taming's names, one fused query-key-value kernel."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vargen.checkpoints import CheckpointError, check_family, load_original, load_strict
from vargen.tokenizers.vq_checkpoints import infer_config, llamagen_to_taming, taming_to_llamagen

if TYPE_CHECKING:
    from vargen.tokenizers.multiscale_vq import MultiScaleVQTokenizer

FAMILY = "var-vqvae"
HITS = "quantize.ema_vocab_hit_SV"
_FUSED = re.compile(r"(.*\.)qkv\.(weight|bias)")
_PARTED = re.compile(r"((?:encoder|decoder)\..*\.)([qkv])\.(weight|bias)")


def read_multiscale_checkpoint(
    cls: type[MultiScaleVQTokenizer], checkpoint: str | Path | Mapping[str, Any], config: Mapping[str, Any]
) -> MultiScaleVQTokenizer:
    """Build a tokenizer from an official checkpoint; see ``MultiScaleVQTokenizer.from_original``."""
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    if unknown := sorted(set(config) - known):
        raise ValueError(f"unknown tokenizer setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
    state_dict = load_original(checkpoint, key="trainer.vae_local" if _is_training(checkpoint) else None)
    check_family(state_dict, FAMILY)
    native = to_native(state_dict)
    model = cls(**{**infer_multiscale_config(native, config), **config})
    rows = native.get(HITS)
    if rows is not None and rows.shape != model.quantize.ema_vocab_hit_SV.shape:
        native[HITS] = model.quantize.ema_vocab_hit_SV  # a statistic of another scale list
    load_strict(model, native, family=FAMILY)
    return model.eval()


def _is_training(checkpoint: Any) -> bool:
    if not isinstance(checkpoint, Mapping):
        return False
    trainer = checkpoint.get("trainer")
    return isinstance(trainer, Mapping) and "vae_local" in trainer


def to_native(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an official state dict to the names of ``vargen.tokenizers.conv`` and part the fused kernels."""
    native: dict[str, Tensor] = {}
    for name, value in taming_to_llamagen(state_dict).items():
        if (fused := _FUSED.fullmatch(name)) is None:
            native[name] = value
            continue
        for letter, part in zip("qkv", value.chunk(3), strict=True):
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
    from vargen.tokenizers.multiscale_vq import SCALES_256

    config = infer_config(state_dict)
    config.pop("z_channels")
    kernel = state_dict.get("post_quant_conv.weight")
    if kernel is None:
        raise CheckpointError("checkpoint does not fit MultiScaleVQTokenizer; missing key post_quant_conv.weight")
    config["quant_conv_kernel_size"] = kernel.shape[-1]
    config.update(_phi_config(state_dict))
    if "scales" not in given:
        hits = state_dict.get(HITS)
        if hits is None or hits.shape[0] != len(SCALES_256):
            raise CheckpointError("the file does not tell its scales; pass scales=(1, 2, ...)")
        config["scales"] = SCALES_256
    return config


def _phi_config(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    shared = {m[1] for k in state_dict if (m := re.match(r"quantize\.quant_resi\.qresi_ls\.(\d+)\.", k))}
    if shared:
        return {"num_phi": len(shared)}
    if "quantize.quant_resi.qresi.weight" in state_dict:
        return {"num_phi": 1}
    if any(k.startswith("quantize.quant_resi.") for k in state_dict):
        return {"num_phi": 0}
    return {"phi_ratio": 0.0}
