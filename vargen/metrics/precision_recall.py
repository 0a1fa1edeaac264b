"""Manifold precision and recall (Kynkaanniemi et al., 2019, arXiv:1904.06991)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vargen.images import Rounding
from vargen.metrics.base import FeatureListMetric
from vargen.metrics.networks.registry import FeatureNetwork
from vargen.metrics.results import PrecisionRecallResult, protocol

_BLOCK = 1024  # rows of a distance matrix that are held at a time


def neighbour_radii(features: Tensor, neighbours: int) -> Tensor:
    """Return ``[N]``: the distance of each of ``[N, D]`` features to its k-th nearest other one."""
    radii = []
    for start in range(0, len(features), _BLOCK):
        distances = _distances(features[start : start + _BLOCK], features)
        rows = torch.arange(len(distances), device=features.device)
        distances[rows, rows + start] = -1  # itself comes first, whatever duplicates exist
        radii.append(distances.kthvalue(neighbours + 1, dim=1).values)
    return torch.cat(radii)


def share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Return the share of ``[M, D]`` points that lie in a ball of at least one of ``[N, D]`` centres."""
    inside = [
        (_distances(points[start : start + _BLOCK], centres) <= radii).any(1)
        for start in range(0, len(points), _BLOCK)
    ]
    return float(torch.cat(inside).double().mean())


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Return precision (generated images on the real manifold) and recall (real images on the generated one).

    Args:
        real, generated: ``[N, D]`` features, more than ``neighbours`` a side. Both shares grow with fewer samples,
            so compare only equal numbers.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(
            f"precision and recall with k={neighbours} need more than {neighbours} images a side, "
            f"got {len(real)} real and {len(generated)} generated"
        )
    real, generated = real.double(), generated.double()
    precision = share_inside(generated, real, neighbour_radii(real, neighbours))
    recall = share_inside(real, generated, neighbour_radii(generated, neighbours))
    return precision, recall


class ManifoldPrecisionRecall(FeatureListMetric):
    """Precision and recall as a torchmetrics metric; keeps all features.

    Args:
        network: whose features are compared.
        neighbours: k; the radius of a ball is the distance to the k-th nearest neighbour.
        reset_real_features: False keeps the real images when the metric is reset, as torchmetrics' FID and KID do.
        rounding: see ``vargen.images.quantise``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    real_features: list[Tensor]
    fake_features: list[Tensor]

    def __init__(
        self,
        network: FeatureNetwork,
        *,
        neighbours: int = 3,
        reset_real_features: bool = True,
        rounding: Rounding = "nearest",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {neighbours}")
        self.network, self.neighbours, self.num_features = network, neighbours, network.num_features
        if not isinstance(reset_real_features, bool):
            raise ValueError(f"reset_real_features must be True or False, got {reset_real_features!r}")
        self.reset_real_features = reset_real_features
        self.replace_lists("real_features", "fake_features")
        self.set_rounding(rounding)

    def reset(self) -> None:
        """Forget the images; the real ones only with ``reset_real_features``."""
        kept = list(self.real_features)  # the parent empties the list itself
        super().reset()
        if not self.reset_real_features:
            self.real_features = kept

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add images: ``[B, 3, H, W]`` uint8, or float in [0, 1]."""
        self.add_features(self.network(self.quantise(imgs)), real)

    def add_features(self, features: Tensor, real: bool) -> None:
        """Add ``[B, D]`` features that the network has computed elsewhere."""
        kept = self.real_features if real else self.fake_features
        self.changed()
        kept.append(features.detach().to(self.device, torch.float64))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return precision and recall, float64 scalars."""
        values = precision_recall(self.stacked("real_features"), self.stacked("fake_features"), self.neighbours)
        return torch.tensor(values[0], dtype=torch.float64), torch.tensor(values[1], dtype=torch.float64)

    def result(self, **fields: Any) -> PrecisionRecallResult:
        """Return both shares with their protocol."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            counts = len(self.stacked("real_features")), len(self.stacked("fake_features"))
        precision, recall = self.compute()
        return PrecisionRecallResult(
            metric=f"Precision-{self.network.label}",
            value=float(precision),
            recall=float(recall),
            neighbours=self.neighbours,
            **protocol(self.network, self.rounding_used, *counts),
            **fields,
        )


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # the default of cdist turns to a matrix product that loses the digits of near neighbours
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
