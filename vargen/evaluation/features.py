"""Features of whole image sets, with those of references kept on disk.

The cache is keyed by network, weights, tap, resize and the digest of the data; it lies in ``$XDG_CACHE_HOME/vargen``
or ``~/.cache/vargen`` and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vargen.evaluation.images import ImageSet
from vargen.files import atomic_write
from vargen.metrics.networks.registry import FeatureNetwork
from vargen.metrics.statistics import GaussianStatistics
from vargen.validation.arrays import open_npz

Progress = Callable[[str, int, int], Any]  # what is being done, how many are done, of how many
MAX_KEPT = (
    2**25
)  # feature values (128 MiB) beyond which only sums are kept: 16k images of Inception, 300k of Lite0-112


@dataclass(frozen=True)
class FeatureBank:
    """Features of an image set: sums always, ``features [N, D]`` float32 (perhaps on disk) unless they are too many."""

    name: str
    statistics: GaussianStatistics
    features: Tensor | None
    shape: tuple[int, int] | None = None  # height, width of the images

    def __len__(self) -> int:
        return self.statistics.count

    def halves(self) -> tuple[FeatureBank, FeatureBank] | None:
        """Return every other image and the rest, where features are kept and each half has two images."""
        if self.features is None or len(self) < 4:
            return None
        parts = self.features[0::2], self.features[1::2]
        a, b = (FeatureBank(self.name, GaussianStatistics.from_features(x), x, self.shape) for x in parts)
        return a, b


def stored_bank(name: str, features: np.ndarray, shape: tuple[int, int] | None) -> FeatureBank:
    """Return the bank of ``[N, D]`` features in a memory map, which stay on disk."""
    tensor = torch.from_numpy(features)
    return FeatureBank(name, GaussianStatistics.from_features(tensor), tensor, shape)


def extract(
    images: ImageSet, network: FeatureNetwork, *, batch_size: int = 64, progress: Progress | None = None
) -> FeatureBank:
    """Run a feature network over an image set.

    Args:
        images: the set.
        network: on the device where it shall run.
        batch_size: images at a time; part of the numbers only through floating-point rounding.
        progress: called after every batch.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    keep = images.num_images * network.num_features <= MAX_KEPT
    kept, total, done = [], None, 0
    for batch in images.batches(batch_size):
        features = network(batch.to(device)).cpu()
        sums = GaussianStatistics.from_features(features)
        total = sums if total is None else total + sums
        done += len(batch)
        if keep:
            kept.append(features)
        if progress is not None:
            progress(f"features of {images.name}", done, images.num_images)
    if total is None:
        raise ValueError(f"no images in {images.name}")
    return FeatureBank(images.name, total, torch.cat(kept) if keep else None, images.shape)


def extract_cached(
    images: ImageSet,
    network: FeatureNetwork,
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
    folder: str | Path | None = None,
) -> FeatureBank:
    """Run a feature network over a reference, or read what an earlier run has stored.

    Networks whose weights have no digest (modules of the user) are never cached.
    """
    if not network.weights:
        return extract(images, network, batch_size=batch_size, progress=progress)
    key = {
        "network": network.name,
        "weights": network.weights,
        "tap": network.tap,
        "resize": network.resize,
        "data": images.digest(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = (Path(folder) if folder is not None else cache_folder()) / "features" / f"{digest[:32]}.npz"
    stored = _read(path, images, network.num_features)
    if stored is not None:
        return stored
    bank = extract(images, network, batch_size=batch_size, progress=progress)
    _write(path, bank, key)
    return bank


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/vargen``, by default ``~/.cache/vargen``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vargen"


def _read(path: Path, images: ImageSet, width: int) -> FeatureBank | None:
    """Read the bank of ``width`` features; None where the file is absent or damaged: a cache is never worth an error."""
    try:
        with open_npz(path) as file:
            count = file.count("count")
            total = torch.from_numpy(file.read("total", "f", 1, 8 * width))
            outer = torch.from_numpy(file.read("outer", "f", 2, 8 * width**2))
            features = torch.from_numpy(file.read("features", "f", 2)) if "features" in file else None
    except ValueError:
        return None
    if total.shape != (width,) or outer.shape != (width, width) or not bool(outer.isfinite().all()):
        return None
    if features is not None and features.shape != (count, width):
        return None
    return FeatureBank(images.name, GaussianStatistics(count, total.double(), outer.double()), features, images.shape)


def _write(path: Path, bank: FeatureBank, key: dict[str, str]) -> None:
    arrays: dict[str, Any] = {
        "count": np.int64(len(bank)),
        "total": bank.statistics.total.numpy(),
        "outer": bank.statistics.outer.numpy(),
        "key": np.array(json.dumps(key)),  # for people who look into the folder
    }
    if bank.features is not None:
        arrays["features"] = bank.features.numpy()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, overwrite=True) as beside, open(beside, "wb") as stream:
            np.savez(stream, **arrays)
    except (OSError, ValueError):  # a read-only home: the next run computes again
        return
