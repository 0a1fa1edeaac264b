"""What there is to choose from: shipped models, samplers and their short names, and which sampler fits which backbone.

Samplers are listed in ``vargen.samplers.registry``. Importing this module is cheap: no torch.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vargen
from vargen.features import Feature
from vargen.samplers.registry import SAMPLERS
from vargen.validation.folders import read_settings
from vargen.validation.places import INDEX_FILE, shipped_folders
from vargen.validation.places import resolve_model as resolve_model

CARD_FILE = "README.md"


@dataclass(frozen=True)
class ShippedModel:
    """A pipeline folder that comes with the package."""

    name: str
    folder: Path
    components: dict[str, str]  # component name -> class name, in the order of the index
    summary: str  # first line of prose of the card; empty without one
    pipeline: str = "ImagePipeline"  # class that loads it

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def shipped_models() -> list[ShippedModel]:
    """All shipped models, by name. A folder without an index (one that is being written) is not a model yet."""
    return [_read_model(folder) for folder in shipped_folders().values()]


def _read_model(folder: Path) -> ShippedModel:
    index = read_settings(folder / INDEX_FILE)
    components = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and all(entry)}
    pipeline = index.get("_class_name", ShippedModel.pipeline)
    return ShippedModel(folder.name, folder, components, _summary(folder / CARD_FILE), pipeline)


def _summary(card: Path) -> str:
    if not card.is_file():
        return ""
    text = re.sub(r"\A---\n.*?\n---\n", "", card.read_text(), flags=re.DOTALL)  # the card's YAML header
    prose = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(("#", "|", "!", "<"))]
    return prose[0] if prose else ""


def sampler_names() -> dict[str, str]:
    """Short name -> public class name of every sampler: ``{"next-token": "NextTokenSampler", "jacobi": ...}``.

    Example:
        >>> sampler_names()["next-token"]
        'NextTokenSampler'
    """
    return dict(SAMPLERS)


def sampler_class(name: str) -> Any:
    """Return the sampler class called ``name``, short or in full.

    Raises:
        ValueError: unknown name; the nearest are shown.
    """
    names = sampler_names()
    wanted = names.get(name.lower().replace("_", "-"), name)
    if wanted not in names.values():
        raise ValueError(f"unknown sampler {name!r}; {nearest(name, list(names))}")
    return getattr(vargen, wanted)


def nearest(name: str, known: list[str]) -> str:
    """Name the nearest known names, for an error message."""
    near = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.5)
    listed = f"known: {', '.join(known)}"
    return f"did you mean {' or '.join(near)}? {listed}" if near else listed


def fitting_samplers(backbone: Any) -> list[str]:
    """Short names of the samplers that a backbone, or its class, offers enough for."""
    return [name for name in sampler_names() if _fits(sampler_class(name), backbone)]


def _fits(sampler: Any, backbone: Any) -> bool:
    offered = Feature.of(backbone)
    return bool(sampler.required_features) and sampler.required_features <= offered


def swap_sampler(sampler: Any, name: str, backbone: Any) -> Any:
    """Return the sampler called ``name`` with the settings it shares with ``sampler``.

    Raises:
        ValueError: unknown name, or a sampler that does not fit the backbone; fitting ones are shown.
    """
    chosen = sampler_class(name)
    if isinstance(sampler, chosen):
        return sampler
    if not _fits(chosen, backbone):
        fitting = ", ".join(fitting_samplers(backbone)) or "none"
        raise ValueError(f"sampler {name!r} does not fit {type(backbone).__name__}; samplers that fit: {fitting}")
    return chosen.from_config(sampler.config)
