"""Quality metrics over torchmetrics: Frechet and kernel distances, precision and recall, attribute accuracy.

Every number is returned as a dataclass that says which network, which of its layers, how many images and which resize
and rounding stand behind it. A distance is called FID only when the 2015-12-05 Inception network computed it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_names = {
    "feature_network": "networks",
    "FeatureNetwork": "networks",
    "FrechetDistance": "frechet",
    "frechet_distance": "frechet",
    "frechet_infinity": "frechet",
    "FrechetVideoDistance": "fvd",
    "I3D": "i3d",
    "MotionClassifier": "motion",
    "measure_motion": "motion",
    "evaluate_motion": "motion_eval",
    "GaussianStatistics": "statistics",
    "KernelDistance": "kernel",
    "InceptionScore": "inception_score",
    "ManifoldPrecisionRecall": "precision_recall",
    "read_images": "images",
    "write_npz": "images",
    "quantise": "images",
    "evaluate_fid": "evaluate",
    "compare": "evaluate",
    "evaluate_reconstruction": "reconstruction",
    "evaluate_likelihood": "likelihood",
    "AttributeAccuracy": "attribute_accuracy",
    "AttributeClassifier": "attributes",
    "train_classifier": "attributes",
    "write_card": "card",
    "bench": "benchmark",
    "bench_table": "benchmark",
    "read_bench": "benchmark",
}

__all__ = list(_names)


def __getattr__(name: str) -> Any:
    if name not in _names:
        raise AttributeError(f"module 'vargen.metrics' has no attribute {name!r}")
    value = getattr(import_module(f"vargen.metrics.{_names[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_names])
