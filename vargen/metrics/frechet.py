"""Frechet distance between Gaussians fitted to features (Heusel et al., 2017, arXiv:1706.08500), in float64.

Also the extrapolation to infinitely many images (Chong and Forsyth, 2020, arXiv:1911.07023).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vargen.images import Rounding
from vargen.metrics.base import QuantisedMetric
from vargen.metrics.networks.registry import FeatureNetwork
from vargen.metrics.results import FrechetResult, protocol
from vargen.metrics.statistics import GaussianStatistics
from vargen.validation.extras import extra

with extra("eval", "vargen.metrics"):
    from torchmetrics.image.fid import FrechetInceptionDistance


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Return ``|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2)``.

    The trace of the root is the sum of the singular values of ``A^1/2 B^1/2``; the roots come from symmetric
    eigendecompositions in float64, with directions below the rounding of the largest one dropped. Unlike a general
    matrix root it neither turns complex nor loses digits when a covariance is singular (fewer images than features).

    Args:
        mean_a, mean_b: ``[D]``.
        covariance_a, covariance_b: ``[D, D]``.

    Returns:
        The squared distance, as the field prints it; never below 0.
    """
    mean_a, mean_b = mean_a.double(), mean_b.double()
    root_a, trace_a = _root(covariance_a)
    root_b, trace_b = _root(covariance_b)
    overlap = float(torch.linalg.svdvals(root_a.T @ root_b).sum()) if root_a.numel() and root_b.numel() else 0.0
    return max(float((mean_a - mean_b).square().sum()) + trace_a + trace_b - 2 * overlap, 0.0)


def _root(covariance: Tensor) -> tuple[Tensor, float]:
    """Return ``R [D, r]`` with ``R R^T`` the covariance, r its numerical rank, and its trace."""
    covariance = covariance.double()
    if not covariance.isfinite().all():
        raise ValueError("features hold NaN or infinity: the Frechet distance is undefined; check the images")
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp_min(0)
    return vectors[:, kept] * values[kept].sqrt(), float(covariance.trace())


def statistics_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """Frechet distance between two sets of statistics."""
    if a.num_features != b.num_features:
        raise ValueError(
            f"statistics have {a.num_features} and {b.num_features} features: they come from different networks or taps"
        )
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def frechet_infinity(
    features: Tensor, reference: GaussianStatistics, *, num_points: int = 10, seed: int = 0
) -> tuple[float, float]:
    """Extrapolate the distance linearly in 1/N to infinitely many generated images.

    Args:
        features: ``[N, D]`` of the generated images; subsets of N/2 to N of them are drawn.
        reference: statistics of the real images, whose own finite number is not extrapolated.

    Returns:
        The intercept and its standard error.
    """
    count = len(features)
    if count < 4 * num_points:
        raise ValueError(f"the extrapolation needs at least {4 * num_points} images, got {count}")
    generator = torch.Generator().manual_seed(seed)
    sizes = np.linspace(count // 2, count, num_points).astype(int)
    values = []
    for size in sizes:
        chosen = torch.randperm(count, generator=generator)[: int(size)]
        values.append(statistics_distance(GaussianStatistics.from_features(features, chosen), reference))
    (_, intercept), covariance = np.polyfit(1 / sizes, values, 1, cov=True)
    return float(intercept), float(covariance[1, 1] ** 0.5)


def frechet_error(features: Tensor, reference: GaussianStatistics, *, num_blocks: int = 20) -> float:
    """Return the standard error of the distance that comes from the finite sample of generated images.

    Jackknife over blocks (Efron and Tibshirani, 1993, chapter 11): image i belongs to block i mod ``num_blocks``, and
    the distance is computed without one block at a time. Unlike a bootstrap it repeats no image, and repeated images
    inflate the distance. The reference is taken as given. A 95 % interval is the value plus or minus 1.96 of these.

    Args:
        features: ``[N, D]`` of the generated images; they may lie on disk.
        reference: statistics of the real images.
    """
    if len(features) < 2 * num_blocks:
        raise ValueError(f"the standard error needs at least {2 * num_blocks} images, got {len(features)}")
    whole = GaussianStatistics.from_features(features)
    values = [
        statistics_distance(whole.without(GaussianStatistics.from_features(features, rows)), reference)
        for rows in (torch.arange(block, len(features), num_blocks) for block in range(num_blocks))
    ]
    return float(np.std(values) * (num_blocks - 1) ** 0.5)


class FrechetDistance(QuantisedMetric, FrechetInceptionDistance):
    """torchmetrics' FID over any feature network, computed in float64.

    Differences from the parent: floats in [0, 1] are rounded to uint8 as a PNG would be (the parent truncates, or not
    at all for custom networks); a rank without images is no error; statistics can be set and read; the result carries
    its protocol. The name is "FID" for the Inception network only.
    """

    def __init__(self, network: FeatureNetwork, *, rounding: Rounding = "nearest", **kwargs: Any) -> None:
        super().__init__(feature=network, **kwargs)
        self.set_rounding(rounding)

    @property
    def network(self) -> FeatureNetwork:
        """The feature network."""
        return self.inception

    @property
    def metric_name(self) -> str:
        """Name of a Frechet distance over this network."""
        return self.network.frechet_name

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add images: ``[B, 3, H, W]`` uint8, or float in [0, 1]; B may be 0."""
        self.add_features(self.network(self.quantise(imgs)), real)

    def add_features(self, features: Tensor, real: bool) -> None:
        """Add ``[B, D]`` features that the network has computed elsewhere."""
        x = features.detach().to(self.real_features_sum.device, torch.float64)
        side = "real" if real else "fake"
        self._set(side, x.sum(0), x.T @ x, len(x), add=True)

    def set_real(self, statistics: GaussianStatistics) -> None:
        """Use cached statistics of the real images; in a process group they are kept on rank 0 only.

        A sum over ranks would otherwise count them once per rank.
        """
        if statistics.num_features != self.network.num_features:
            raise ValueError(
                f"statistics have {statistics.num_features} features, {self.network.label} has {self.network.num_features}"
            )
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        weight = 1 if first else 0
        self._set("real", statistics.total * weight, statistics.outer * weight, statistics.count * weight, add=False)

    def set_fake(self, statistics: GaussianStatistics) -> None:
        """Use statistics of the generated images, of this rank only."""
        self._set("fake", statistics.total, statistics.outer, statistics.count, add=False)

    def statistics(self, real: bool) -> GaussianStatistics:
        """Return what has been added so far (on this rank)."""
        side = "real" if real else "fake"
        count = int(getattr(self, f"{side}_features_num_samples"))
        total, outer = getattr(self, f"{side}_features_sum"), getattr(self, f"{side}_features_cov_sum")
        return GaussianStatistics(count, total.double().cpu(), outer.double().cpu())

    def compute(self) -> Tensor:
        """Return the distance as a float64 scalar (the parent returns the dtype of the features)."""
        real, fake = self.statistics(True), self.statistics(False)
        if min(real.count, fake.count) < 2:
            raise ValueError(
                f"a Frechet distance needs at least 2 images a side, got {real.count} real and {fake.count} generated"
            )
        return torch.tensor(statistics_distance(real, fake), dtype=torch.float64)

    def result(self, **fields: Any) -> FrechetResult:
        """Return the distance with its protocol; ``fields`` may give the floor."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            counts = self.statistics(True).count, self.statistics(False).count
        shared = protocol(self.network, self.rounding_used, *counts)
        return FrechetResult(metric=self.metric_name, value=float(self.compute()), **shared, **fields)

    def _set(self, side: str, total: Tensor, outer: Tensor, count: int, *, add: bool) -> None:
        self.changed()
        for name, value in (("sum", total), ("cov_sum", outer), ("num_samples", torch.tensor(count))):
            state = getattr(self, f"{side}_features_{name}")
            value = value.to(state)
            setattr(self, f"{side}_features_{name}", state + value if add else value)
