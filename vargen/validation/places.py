"""Where a model lies: the name of a shipped one, a folder, or the id of a repository on the Hub; and what a folder holds instead.

Importing this module is cheap: no torch, no diffusers.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vargen
from vargen.validation.printable import printable
from vargen.validation.reading import StrPath, local_path, read_json

MODELS_FOLDER = Path(vargen.__file__).parent / "assets" / "models"
INDEX_FILE = "model_index.json"
SHARED_KEY = "_shared"  # in an index: component name -> pipeline folder beside this one that holds it
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # endings of checkpoint files
MAX_LISTED = 5  # names of files in a message


def shipped_folders() -> dict[str, Path]:
    """Folders of the shipped models, by name. A folder without an index (one that is being written) is not a model yet."""
    if not MODELS_FOLDER.is_dir():
        return {}
    return {path.parent.name: path.parent for path in sorted(MODELS_FOLDER.glob(f"*/{INDEX_FILE}"))}


def resolve_model(name_or_path: StrPath) -> str:
    """Turn what a user typed into something ``from_pretrained`` takes.

    Args:
        name_or_path: name of a shipped model, path of a folder, or a Hub id ``organisation/model``.

    Returns:
        Path of a folder, or the Hub id unchanged.

    Raises:
        ValueError: none of these; nearest names are shown.
    """
    text = os.fspath(name_or_path)
    path = local_path(name_or_path)
    shipped = shipped_folders()
    if text in shipped:
        return str(shipped[text])
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise ValueError(
            f"{printable(text)} is a file, not a model folder; load a published checkpoint with the from_original of its "
            "class, or convert it with `vargen convert`"
        )
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text):
        return text
    if "/" in text or "\\" in text:
        raise ValueError(f"no model folder {printable(text)}; shipped models: {', '.join(shipped) or 'none'}")
    near = difflib.get_close_matches(text, shipped, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}" if near else f"shipped models: {', '.join(shipped) or 'none'}"
    raise ValueError(f"unknown model {text!r}; {hint}; a folder or a Hub id organisation/model also works")


def component_folder(folder: Path, subfolder: str | None, class_name: str, config_name: str) -> Path:
    """The folder of one component, from that of its pipeline.

    Args:
        folder: of a pipeline, or of the component itself.
        subfolder: name of the component, as in diffusers; None looks for the component of this class.
        class_name: of the component.
        config_name: file that its own folder holds.

    Raises:
        ValueError: no such component, or several of this class.
    """
    if subfolder:
        place = folder / subfolder
        lender = _index_of(folder).get(SHARED_KEY) or {}
        if not place.is_dir() and isinstance(lender, Mapping) and isinstance(lender.get(subfolder), str):
            return folder.parent / lender[subfolder] / subfolder
        return place
    index = _index_of(folder)
    if (folder / config_name).is_file() or not index:
        return folder
    parts = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    own = [name for name, kind in parts.items() if kind == class_name]
    if len(own) == 1:
        return component_folder(folder, own[0], class_name, config_name)
    held = ", ".join(f"{name} ({kind})" for name, kind in parts.items() if kind)
    raise ValueError(f"{folder} is a pipeline folder; say which component: subfolder=..., one of {held}")


def other_layout(folder: Path, class_name: str | None = None) -> str | None:
    """Say in one line what a folder holds that is no model folder of vargen, and which call loads it; None if unknown.

    Args:
        folder: was given to a ``from_pretrained``.
        class_name: whose ``from_original`` reads published files; None where a pipeline was asked for.
    """
    config = folder / "config.json"
    settings = _read(config)
    if isinstance(kind := settings.get("model_type"), str):
        return (
            f"{folder} holds a model of transformers (model_type {printable(kind)}); load it with transformers, then "
            "call ImagePipeline.from_transformers(model, processor) or vargen.wrap(model, processor)"
        )
    if isinstance(kind := settings.get("_class_name"), str) and kind != class_name:
        library = "vargen" if kind in vargen._names else "diffusers"
        return f"{folder} holds a {printable(kind)} alone; load it with {library}.{printable(kind)}.from_pretrained"
    files = sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHTS) if folder.is_dir() else []
    if files and not settings:
        listed = ", ".join(map(printable, files[:MAX_LISTED]))
        call = f"{class_name}.from_original(file)" if class_name else "the from_original of its class"
        return (
            f"{folder} holds checkpoint files in their authors' layout ({listed}); load one with {call}, or make a "
            "folder of it with `vargen convert`; `vargen verify` says what a file is"
        )
    return None


def _index_of(folder: Path) -> dict[str, Any]:
    return _read(folder / INDEX_FILE)


def _read(file: Path) -> dict[str, Any]:
    """The object of a settings file; empty where there is none that can be read."""
    try:
        found = read_json(file, limit=4 << 20) if file.is_file() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
