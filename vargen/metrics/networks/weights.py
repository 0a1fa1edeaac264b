"""Weights of feature networks: digests, strict loading, folders of small classifiers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor, nn

from vargen.files import atomic_write, make_folder
from vargen.validation.reading import read_json

_CONFIG, _WEIGHTS = "classifier.json", "model.safetensors"


def state_digest(module: Any) -> str:
    """Return the SHA-256 of a module's names and values as hex digits."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_classifier(folder: str | Path, module: Any, record: dict[str, Any]) -> None:
    """Write what a classifier is and its weights, half precision."""
    make_folder(folder)
    half = {name: v.half().contiguous() if v.is_floating_point() else v for name, v in module.state_dict().items()}
    with atomic_write(Path(folder) / _WEIGHTS, overwrite=True) as beside:
        beside.write_bytes(save(half))  # save_file would leave a file that only its owner can read
    with atomic_write(Path(folder) / _CONFIG, overwrite=True) as beside:
        beside.write_text(json.dumps(record, indent=1) + "\n")


def read_classifier(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return the record and the float32 weights of a classifier's folder; None where there is none."""
    path = Path(folder)
    if not (path / _CONFIG).is_file() or not (path / _WEIGHTS).is_file():
        return None
    record = read_json(path / _CONFIG)
    state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path / _WEIGHTS).items()}
    return record, state


def load_state(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load strictly; the error names the first few keys that do not fit."""
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = [k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape]
    if missing or extra or wrong:
        raise ValueError(
            f"weights do not fit {what}: missing {missing[:3]}, unexpected {extra[:3]}, wrong shape {sorted(wrong)[:3]}"
        )
    module.load_state_dict(state)
