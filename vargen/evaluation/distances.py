"""Reference features, and every metric that kept features allow, each with its floor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vargen.evaluation.features import FeatureBank, Progress, extract_cached
from vargen.evaluation.images import ImageSet, described, read_images
from vargen.metrics.frechet import FrechetDistance, frechet_error, frechet_infinity, statistics_distance
from vargen.metrics.heroes import HeroImages
from vargen.metrics.inception_score import InceptionScore
from vargen.metrics.kernel import KernelDistance
from vargen.metrics.networks.registry import NAMES, FeatureNetwork, feature_network
from vargen.metrics.precision_recall import ManifoldPrecisionRecall, precision_recall
from vargen.metrics.results import MetricResult
from vargen.metrics.statistics import GaussianStatistics
from vargen.validation.arrays import open_npz

MAX_MANIFOLD = 10_000  # images a side for precision and recall, as the field takes; more are cut


@dataclass(frozen=True)
class Reference:
    """Features of the real images, and of a second real set where there is one."""

    bank: FeatureBank
    floor: tuple[FeatureBank, FeatureBank] | None
    floor_sets: str
    source: str


def load_reference(
    reference: str | Path | ImageSet, num: int, network: FeatureNetwork, *, progress: Progress | None = None
) -> Reference:
    """Return features of real images, cached where their digest allows it."""
    if isinstance(reference, str) and reference == "heroes":
        first, second = (HeroImages(num, split) for split in ("reference", "floor"))
        bank, other = (extract_cached(s, network, progress=progress) for s in (first, second))
        return Reference(bank, (bank, other), "two fresh sets of real heroes", f"{num} fresh heroes")
    if isinstance(reference, str | Path) and _holds_moments(Path(reference)):
        suffix = "_s" if network.frechet_name == "sFID" else ""
        statistics = GaussianStatistics.load(reference, suffix=suffix, num_features=network.num_features)
        return Reference(FeatureBank(str(reference), statistics, None), None, "", f"statistics {reference}")
    images = read_images(reference)
    bank = extract_cached(images, network, progress=progress)
    return Reference(bank, bank.halves(), "two halves of the reference", f"{len(bank)} images of {described(images)}")


def distances(
    real: Reference,
    generated: FeatureBank,
    network: FeatureNetwork,
    rounding: str,
    *,
    infinity: bool,
    interval: bool = False,
) -> list[MetricResult]:
    """Compute every metric that the kept features allow, each with its floor.

    Args:
        real: reference images.
        generated: the images to judge.
        network: that computed both.
        rounding: for the results' protocol.
        infinity: also extrapolate the Frechet distance to infinitely many images.
        interval: also compute its standard error.
    """
    if None not in (real.bank.shape, generated.shape) and real.bank.shape != generated.shape:
        sizes = f"{generated.name}: {_text(generated.shape)}, {real.bank.name}: {_text(real.bank.shape)}"
        raise ValueError(f"image sizes differ ({sizes}); resize one set first, for the filter is part of the number")
    floor: dict[str, Any] = {}
    if real.floor is not None:
        a, b = real.floor
        floor = {"floor_counts": (len(a), len(b)), "floor_sets": real.floor_sets}
    frechet = FrechetDistance(network)
    frechet.rounding_used = rounding
    frechet.set_real(real.bank.statistics)
    fields = {**floor, "floor": statistics_distance(*(x.statistics for x in real.floor))} if real.floor else {}
    if infinity:
        fields["infinity"], fields["infinity_error"] = frechet_infinity(_kept(generated), real.bank.statistics)
    if interval:
        fields["error"] = frechet_error(_kept(generated), real.bank.statistics)
    frechet.set_fake(generated.statistics)
    results: list[MetricResult] = [frechet.result(**fields)]
    if real.bank.features is None or generated.features is None:
        return results
    return results + _list_metrics(real, generated, network, rounding, floor)


def _list_metrics(
    real: Reference, generated: FeatureBank, network: FeatureNetwork, rounding: str, floor: dict[str, Any]
) -> list[MetricResult]:
    assert real.bank.features is not None
    assert generated.features is not None
    results: list[MetricResult] = []
    if min(len(real.bank), len(generated)) >= 4:
        kernel = KernelDistance(network)
        kernel.rounding_used = rounding
        kernel.use_features(real.bank.features, generated.features)
        results.append(kernel.result(**_kernel_floor(real, floor, network)))
        least = min(len(real.bank), len(generated), MAX_MANIFOLD)  # equal counts, or recall is not comparable
        manifold = ManifoldPrecisionRecall(network)
        manifold.rounding_used = rounding
        manifold.add_features(real.bank.features[:least], True)
        manifold.add_features(generated.features[:least], False)
        results.append(manifold.result(**_manifold_floor(real, floor)))
    return results


def _kernel_floor(real: Reference, floor: dict[str, Any], network: FeatureNetwork) -> dict[str, Any]:
    if real.floor is None or min(map(len, real.floor)) < 4:
        return {}
    metric = KernelDistance(network)
    metric.use_features(*(_kept(bank) for bank in real.floor))
    return {**floor, "floor": float(metric.compute()[0])}


def _manifold_floor(real: Reference, floor: dict[str, Any]) -> dict[str, Any]:
    if real.floor is None or min(map(len, real.floor)) < 4:
        return {}
    a, b = (bank.features for bank in real.floor)
    assert a is not None
    assert b is not None
    precision, recall = precision_recall(a[:MAX_MANIFOLD], b[:MAX_MANIFOLD])
    return {**floor, "floor": precision, "floor_recall": recall}


def _kept(bank: FeatureBank) -> Tensor:
    if bank.features is None:
        raise ValueError(f"this needs the features of all images, and those of {bank.name} are too many to keep")
    return bank.features


def logit_score(network: FeatureNetwork) -> InceptionScore:
    """Return an Inception score over the logits of a distance's network."""
    if network.name not in NAMES:
        raise ValueError(f"an Inception score needs the network {' or '.join(NAMES)}, got {network.name}")
    tap = "logits_unbiased" if network.name == "inception" else "logits"
    logits = feature_network(network.name, network.weights_file, tap=tap)
    return InceptionScore(logits.to(next(network.parameters()).device))


def stored_score(metric: InceptionScore, logits: Tensor, rounding: str) -> MetricResult:
    """Score ``[N, C]`` logits, which may lie on disk."""
    metric.splits = _num_splits(len(logits))
    metric.changed()
    metric.features = [logits]
    metric.rounding_used = rounding
    return metric.result()


def _num_splits(num_images: int) -> int:
    return min(10, max(1, num_images // 100))  # a split of few images says nothing


def score_of(metric: InceptionScore, images: ImageSet, rounding: str) -> MetricResult:
    """Score an image set."""
    metric.splits = _num_splits(images.num_images)
    device = next(metric.inception.parameters()).device
    for batch in images.batches(64):
        metric.update(batch.to(device))
    metric.rounding_used = rounding
    return metric.result()


def _holds_moments(path: Path) -> bool:
    if path.suffix != ".npz" or not path.is_file():
        return False
    with open_npz(path) as file:
        return "mu" in file and "sigma" in file


def _text(shape: tuple[int, int] | None) -> str:
    return f"{shape[1]}x{shape[0]}" if shape else "unknown"
