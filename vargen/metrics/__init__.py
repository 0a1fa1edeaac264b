"""Quality metrics over torchmetrics: Frechet and kernel distances, precision and recall, attribute accuracy.

Every number is returned as a dataclass that says which network, which of its layers, how many images and which resize
and rounding stand behind it. A distance is called FID only when the 2015-12-05 Inception network computed it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_names = {
    "feature_network": "metrics.networks.registry",
    "FeatureNetwork": "metrics.networks.registry",
    "FrechetDistance": "metrics.frechet",
    "frechet_distance": "metrics.frechet",
    "frechet_infinity": "metrics.frechet",
    "FrechetVideoDistance": "metrics.fvd",
    "I3D": "metrics.networks.i3d",
    "MotionClassifier": "metrics.networks.motion",
    "measure_motion": "metrics.networks.motion",
    "evaluate_motion": "evaluation.motion",
    "GaussianStatistics": "metrics.statistics",
    "KernelDistance": "metrics.kernel",
    "InceptionScore": "metrics.inception_score",
    "ManifoldPrecisionRecall": "metrics.precision_recall",
    "read_images": "evaluation.images",
    "write_npz": "evaluation.images",
    "quantise": "images",
    "evaluate_fid": "evaluation.evaluate",
    "compare": "evaluation.evaluate",
    "evaluate_reconstruction": "evaluation.reconstruction",
    "evaluate_likelihood": "evaluation.likelihood",
    "AttributeAccuracy": "metrics.attribute_accuracy",
    "AttributeClassifier": "metrics.networks.attributes",
    "train_classifier": "metrics.networks.attributes",
    "write_card": "evaluation.card",
    "bench": "evaluation.benchmark",
    "bench_table": "evaluation.benchmark",
    "read_bench": "evaluation.benchmark",
}

__all__ = list(_names)


def __getattr__(name: str) -> Any:
    if name not in _names:
        raise AttributeError(f"module 'vargen.metrics' has no attribute {name!r}")
    value = getattr(import_module(f"vargen.{_names[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_names])
