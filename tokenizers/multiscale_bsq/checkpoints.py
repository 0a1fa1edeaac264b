"""Official Infinity tokenizers in the layout of ``MultiScaleBSQTokenizer``: taming's names with one level more."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vargen.checkpoints.bounds import check_given, count_layers, read_shape
from vargen.checkpoints.reader import CheckpointError, build_strict, check_family, load_original
from vargen.tokenizers.vq.checkpoints import llamagen_to_taming, taming_to_llamagen

if TYPE_CHECKING:
    from vargen.tokenizers.multiscale_bsq.model import MultiScaleBSQTokenizer

FAMILY = "infinity-vae"
RECOMPUTED = ("quantizer.lfq.mask", "quantize.lfq.mask")  # powers of two; the module registers its quantizer twice
PATCHED = 14  # channels of the one tokenizer whose positions are 2 x 2 cells
# every convolution and norm lies in a module of its own; whether files keep that level could not be seen, so both load
_CONV = re.compile(r"(.*(?:conv_in|conv_out|conv1|conv2|nin_shortcut|sample\.conv))\.conv\.(weight|bias)")
_NORM = re.compile(r"(.*(?:norm1|norm2|norm_out))\.norm\.(weight|bias)")
_INNER = re.compile(
    r"(.*\.(?:(conv_in|conv_out|conv1|conv2|nin_shortcut|(?:down|up)sample\.conv)|norm1|norm2|norm_out))\.(\w+)"
)


def read_bsq_checkpoint(
    cls: type[MultiScaleBSQTokenizer], checkpoint: str | Path | Mapping[str, Any], config: Mapping[str, Any]
) -> MultiScaleBSQTokenizer:
    """Build a tokenizer from an official checkpoint; see ``MultiScaleBSQTokenizer.from_original``."""
    config = check_given(cls, config)
    state_dict = load_original(checkpoint)
    check_family(state_dict, FAMILY)
    native = to_native(state_dict)
    settings = {**infer_bsq_config(native), **config}
    return build_strict(lambda: cls(**settings), native, family=FAMILY, ignore=RECOMPUTED).eval()


def to_native(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an official state dict, with or without the extra level of names, to those of ``layers.conv``."""
    plain: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        found = _CONV.fullmatch(name) or _NORM.fullmatch(name)
        short = f"{found[1]}.{found[2]}" if found else name
        if short in plain:
            raise CheckpointError(f"the checkpoint holds {short} under two names")
        plain[short] = value
    return taming_to_llamagen(plain)


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``to_native``: the layout of the official module, without its recomputed entries."""

    def rename(name: str) -> str:
        found = _INNER.fullmatch(name)
        return name if found is None else f"{found[1]}.{'conv' if found[2] else 'norm'}.{found[3]}"

    return {rename(name): value for name, value in llamagen_to_taming(state_dict).items()}


def infer_bsq_config(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the sizes of a tokenizer from a state dict in native names.

    Raises:
        CheckpointError: a key is missing, or the widths are not multiples of the first one.
    """
    num_levels = count_layers(state_dict, "encoder.conv_blocks.")
    base, in_channels = read_shape(state_dict, "encoder.conv_in.weight", 4)[:2]
    widths = [read_shape(state_dict, f"encoder.conv_blocks.{i}.res.0.conv2.weight", 4)[0] for i in range(num_levels)]
    if any(w % base for w in widths):
        raise CheckpointError(f"encoder widths {widths} are not multiples of the first convolution's {base} channels")
    channels = read_shape(state_dict, "encoder.conv_out.weight", 4)[0]
    return {
        "in_channels": in_channels,
        "base_channels": base,
        "channel_multipliers": [w // base for w in widths],
        "num_res_blocks": count_layers(state_dict, "encoder.conv_blocks.0.res."),
        "codebook_dim": channels,
        "patch": 2 if channels == PATCHED else 1,
    }
