"""Checkpoints of a training run: folders written beside and renamed, so that a killed run never leaves half of one.

Weights are safetensors. Optimizer states are read with ``weights_only=True``: nothing is ever unpickled into code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vargen.files import atomic_write, make_folder, writing
from vargen.validation.printable import printable
from vargen.validation.reading import parse_json, read_json

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
        keep: how many checkpoints stay.

    Raises:
        WriteError: the disk is full, or a file too large for the system or a limit; the older checkpoints stay.
    """
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
    if folder.exists():  # the same step written twice: a resumed run that stopped at once
        shutil.rmtree(folder)
    os.replace(beside, folder)
    for old in checkpoint_folders(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def load_state(folder: Path) -> dict[str, Any]:
    """Read ``state.json`` of a checkpoint."""
    state = read_json(folder / "state.json")
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0:
        raise ValueError(f"{printable(folder)} is no checkpoint of a run: its state.json holds no step")
    return state


def load_weights(folder: Path, stem: str) -> dict[str, Tensor]:
    """Read one state dict of a checkpoint."""
    return load_file(folder / f"{stem}.safetensors")


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


def keep_metrics_until(file: Path, step: int) -> None:
    """Drop the lines of a metrics file that lie behind ``step``: the resumed run writes them again."""
    if not file.is_file():
        return
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if parse_json(line, file.name).get("step", 0) <= step:
                lines.append(line)
        except (ValueError, TypeError, AttributeError):  # the line that a kill cut off
            continue
    with atomic_write(file, overwrite=True) as beside:
        beside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
