"""Official VQ checkpoints in the layout of ``VQTokenizer``: LlamaGen's own, and taming VQGANs after renaming.

Letters: n levels of resolution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from vargen.checkpoints.bounds import check_given, count_layers, read_shape
from vargen.checkpoints.families import guess_family
from vargen.checkpoints.reader import CheckpointError, build_around, check_family, load_original, split_key

if TYPE_CHECKING:
    from vargen.tokenizers.vq.model import VQTokenizer

T = TypeVar("T")  # tensors, or only their shapes

FAMILIES = ("llamagen-vq", "taming-vqgan")
IGNORED = ("quantize.codebook_used",)  # LlamaGen's queue of recent codes, a statistic of training
IBQ = (4, 256)  # blocks of a level and width of a code; published VQGANs have 2 blocks
TAMING_IGNORED = ("loss.",)  # LPIPS and the discriminator
_MID = {"block_1": "0", "attn_1": "1", "block_2": "2"}


def read_vq_checkpoint(
    cls: type[VQTokenizer], checkpoint: str | Path | Mapping[str, Any], config: Mapping[str, Any]
) -> VQTokenizer:
    """Build a tokenizer from an official checkpoint; see ``VQTokenizer.from_original``."""
    key, config = split_key(config)
    config = check_given(cls, config)
    state_dict = load_original(checkpoint, key=key)
    check_family(state_dict, FAMILIES)
    taming = "decoder.up.0.block.0.conv1.weight" in state_dict
    state_dict, family_config = to_native(state_dict)
    inferred = infer_config(state_dict)
    if taming and "l2_norm" not in config and (inferred["num_res_blocks"], inferred["codebook_dim"]) == IBQ:
        raise CheckpointError(
            "this looks like an IBQ tokenizer, which takes the code with the largest product where this one takes the nearest: "
            "it would decode rightly and encode wrongly; for a VQGAN with such sizes say l2_norm=False"
        )
    settings = {**inferred, **family_config, **config}
    return build_around(lambda: cls(**settings), state_dict, family=FAMILIES, ignore=IGNORED).eval()


def to_native(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rename an official state dict to LlamaGen's layout.

    Args:
        state_dict: LlamaGen or taming keys.

    Returns:
        The renamed state dict and the settings that the family implies but shapes do not show.
    """
    family = guess_family(state_dict)
    if family is not None and family.name == "taming-vqgan":
        return taming_to_llamagen(state_dict), {"l2_norm": False, "legacy_beta": True}
    return dict(state_dict), {}


def taming_to_llamagen(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Rename taming's keys: the decoder's levels are counted from the other end, ``loss.*`` is dropped."""
    kept = {k: v for k, v in state_dict.items() if not k.startswith(TAMING_IGNORED)}
    last = count_layers(kept, "decoder.up.", least=0) - 1

    def rename(key: str) -> str:
        key = re.sub(r"^(encoder|decoder)\.mid\.(\w+)\.", lambda m: f"{m[1]}.mid.{_MID.get(m[2], m[2])}.", key)
        key = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.conv_blocks.\1.", key)
        key = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.conv_blocks.{last - int(m[1])}.", key)
        return re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", key)

    return {rename(k): v for k, v in kept.items()}


def llamagen_to_taming(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Undo ``taming_to_llamagen``; what LlamaGen alone has (``quantize.codebook_used``) is dropped."""
    names = {index: name for name, index in _MID.items()}
    last = count_layers(state_dict, "decoder.conv_blocks.", least=0) - 1

    def rename(key: str) -> str:
        key = re.sub(r"^(encoder|decoder)\.mid\.(\d)\.", lambda m: f"{m[1]}.mid.{names[m[2]]}.", key)
        key = re.sub(r"(conv_blocks\.\d+)\.res\.", r"\1.block.", key)
        key = re.sub(r"^encoder\.conv_blocks\.(\d+)\.", r"encoder.down.\1.", key)
        return re.sub(r"^decoder\.conv_blocks\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}.", key)

    return {rename(k): v for k, v in state_dict.items() if k not in IGNORED}


def infer_config(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the sizes of a tokenizer from a state dict in LlamaGen's layout.

    Raises:
        CheckpointError: a key is missing, or the widths are not multiples of the first one.
    """
    num_levels = count_layers(state_dict, "encoder.conv_blocks.")
    base, in_channels = read_shape(state_dict, "encoder.conv_in.weight", 4)[:2]
    widths = [read_shape(state_dict, f"encoder.conv_blocks.{i}.res.0.conv2.weight", 4)[0] for i in range(num_levels)]
    if any(w % base for w in widths):
        raise CheckpointError(f"encoder widths {widths} are not multiples of the first convolution's {base} channels")
    attention: bool | str = "encoder.mid.1.q.weight" in state_dict
    if attention and f"encoder.conv_blocks.{num_levels - 1}.attn.0.q.weight" not in state_dict:
        attention = "mid"
    codebook_size, codebook_dim = read_shape(state_dict, "quantize.embedding.weight", 2)
    return {
        "in_channels": in_channels,
        "base_channels": base,
        "channel_multipliers": [w // base for w in widths],
        "num_res_blocks": count_layers(state_dict, "encoder.conv_blocks.0.res."),
        "z_channels": read_shape(state_dict, "encoder.conv_out.weight", 4)[0],
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
        "attention": attention,
    }
