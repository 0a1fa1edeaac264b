"""What the metrics return: the number and everything needed to read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vargen.metrics.networks.registry import FeatureNetwork


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """A number with its protocol.

    ``floor`` is the same metric between two sets of real images (``floor_counts`` each, ``floor_sets`` says which):
    what a perfect model would score. It is None where no second real set exists.
    """

    metric: str  # "FID" only for the Inception network of FID, otherwise e.g. "FD-Lite0-112"
    value: float
    network: str
    tap: str
    num_features: int
    weights: str  # first eight hex digits of the SHA-256 of the network's weights
    resize: str
    rounding: str  # how pixels became uint8: "nearest", "truncate", or "given as uint8"
    num_reference: int
    num_generated: int
    floor: float | None = None
    floor_counts: tuple[int, int] | None = None
    floor_sets: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class FrechetResult(MetricResult):
    """A Frechet distance, and where asked for its extrapolation to infinitely many generated images, with errors.

    ``error`` is the standard error of the value over the generated images, ``infinity_error`` that of the extrapolation.
    """

    infinity: float | None = None
    infinity_error: float | None = None
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class KernelResult(MetricResult):
    """A kernel distance: mean over ``subsets`` draws of ``subset_size`` images a side, and their deviation."""

    std: float
    subsets: int
    subset_size: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class InceptionScoreResult(MetricResult):
    """An Inception score: mean over ``splits`` of a seeded permutation, and their deviation (nan for one split)."""

    std: float
    splits: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class PrecisionRecallResult(MetricResult):
    """Manifold precision (``value``) and recall at the k-th neighbour."""

    recall: float
    neighbours: int
    floor_recall: float | None = None


def protocol(network: FeatureNetwork, rounding: str, num_reference: int, num_generated: int) -> dict[str, Any]:
    """Fields that every ``MetricResult`` shares."""
    return {
        "network": network.name,
        "tap": network.tap,
        "num_features": network.num_features,
        "weights": network.weights,
        "resize": network.resize,
        "rounding": rounding,
        "num_reference": num_reference,
        "num_generated": num_generated,
    }
