"""Drafters of a pipeline: several may be stored by name, one is in the slot.

A pipeline folder holds the drafter of its slot in ``drafter/`` and others in ``drafters/<name>/``, which are read when they
are first asked for. ``target.json`` beside a drafter's weights says which backbone it was trained for.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vargen.files import atomic_write
from vargen.samplers.registry import DRAFTERS, find_drafter
from vargen.validation.checks import check_choice
from vargen.validation.classes import component_class
from vargen.validation.folders import check_component, is_plain_name, read_settings

DRAFTERS_FOLDER = "drafters"
TARGET_FILE = "target.json"
SLOT = "drafter"
EARLIER = ("eagle",)  # components of folders that were saved when each kind had a slot of its own
_SAMPLED = 64  # numbers of each tensor that a digest reads


class StoredDrafters:
    """Drafters by name: modules, or folders of modules that nobody has asked for yet."""

    def __init__(self) -> None:
        self._entries: dict[str, Any] = {}

    @classmethod
    def of_folder(cls, folder: Path) -> StoredDrafters:
        """List the drafters of a pipeline folder and check what they name, before any is read.

        Raises:
            ValueError: a folder that holds code, or settings that name no drafter.
        """
        stored = cls()
        below = folder / DRAFTERS_FOLDER
        places = [folder / name for name in EARLIER] + (sorted(below.iterdir()) if below.is_dir() else [])
        for place in places:
            if place.is_dir() and is_plain_name(place.name):
                check_component(place, _stored_class(place), within=folder)
                stored._entries[place.name] = place
        return stored

    @property
    def names(self) -> list[str]:
        """Names that ``load`` knows."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def put(self, name: str, drafter: Any) -> None:
        """Keep a drafter under a name; None forgets what was kept there."""
        self._entries.pop(name, None)
        if drafter is not None:
            self._entries[name] = drafter

    def update(self, others: StoredDrafters) -> None:
        """Also keep those of another list, under their names."""
        self._entries |= others._entries

    def load(self, name: str, backbone: Any) -> Any:
        """Return a stored drafter, on the backbone's device and in its dtype, or one that needs no model.

        Raises:
            ValueError: no drafter of that name; the nearest is shown.
        """
        check_choice("drafter", name, [*self.names, *(free for free in DRAFTERS if free not in self)])
        if name not in self:
            return find_drafter(name)
        found = self._entries[name]
        if isinstance(found, Path):
            found = read_drafter(found)
            self._entries[name] = found
        if isinstance(found, nn.Module):
            found = found.to(backbone.device, backbone.dtype)
        return found

    def save(self, folder: Path) -> None:
        """Write every drafter below ``folder/drafters``."""
        for name, drafter in self._entries.items():
            place = folder / DRAFTERS_FOLDER / name
            if isinstance(drafter, Path):
                if drafter.resolve() != place.resolve():
                    shutil.copytree(drafter, place, dirs_exist_ok=True)
            else:
                write_drafter(place, drafter)


def _stored_class(place: Path) -> type:
    settings = read_settings(place / "config.json")
    return component_class("vargen", settings.get("_class_name"), SLOT)


def read_drafter(place: Path) -> Any:
    """Read a drafter from its folder, in evaluation mode, with the record of its target."""
    kind: Any = _stored_class(place)
    drafter = kind.from_pretrained(place).eval()
    if (place / TARGET_FILE).is_file():
        drafter.target_digest = read_settings(place / TARGET_FILE).get("digest")
    return drafter


def write_drafter(place: Path, drafter: Any) -> None:
    """Write a drafter and the record of its target to a folder."""
    drafter.save_pretrained(place)
    if digest := getattr(drafter, "target_digest", None):
        record_target(place, digest)


def record_target(place: Path, digest: str) -> None:
    """Say beside a drafter's weights which backbone it was trained for."""
    with atomic_write(place / TARGET_FILE, overwrite=True) as beside:
        beside.write_text(json.dumps({"digest": digest}) + "\n", encoding="utf-8")


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names, shapes and a sample of the numbers of a module, the same in every precision it is loaded in."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        if value.is_floating_point() and value.numel():
            flat = value.detach().reshape(-1)
            where = torch.linspace(0, flat.numel() - 1, min(_SAMPLED, flat.numel()), dtype=torch.float32).long()
            sample = flat[where.to(flat.device)].cpu().to(torch.bfloat16).view(torch.int16)
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def warn_of_other_target(drafter: Any, backbone: nn.Module) -> None:
    """Warn once where a drafter was trained for another backbone: its codes are the same, it saves fewer passes."""
    known = getattr(drafter, "target_digest", None)
    if known is None or getattr(drafter, "_target_compared", False):
        return
    drafter._target_compared = True
    if weights_digest(backbone) != known:
        warnings.warn(
            f"this {type(drafter).__name__} was trained for another {type(backbone).__name__}; exact samplers draw the "
            "same codes with it, in more passes",
            stacklevel=4,
        )
