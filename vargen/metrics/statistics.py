"""Gaussian statistics of features: sums in float64, so that shards and images need not be kept.

Letters: N samples, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vargen.files import atomic_write
from vargen.validation.arrays import open_npz
from vargen.validation.printable import printable, shown

_BLOCK = 512  # samples in float64 at a time
MAX_FEATURES = 4096  # D of a file where nobody says which network it is for: 128 MiB of covariance


@dataclass(frozen=True)
class GaussianStatistics:
    """Count, sum ``[D]`` and sum of outer products ``[D, D]`` of features, float64 on the CPU."""

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def from_features(cls, features: Tensor, rows: Tensor | None = None) -> GaussianStatistics:
        """Sum ``[N, D]`` features, or some of their rows, a block at a time: they may lie on disk."""
        width = features.shape[1]
        total, outer = (torch.zeros(size, dtype=torch.float64) for size in ((width,), (width, width)))
        rows = torch.arange(len(features)) if rows is None else rows
        for block in rows.split(_BLOCK):
            x = features.detach()[block.to(features.device)].to("cpu", torch.float64)
            total += x.sum(0)
            outer.addmm_(x.T, x)
        return cls(len(rows), total, outer)

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor, count: int) -> GaussianStatistics:
        """Rebuild the sums from a mean and an unbiased covariance (the ``mu`` and ``sigma`` of published files)."""
        mean, covariance = mean.double(), covariance.double()
        return cls(count, mean * count, covariance * (count - 1) + count * torch.outer(mean, mean))

    def without(self, other: GaussianStatistics) -> GaussianStatistics:
        """Take samples out again that are among these."""
        return GaussianStatistics(self.count - other.count, self.total - other.total, self.outer - other.outer)

    def __add__(self, other: GaussianStatistics) -> GaussianStatistics:
        return GaussianStatistics(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def num_features(self) -> int:
        """D, the width of a feature."""
        return len(self.total)

    @property
    def mean(self) -> Tensor:
        """Mean ``[D]``."""
        return self.total / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance ``[D, D]``; needs two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}; add images")
        mean = self.mean
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def save(self, path: str | Path) -> None:
        """Write ``mu``, ``sigma`` and ``num_samples`` as npz, the layout of published reference statistics."""
        with atomic_write(path, overwrite=True) as beside, open(beside, "wb") as stream:
            np.savez(stream, mu=self.mean.numpy(), sigma=self.covariance.numpy(), num_samples=np.int64(self.count))

    @classmethod
    def load(
        cls, path: str | Path, count: int | None = None, *, suffix: str = "", num_features: int | None = None
    ) -> GaussianStatistics:
        """Read npz with ``mu`` and ``sigma``.

        Args:
            path: the file.
            count: where the file does not say how many samples it holds.
            suffix: of both names; published files hold the spatial features of sFID as ``mu_s`` and ``sigma_s``.
            num_features: D that the file must have; None accepts up to 4096.

        Raises:
            ValueError: no such file, arrays missing, of another type, too large, or not of one size; NaN; a number of
                samples below two.
        """
        mu, sigma, name = f"mu{suffix}", f"sigma{suffix}", printable(path)
        with open_npz(path) as file:
            if mu not in file or sigma not in file:
                raise ValueError(f"{name} holds {shown(sorted(file.names)[:4])}, expected {mu} and {sigma}")
            width, shape = num_features or MAX_FEATURES, file.header(mu).shape
            if num_features is not None and len(shape) == 1 and shape != (num_features,):
                raise ValueError(
                    f"{name} holds statistics of {shown(shape[0])} features, the network has {num_features}; "
                    "they come from another network"
                )
            mean = torch.from_numpy(file.read(mu, "f", 1, 8 * width)).double()
            covariance = torch.from_numpy(file.read(sigma, "f", 2, 8 * width**2)).double()
            stored = file.count("num_samples", 2) if "num_samples" in file else count
        if covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{name}: {mu} {tuple(mean.shape)} and {sigma} {tuple(covariance.shape)} do not belong together"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"{name}: {mu} and {sigma} hold NaN or infinity; they cannot come from images")
        # 50,000 is what published files hold; the count enters only the bookkeeping of merges
        return cls.from_moments(mean, covariance, stored or 50_000)
