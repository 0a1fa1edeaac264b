"""Checkpoints of a training run: folders written beside and renamed, so that a killed run never leaves half of one.

Weights are safetensors. Optimizer states are read with ``weights_only=True``: a pickle builds tensors alone.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vargen.files import make_folder, writing
from vargen.validation.printable import printable
from vargen.validation.reading import read_json

T = TypeVar("T")
_RENAMED = {"mean": "exp_avg", "square": "exp_avg_sq"}
_PATTERN = re.compile(r"step-(\d+)")


def checkpoint_folders(run: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    found = [p for p in (run / "checkpoints").glob("step-*") if _PATTERN.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def save_checkpoint(
    run: Path,
    step: int,
    *,
    weights: Mapping[str, Mapping[str, Tensor]],
    optimizer: Mapping[str, Any],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write one checkpoint and delete all but the newest ``keep``.

    Args:
        run: run folder.
        step: number of finished steps.
        weights: file stem -> state dict, e.g. ``{"model": ..., "ema": ...}``.
        optimizer: anything ``torch.load(weights_only=True)`` can read back.
        state: plain values.
        keep: how many checkpoints stay, counted from this one backwards.

    Raises:
        ValueError: a weight is NaN or infinite; nothing is written, the older checkpoints stay.
        WriteError: the disk is full, or a file too large for the system or a limit; the older checkpoints stay.
    """
    for stem, tensors in weights.items():
        _check_finite(tensors, f"the weights of {stem!r} after step {step}")
    folder = run / "checkpoints" / f"step-{step:08d}"
    beside = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    make_folder(beside)
    with writing(folder, beside):
        for stem, tensors in weights.items():
            file = beside / f"{stem}.safetensors"
            with writing(file):
                save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file)
        with writing(beside / "optimizer.pt"):
            torch.save(dict(optimizer), beside / "optimizer.pt")
        (beside / "state.json").write_text(json.dumps(dict(state), indent=1), encoding="utf-8")
        for file in beside.iterdir():  # on disk before the name says so
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    before = folder.with_name(f".before-{folder.name}")
    if folder.exists():  # the same step written twice: a resumed run that stopped at once
        shutil.rmtree(before, ignore_errors=True)
        os.replace(folder, before)
    os.replace(beside, folder)
    shutil.rmtree(before, ignore_errors=True)
    older = checkpoint_folders(run)
    for old in older[: older.index(folder) + 1][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def load_state(folder: Path) -> dict[str, Any]:
    """Read ``state.json`` of a checkpoint."""
    state = read_json(folder / "state.json")
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0:
        raise ValueError(f"{printable(folder)} is no checkpoint of a run: its state.json holds no step")
    return state


def load_weights(folder: Path, stem: str) -> dict[str, Tensor]:
    """Read one state dict of a checkpoint.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    weights = load_file(folder / f"{stem}.safetensors")
    _check_finite(weights, f"the weights of {stem!r}")
    return weights


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity."""
    return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point() or t.is_complex())


def _check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    wrong = next((name for name, value in tensors.items() if not all_finite([value])), None)
    if wrong is not None:
        raise ValueError(f"{what} are not finite ({wrong})")


def load_newest(run: Path, load: Callable[[Path], T], *, set_aside: bool = False) -> T:
    """Load the newest checkpoint of a run that can be read; one line warns of each damaged one behind it.

    Args:
        run: its folder, which holds a checkpoint.
        load: reads a checkpoint's folder; whatever it raises means that the checkpoint is damaged.
        set_aside: rename damaged ones, so that the run can write those steps again. Only once an older one was read: what
            fails for all of them is not their damage.

    Raises:
        ValueError: none can be read.
    """
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(checkpoint_folders(run)):
        try:
            loaded = load(folder)
        except Exception as error:  # torch, safetensors and json raise whatever they trip over
            damaged.append((folder, " ".join(f"{error or type(error).__name__}".split())[:200]))
            continue
        for place, reason in damaged:
            warnings.warn(
                f"{printable(place)} is damaged ({printable(reason)}); {folder.name} is used instead", stacklevel=2
            )
            if set_aside:
                os.replace(place, place.with_name(f"damaged-{secrets.token_hex(2)}-{place.name}"))
        return loaded
    place, reason = damaged[0]
    raise ValueError(f"no checkpoint in {printable(run)} can be read; the newest, {place.name}: {printable(reason)}")


def load_optimizer(folder: Path) -> dict[str, Any]:
    """Read the optimizer's state of a checkpoint, on the CPU."""
    return dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Optimizer state by parameter name, so that it survives a change in the order of groups."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {names[p]: dict(state) for p, state in optimizer.state.items() if p in names}


def load_named_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, Mapping[str, Any]]
) -> None:
    """Put back what ``named_state`` returned, under the names of torch's AdamW where a checkpoint is older than its use."""
    for name, p in model.named_parameters():
        if name in saved:
            optimizer.state[p] = {
                _RENAMED.get(key, key): torch.tensor(float(value)) if key == "step" else value.to(p.device)
                for key, value in saved[name].items()
            }
