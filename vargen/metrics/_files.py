"""Digests of files, and npz archives that fail with one clear line."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def state_digest(module: Any) -> str:
    """Return the SHA-256 of a module's names and values as hex digits."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def open_npz(path: str | Path) -> Iterator[Any]:
    """Open an npz without unpickling; a missing, truncated or foreign file is one ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"no file at {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            if not hasattr(file, "files"):
                raise ValueError(f"{path} is not an npz archive")
            yield file
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path} is truncated or not an npz archive: {error}") from error
