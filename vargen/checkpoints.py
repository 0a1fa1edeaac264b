"""Read published checkpoint files without running code from them, and load them strictly.

Every failure is one ``CheckpointError`` line that names the file and the next step.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vargen.families import get_family, guess_family
from vargen.printable import printable

CONTAINER_KEYS = ("model", "state_dict", "module", "model_state_dict", "trainer", "var_wo_ddp", "sd")
PREFIXES = ("module.", "_orig_mod.")  # left by DDP and torch.compile
_SHOWN = 3  # names printed of a long list


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; names quoted from it cannot steer a terminal."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class _Inert:
    """Stands in for a class that training frameworks leave in their files; holds nothing and does nothing."""


# classes that a checkpoint may contain: plain attribute bags, and names read as inert stand-ins
_INERT_NAMES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
)
_ALLOWED: list[Any] = [argparse.Namespace, *((_Inert, name) for name in _INERT_NAMES)]


def load_original(checkpoint: str | Path | Mapping[str, Any], *, key: str | None = None) -> dict[str, Tensor]:
    """Read a state dict from a file or unwrap one from a container.

    Training containers are opened in the order ``model``, ``state_dict``, ``module``, ...; moving averages only on
    request (``key="ema"``). The prefixes ``module.`` and ``_orig_mod.`` are removed where every key has them.

    Args:
        checkpoint: safetensors or torch file, or a mapping that was loaded already.
        key: entry of the container to take, dotted for nested ones (``"trainer.vae_local"``).

    Returns:
        Names to tensors, on the CPU when read from a file.

    Raises:
        CheckpointError: file missing, truncated, not a checkpoint, or holding pickled code; ``key`` absent; no tensors.
    """
    if isinstance(checkpoint, Mapping):
        name, content = "the state dict", checkpoint
    else:
        name, content = str(checkpoint), _read(Path(checkpoint))
    if key is not None:
        content = _descend(content, key, name)
    state_dict = _unwrap(content)
    if not state_dict:
        raise CheckpointError(f"{name} holds no tensors at its top level or under {', '.join(CONTAINER_KEYS[:4])}")
    return _strip_prefixes(state_dict)


def _read(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".bin"))
        if len(found) != 1:
            raise CheckpointError(f"{path} is a folder with {len(found)} checkpoint files; name one of them")
        path = found[0]
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file {path}")
    with path.open("rb") as file:
        head = file.read(64)
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header < 1 << 32:
        return _read_safetensors(path, header)
    if head.startswith(b"PK") or head.startswith(b"\x80"):
        return _read_torch(path)
    raise CheckpointError(f"{path} is not a checkpoint: {_describe(head)}")


def _describe(head: bytes) -> str:
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page; the download went wrong"
    return "neither safetensors nor a torch file"


def _read_safetensors(path: Path, header: int) -> Mapping[str, Any]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        if path.stat().st_size < 8 + header or "incomplete" in str(error).lower():
            raise CheckpointError(f"{path} is truncated; download or copy it again") from error
        raise CheckpointError(f"{path} is not a valid safetensors file: {_one_line(error)}") from error


def _read_torch(path: Path) -> Mapping[str, Any]:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_ALLOWED):
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read is reported below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|class|function|global:?) `?([A-Za-z_][\w.]*\.[\w.]*\w)", str(error))
        name = refused[1] if refused else _first_global(path)
        if name is None:
            raise CheckpointError(f"{path} is damaged or not a checkpoint: {_one_line(error)}") from error
        raise CheckpointError(
            f"checkpoint {path} contains pickled code ({name}), refused; convert it to safetensors"
        ) from error
    except (EOFError, RuntimeError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        if isinstance(error, EOFError) or re.search("central directory|unexpected EOF|truncat|file size", str(error)):
            raise CheckpointError(f"{path} is truncated; download or copy it again") from error
        raise CheckpointError(f"{path} is not a checkpoint that torch can read: {_one_line(error)}") from error
    if isinstance(content, Mapping):
        return content
    raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors")


def _first_global(path: Path) -> str | None:
    """Name the first object that a bare pickle refers to, without executing anything."""
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            if opcode.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                return ".".join(strings[-2:])
            if isinstance(argument, str):
                strings.append(argument)
    except (ValueError, OSError):
        pass
    return None


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _descend(content: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    for part in key.split("."):
        inner = content.get(part)
        if not isinstance(inner, Mapping):
            present = ", ".join(str(k) for k, v in content.items() if isinstance(v, Mapping)) or "none"
            raise CheckpointError(f"{name} has no weights under {key!r}; containers present: {present}")
        content = inner
    return content


def _unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in CONTAINER_KEYS:
        if isinstance(content.get(key), Mapping) and (found := _unwrap(content[key])):
            return found
    return {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}


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
        family: accepted name or names of ``vargen.families``.

    Raises:
        CheckpointError: it looks like something else.
    """
    accepted = [family] if isinstance(family, str) else list(family)
    guess = guess_family(state_dict)
    if guess is not None and guess.name not in accepted:
        wanted = " or ".join(get_family(name).title for name in accepted)
        raise CheckpointError(f"expected a {wanted}, but the checkpoint looks like a {guess.title} ({guess.loader})")


def load_strict(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    family: str | Collection[str] | None = None,
    ignore: Collection[str] = (),
) -> None:
    """Load a state dict whose keys and shapes must be exactly those of the module.

    A module on the meta device takes over the tensors as they are; others keep their dtype and device.

    Args:
        module: receives the weights.
        state_dict: names to tensors, already in the module's layout.
        family: what the caller expects, for the message when it is something else.
        ignore: ``fnmatch`` patterns of keys to drop from ``state_dict``.

    Raises:
        CheckpointError: missing or extra keys (named), wrong shapes (both shown), wrong family.
    """
    given = {k: v for k, v in state_dict.items() if not any(fnmatchcase(k, p) for p in ignore)}
    expected = module.state_dict()
    missing, extra = expected.keys() - given.keys(), given.keys() - expected.keys()
    if missing or extra:
        if family is not None:
            check_family(state_dict, family)
        named = {"missing": missing, "unexpected": extra}
        parts = [f"{len(n)} {word} key{'s'[: len(n) > 1]}: {_shown(n)}" for word, n in named.items() if n]
        raise CheckpointError(f"checkpoint does not fit {type(module).__name__}; {'; '.join(parts)}")
    wrong = [k for k in expected if expected[k].shape != given[k].shape]
    if wrong:
        k = wrong[0]
        raise CheckpointError(
            f"checkpoint does not fit {type(module).__name__}: {k} is {tuple(given[k].shape)} in the file, "
            f"the model expects {tuple(expected[k].shape)}" + (f" ({len(wrong) - 1} more differ)" * (len(wrong) > 1))
        )
    module.load_state_dict(given, strict=True, assign=any(v.is_meta for v in expected.values()))
