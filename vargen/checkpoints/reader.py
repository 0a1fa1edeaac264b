"""Read published checkpoint files without running code from them, and load them strictly.

Every failure is one ``CheckpointError`` line that names the file and the next step. What a file may hold is bounded in
``vargen.checkpoints.bounds``; files are opened in ``vargen.checkpoints.files``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vargen.checkpoints.bounds import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_NAME,
    MAX_TENSORS,
    WEIGHT_DTYPES,
    CheckpointError,
    check_given,
    check_tensors,
)
from vargen.checkpoints.families import get_family, guess_family
from vargen.checkpoints.folders import read_checkpoint
from vargen.validation.printable import shown
from vargen.validation.reading import local_path

__all__ = [
    "CheckpointError",
    "build_around",
    "build_strict",
    "check_family",
    "check_fit",
    "load_family",
    "load_original",
    "load_strict",
    "split_key",
]

CONTAINER_KEYS = ("model", "state_dict", "module", "model_state_dict", "trainer", "var_wo_ddp", "sd", "vae")
PREFIXES = ("module.", "_orig_mod.")  # left by DDP and torch.compile
_SHOWN = 3  # names printed of a long list

Module = TypeVar("Module", bound=nn.Module)


def load_original(checkpoint: str | Path | Mapping[str, Any], *, key: str | None = None) -> dict[str, Tensor]:
    """Read a state dict from a file or unwrap one from a container.

    Training containers are opened in the order ``model``, ``state_dict``, ``module``, ...; moving averages only on
    request (``key="ema"``). The prefixes ``module.`` and ``_orig_mod.`` are removed where every key has them.

    Args:
        checkpoint: safetensors or torch file, the index of a sharded one (``*.index.json``), a folder with one of these, or a
            mapping that was loaded already.
        key: entry of the container to take, dotted for nested ones (``"trainer.vae_local"``), or what the names of one model
            begin with in a file of several (``"first_stage_model"``).

    Returns:
        Names to tensors, on the CPU when read from a file.

    Raises:
        CheckpointError: file missing, truncated, not a checkpoint, or holding pickled code; ``key`` absent; no tensors;
            more of anything than ``vargen.checkpoints.bounds`` allows.
    """
    content: Mapping[str, Any]
    if isinstance(checkpoint, Mapping):
        name, content, size = "the state dict", checkpoint, None
    elif isinstance(checkpoint, str | Path):
        name = str(checkpoint)
        content, size = read_checkpoint(local_path(checkpoint))
    else:
        raise CheckpointError(f"a checkpoint is a path or a state dict, got a {type(checkpoint).__name__}")
    if key is not None:
        content = _descend(content, key, name)
    state_dict = _unwrap(content, name, set(), 0)
    if not state_dict:
        raise CheckpointError(f"{name} holds no tensors at its top level or under {', '.join(CONTAINER_KEYS[:4])}")
    check_tensors(state_dict, name, size)
    return _strip_prefixes(state_dict)


def _entries(content: Mapping[str, Any]) -> dict[str, Any]:
    """The named entries; of a dictionary from a file not through methods, which the file could have replaced."""
    items = dict.items(content) if isinstance(content, dict) else content.items()
    return {name: value for name, value in items if isinstance(name, str)}


def _descend(content: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    parts = key.split(".")
    for index, part in enumerate(parts):
        entries = _entries(content)
        inner = entries.get(part)
        if not isinstance(inner, Mapping):
            if below := _with_prefix(content, ".".join(parts[index:]) + ".", name):
                return below
            present = [k for k, v in entries.items() if isinstance(v, Mapping)]
            raise CheckpointError(
                f"{name} has no weights under {key[:MAX_NAME]!r}; containers present: {_shown(present) or 'none'}"
            )
        content = inner
    return content


def _with_prefix(content: Mapping[str, Any], prefix: str, name: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without it: of one model inside a file of several."""
    tensors = _strip_prefixes(_unwrap(content, name, set(), 0))
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _unwrap(content: Mapping[str, Any], name: str, seen: set[int], depth: int) -> dict[str, Tensor]:
    """The first tensors found; a container that is met again, inside itself or elsewhere, was searched already."""
    if depth > MAX_DEPTH or len(seen) >= MAX_CONTAINERS:
        raise CheckpointError(f"{name} nests containers more than {MAX_DEPTH} deep; save the state dict alone")
    seen.add(id(content))
    entries = _entries(content)
    for key in CONTAINER_KEYS:
        inner = entries.get(key)
        if isinstance(inner, Mapping) and id(inner) not in seen and (found := _unwrap(inner, name, seen, depth + 1)):
            return found
    tensors = [(k, v) for k, v in entries.items() if isinstance(v, Tensor)]
    if len(tensors) > MAX_TENSORS:
        raise CheckpointError(f"{name} holds {len(tensors):,} tensors, more than the {MAX_TENSORS:,} allowed")
    return {k: v.detach() for k, v in tensors}


def _strip_prefixes(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state_dict)), None):
        state_dict = {k.removeprefix(prefix): v for k, v in state_dict.items()}
    return state_dict


def _shown(names: Collection[str]) -> str:
    first = ", ".join(sorted(names)[:_SHOWN])
    return f"{first} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else first


def check_family(state_dict: Mapping[str, Any], family: str | Collection[str]) -> None:
    """Refuse a state dict that clearly belongs to another family; one that belongs to none passes.

    Args:
        state_dict: names to tensors.
        family: accepted name or names of ``vargen.checkpoints.families``.

    Raises:
        CheckpointError: it looks like something else.
    """
    accepted = [family] if isinstance(family, str) else list(family)
    guess = guess_family(state_dict)
    if guess is not None and guess.name not in accepted:
        wanted = " or ".join(get_family(name).title for name in accepted)
        raise CheckpointError(f"expected a {wanted}, but the checkpoint looks like a {guess.title} ({guess.loader})")


def check_fit(
    module: nn.Module | Mapping[str, Tensor],
    state_dict: Mapping[str, Tensor],
    *,
    family: str | Collection[str] | None = None,
    ignore: Collection[str] = (),
    title: str = "the model",
) -> dict[str, Tensor]:
    """Compare a state dict with what a module holds; arguments and errors as in ``load_strict``.

    Args:
        module: or what its state dict would be in the file's own names; ``title`` then says in errors what it is.

    Returns:
        What is not ignored.
    """
    given = {k: v for k, v in state_dict.items() if not any(fnmatchcase(k, p) for p in ignore)}
    if isinstance(module, Mapping):
        expected = module
    else:
        expected, title = module.state_dict(), type(module).__name__
    missing, extra = expected.keys() - given.keys(), given.keys() - expected.keys()
    if missing or extra:
        if family is not None:
            check_family(state_dict, family)
        named = {"missing": missing, "unexpected": extra}
        parts = [f"{len(n)} {word} key{'s'[: len(n) > 1]}: {_shown(n)}" for word, n in named.items() if n]
        raise CheckpointError(f"checkpoint does not fit {title}; {'; '.join(parts)}")
    wrong = [k for k in expected if expected[k].shape != given[k].shape]
    if wrong:
        k = wrong[0]
        raise CheckpointError(
            f"checkpoint does not fit {title}: {k} is {tuple(given[k].shape)} in the file, "
            f"the model expects {tuple(expected[k].shape)}" + (f" ({len(wrong) - 1} more differ)" * (len(wrong) > 1))
        )
    for k, value in expected.items():
        allowed = WEIGHT_DTYPES if value.is_floating_point() else (value.dtype,)
        if given[k].dtype not in allowed:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            got = str(given[k].dtype).removeprefix("torch.")
            raise CheckpointError(f"checkpoint does not fit {title}: {k} is {got} in the file; convert it to {names}")
    return given


def load_strict(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    family: str | Collection[str] | None = None,
    ignore: Collection[str] = (),
) -> None:
    """Load a state dict whose keys and shapes must be exactly those of the module.

    A module on the meta device takes over the tensors as they are, in one precision: where a file mixes several, in the
    one that holds them all. Other modules keep their dtype and device.

    Args:
        module: receives the weights.
        state_dict: names to tensors, already in the module's layout.
        family: what the caller expects, for the message when it is something else.
        ignore: ``fnmatch`` patterns of keys to drop from ``state_dict``.

    Raises:
        CheckpointError: missing or extra keys (named), wrong shapes (both shown), numbers of a kind that layers cannot
            hold, wrong family.
    """
    given = check_fit(module, state_dict, family=family, ignore=ignore)
    assign = any(v.is_meta for v in module.state_dict().values())
    bare = [k for k, v in given.items() if v.is_meta]
    if bare and (not assign or len(bare) < len(given)):  # a plan of a whole model may become one, a gap may not
        raise CheckpointError(
            f"{_shown(bare)}: the state dict has shapes but no numbers (meta device); load them first"
        )
    module.load_state_dict(_taken_over(given) if assign else given, strict=True, assign=assign)


def load_family(
    kind: Any,
    checkpoint: str | Path | Mapping[str, Any],
    given: Mapping[str, Any],
    infer: Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Any]],
    *,
    family: str | Collection[str],
    ignore: Collection[str] = (),
    read: Callable[[Any], dict[str, Tensor]] = load_original,
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> Any:
    """Build a published model around the tensors of its checkpoint: no second copy, no random draws.

    Args:
        kind: the class, whose constructor has a table of checks.
        checkpoint: path or state dict, plain or a training container.
        given: settings that come with it, and ``key`` as in ``load_original``.
        infer: renamed state dict and given settings to all settings of the constructor.
        family: accepted name or names of ``vargen.checkpoints.families``.
        ignore: as in ``load_strict``.
        read: opens the checkpoint.
        rename: published state dict to the names of the class.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: as ``load_original`` and ``load_strict``.
        ValueError: settings that are unknown, out of range, or missing.
    """
    key, given = split_key(given)
    config = check_given(kind, given)
    state_dict = read(checkpoint) if key is None else load_original(checkpoint, key=key)
    check_family(state_dict, family)
    state_dict = rename(state_dict)
    with torch.device("meta"):  # the checkpoint's own tensors take the places
        model = kind(**infer(state_dict, config))
    load_strict(model, state_dict, family=family, ignore=ignore)
    return model.eval()


def split_key(given: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Part what a ``from_original`` is given into ``key``, see ``load_original``, and settings."""
    key = given.get("key")
    if key is not None and not (isinstance(key, str) and key):
        raise ValueError(f'key must name an entry of the file, such as "ema", got {shown(key)}')
    return key, {name: value for name, value in given.items() if name != "key"}


def build_around(
    make: Callable[[], Module],
    state_dict: Mapping[str, Tensor],
    *,
    family: str | Collection[str] | None = None,
    ignore: Collection[str] = (),
) -> Module:
    """Build a module in float32 around the tensors of a state dict: no second copy of a float32 file, no random draws.

    Args:
        make: builds the module; parts with buffers that no file holds have a method ``reset_statistics``.
        state_dict, family, ignore: as in ``load_strict``.

    Raises:
        CheckpointError: as ``load_strict``.
    """
    with torch.device("meta"):
        module = make()
    load_strict(module, state_dict, family=family, ignore=ignore)
    part: Any
    for part in module.modules():
        if hasattr(part, "reset_statistics"):
            part.reset_statistics()
    return module.float()


def build_strict(
    make: Callable[[], Module],
    state_dict: Mapping[str, Tensor],
    *,
    family: str | Collection[str] | None = None,
    ignore: Collection[str] = (),
) -> Module:
    """Build a module that keeps its own dtype and load it; nothing is allocated before the state dict is seen to fit.

    Args:
        make: builds the module, twice: first on the meta device.
        state_dict, family, ignore: as in ``load_strict``.

    Raises:
        CheckpointError: as ``load_strict``.
    """
    with torch.device("meta"):
        skeleton = make()
    check_fit(skeleton, state_dict, family=family, ignore=ignore)
    module = make()
    load_strict(module, state_dict, family=family, ignore=ignore)
    return module


def _taken_over(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that can become parameters: one floating dtype, and memory that no other of them uses."""
    floating = {v.dtype for v in given.values() if v.is_floating_point()}
    dtype = reduce(torch.promote_types, floating) if floating else None
    taken: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, value in given.items():
        value = (value.to(dtype) if dtype and value.is_floating_point() else value).contiguous()
        address = value.untyped_storage().data_ptr()
        shared = not value.is_meta and value.numel() > 0 and address in used
        taken[name] = value.clone() if shared else value
        used.add(address)
    return taken
