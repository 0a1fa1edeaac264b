"""Find models and read checkpoints: shipped models by name, folders by path, anything else on the Hub."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from vargen.checkpoints.families import Family, get_family, guess_family, known_families, register_family
from vargen.checkpoints.manifests.base import Manifest, VerifyReport
from vargen.checkpoints.reader import CheckpointError, check_family, load_original, load_strict
from vargen.checkpoints.verify import convert_checkpoint, register_manifest, verify_checkpoint
from vargen.files import atomic_dir, atomic_write

__all__ = [
    "CheckpointError",
    "Family",
    "Manifest",
    "VerifyReport",
    "atomic_dir",
    "atomic_write",
    "check_family",
    "convert_checkpoint",
    "get_family",
    "guess_family",
    "known_families",
    "load_original",
    "load_strict",
    "register_family",
    "register_manifest",
    "resolve_model",
    "shipped_models",
    "verify_checkpoint",
]

MODELS_FOLDER = Path(__file__).parents[1] / "assets" / "models"


def shipped_models() -> list[str]:
    """Names of the models that come with the package, sorted."""
    if not MODELS_FOLDER.is_dir():
        return []
    # other folders beside them hold networks of metrics
    return sorted(index.parent.name for index in MODELS_FOLDER.glob("*/model_index.json"))


def resolve_model(name_or_path: str | Path) -> str:
    """Turn what a user typed into something ``from_pretrained`` takes.

    Args:
        name_or_path: name of a shipped model, path of a folder, or a Hub id ``organisation/model``.

    Returns:
        Path of a folder, or the Hub id unchanged.

    Raises:
        ValueError: none of these; nearest names are shown.
    """
    text = str(name_or_path)
    path = Path(name_or_path).expanduser()
    shipped = shipped_models()
    if text in shipped:
        return str(MODELS_FOLDER / text)
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise ValueError(f"{text} is a file, not a model folder; convert a published checkpoint with `vargen convert`")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text):
        return text
    if "/" in text or "\\" in text:
        raise ValueError(f"no model folder {text}; shipped models: {', '.join(shipped) or 'none'}")
    near = difflib.get_close_matches(text, shipped, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}" if near else f"shipped models: {', '.join(shipped) or 'none'}"
    raise ValueError(f"unknown model {text!r}; {hint}; a folder or a Hub id organisation/model also works")
