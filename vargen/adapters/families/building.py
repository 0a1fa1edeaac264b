"""Models of transformers around the tensors of a file in another layout: no second copy, no random draws."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from vargen.checkpoints.reader import check_fit, load_strict
from vargen.validation.printable import shown

Rename = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def build(kind: Any, config: Any, state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> Any:
    """The model with these weights and no others: ``from_pretrained`` alone would fill gaps with random numbers.

    Args:
        kind: class of transformers.
        config: of the model.
        state_dict: in the names of the class; its tensors are taken over where device and dtype stay.
        options: of ``from_pretrained``; without ``dtype`` the file's own is kept.

    Raises:
        CheckpointError: keys or shapes that do not fit.
    """
    with torch.device("meta"):
        skeleton = kind(config)
    load_strict(skeleton, state_dict)
    weights = dict(skeleton.state_dict())  # in one precision
    dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
    return kind.from_pretrained(None, config=config, state_dict=weights, **{"dtype": dtype, **options}).eval()


def build_renamed(
    kind: Any,
    config: Any,
    state_dict: Mapping[str, Tensor],
    options: Mapping[str, Any],
    *,
    rename: Rename,
    restore: Rename,
    title: str,
    ignore: Collection[str] = (),
) -> Any:
    """As ``build``, for a file in other names; it is compared, and errors speak, in these.

    Args:
        rename: the file's names to those of the class.
        restore: the reverse.
        title: what the file is, in errors.
        ignore: as in ``load_strict``.
    """
    with torch.device("meta"):
        expected = restore(kind(config).state_dict())
    return build(kind, config, rename(check_fit(expected, state_dict, title=title, ignore=ignore)), options)


def merged(settings: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings with those given in their place, in the dictionaries inside them too."""
    found = dict(settings)
    for name, value in (given or {}).items():
        inner = found.get(name)
        found[name] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return found


def check_rope(settings: Any, name: str) -> None:
    """Raise ``ValueError`` for settings of a language model that are none, or that scale rotary positions."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"{name} of config.json must be an object, got {shown(settings)}")
    if settings.get("rope_scaling"):
        raise ValueError(
            f"{name} scales rotary positions ({shown(settings['rope_scaling'])}); no published model does"
        )
