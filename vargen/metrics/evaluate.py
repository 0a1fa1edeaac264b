"""Evaluate a model or two image sets: distances, precision and recall, attribute accuracy, one report.

Protocols and traps: every number carries network, layer, counts, resize and rounding; where a second real set exists
the same metric between real images stands beside it (the floor).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vargen.images import Rounding
from vargen.metrics.attribute_accuracy import AttributeAccuracy
from vargen.metrics.conditions import Conditions, hero_conditions
from vargen.metrics.features import FeatureBank, Progress, extract, extract_cached
from vargen.metrics.frechet import FrechetDistance, frechet_infinity, statistics_distance
from vargen.metrics.generate import CHUNK, generate, ordered_images, samples_file
from vargen.metrics.heroes import draw_heroes
from vargen.metrics.images import ImageSet, NpzImages, read_images
from vargen.metrics.inception_score import InceptionScore
from vargen.metrics.kernel import KernelDistance
from vargen.metrics.networks import NAMES, FeatureNetwork, feature_network
from vargen.metrics.precision_recall import ManifoldPrecisionRecall, precision_recall
from vargen.metrics.report import Report, environment
from vargen.metrics.results import MetricResult
from vargen.metrics.statistics import GaussianStatistics

MAX_MANIFOLD = 10_000  # images a side for precision and recall, as the field takes; more are cut


@dataclass(frozen=True)
class Reference:
    """Features of the real images, and of a second real set where there is one."""

    bank: FeatureBank
    floor: tuple[FeatureBank, FeatureBank] | None
    floor_sets: str
    source: str


def evaluate_fid(
    pipe: Any,
    out: str | Path,
    *,
    num: int = 2000,
    reference: str | Path = "heroes",
    conditions: Conditions | None = None,
    network: str | FeatureNetwork = "lite0",
    seed: int = 0,
    chunk: int = CHUNK,
    rounding: Rounding = "nearest",
    settings: dict[str, Any] | None = None,
    model: str = "",
    infinity: bool = False,
    inception_score: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Draw ``num`` images and compare them with real ones.

    Args:
        pipe: an ``ImagePipeline``.
        out: folder for images, report and sample grid; an interrupted run goes on there.
        num: images, and heroes of the reference.
        reference: ``"heroes"``, a folder of images, an npz of images, or an npz with ``mu`` and ``sigma``.
        conditions: default for heroes: captions of fresh test heroes.
        network: name or ``FeatureNetwork``.
        seed: image i uses ``seed + i``.
        chunk: images decoded together.
        rounding: how pixels become 8 bits, see ``vargen.metrics.images.quantise``.
        settings: keywords of the pipeline call.
        model: name for the report.
        infinity: also extrapolate the distance to infinitely many images.
        inception_score: also compute it, from the network's logits.
        progress: called as the work goes on.

    Returns:
        The report, already written as ``report.json``, ``report.md`` and ``grid.png``.
    """
    if num < 2:
        raise ValueError(f"num must be at least 2, got {num}; distances need a covariance")
    network = feature_network(network)
    conditions = conditions or _default_conditions(reference, num)
    # everything that can fail for want of a file comes before the drawing
    attributes = AttributeAccuracy() if conditions.heroes is not None else None
    score = _inception_score(network) if inception_score else None
    real = load_reference(reference, num, network, progress=progress)
    dtype = str(getattr(pipe, "dtype", "")).removeprefix("torch.")
    record = {"model": model, "sampler": sampler_record(pipe), "dtype": dtype}
    drawn = generate(
        pipe,
        conditions,
        out,
        seed=seed,
        chunk=chunk,
        rounding=rounding,
        settings=settings,
        record=record,
        progress=progress,
    )
    images: ImageSet = NpzImages(samples_file(out))
    images.name = "generated images"
    results = _distances(real, extract(images, network, progress=progress), network, rounding, infinity=infinity)
    if score is not None:
        results.append(_score_of(score, images, rounding))
    if attributes is not None and conditions.heroes is not None:
        attributes.update(ordered_images(out), conditions.heroes.attributes, conditions.heroes.visible)
    protocol = {"num": num, "seed": seed, "chunk": chunk, "rounding": rounding, "conditions": conditions.source}
    report = Report(
        kind="fid",
        subject={**record, "settings": settings or {}},
        protocol={**protocol, "reference": real.source},
        results=[r.to_dict() for r in results],
        attributes=attributes.result().to_dict() if attributes is not None else None,
        decode=drawn.decode_record(),
        environment=environment(pipe),
    )
    report.write(out, grid=ordered_images(out, 64), captions=[str(v) for v in conditions.values()])
    return report


def compare(
    a: str | Path | ImageSet,
    b: str | Path | ImageSet,
    *,
    network: str | FeatureNetwork = "lite0",
    infinity: bool = False,
    inception_score: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compare two image sets; ``b`` is the reference and may be an npz with ``mu`` and ``sigma``.

    The floor is the distance between the two halves of ``b``, each with half its images and thus larger than the
    floor of the full count.
    """
    network = feature_network(network)
    images = read_images(a)
    real = load_reference(b, images.num_images, network, progress=progress)
    bank = extract(images, network, progress=progress)
    results = _distances(real, bank, network, "given as uint8", infinity=infinity)
    if inception_score:
        results.append(_score_of(_inception_score(network), images, "given as uint8"))
    return Report(
        kind="compare",
        subject={"images": images.name},
        protocol={"reference": real.source},
        results=[r.to_dict() for r in results],
        environment=environment(None),
    )


def load_reference(
    reference: str | Path | ImageSet, num: int, network: FeatureNetwork, *, progress: Progress | None = None
) -> Reference:
    """Return features of real images, cached where their digest allows it."""
    if isinstance(reference, str) and reference == "heroes":
        first, second = (draw_heroes(num, stream).image_set(f"{stream} heroes") for stream in ("reference", "floor"))
        bank, other = (extract_cached(s, network, progress=progress) for s in (first, second))
        return Reference(bank, (bank, other), "two fresh sets of real heroes", f"{num} fresh heroes")
    if isinstance(reference, str | Path) and _holds_moments(Path(reference)):
        statistics = GaussianStatistics.load(reference)
        if statistics.num_features != network.num_features:
            raise ValueError(
                f"{reference} holds statistics of {statistics.num_features} features, {network.label} has "
                f"{network.num_features}; they come from another network"
            )
        return Reference(FeatureBank(str(reference), statistics, None), None, "", f"statistics {reference}")
    images = read_images(reference)
    bank = extract_cached(images, network, progress=progress)
    return Reference(bank, bank.halves(), "two halves of the reference", f"{len(bank)} images of {images.name}")


def sampler_record(pipe: Any) -> dict[str, Any]:
    """Return class and settings of the pipeline's sampler as plain JSON values."""
    sampler = getattr(pipe, "sampler", None)
    if sampler is None:
        return {}
    config = {k: v for k, v in dict(getattr(sampler, "config", {})).items() if not k.startswith("_")}
    return {"name": type(sampler).__name__, **config}


def _default_conditions(reference: str | Path, num: int) -> Conditions:
    if str(reference) != "heroes":
        raise ValueError(
            "say what the model shall draw: a file of prompts (--prompts) or a number of classes (--classes)"
        )
    return hero_conditions(num)


def _distances(
    real: Reference, generated: FeatureBank, network: FeatureNetwork, rounding: str, *, infinity: bool
) -> list[MetricResult]:
    """Compute every metric that the kept features allow, each with its floor."""
    if real.bank.shape is not None and real.bank.shape != generated.shape:
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
        fields["infinity"] = _infinity(generated, real.bank)
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
        kernel.add_features(real.bank.features, True)
        kernel.add_features(generated.features, False)
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
    for bank, side in zip(real.floor, (True, False), strict=True):
        assert bank.features is not None
        metric.add_features(bank.features, side)
    return {**floor, "floor": float(metric.compute()[0])}


def _manifold_floor(real: Reference, floor: dict[str, Any]) -> dict[str, Any]:
    if real.floor is None or min(map(len, real.floor)) < 4:
        return {}
    a, b = (bank.features for bank in real.floor)
    assert a is not None
    assert b is not None
    precision, recall = precision_recall(a[:MAX_MANIFOLD], b[:MAX_MANIFOLD])
    return {**floor, "floor": precision, "floor_recall": recall}


def _infinity(generated: FeatureBank, real: FeatureBank) -> float:
    if generated.features is None:
        raise ValueError("the extrapolation needs the features of all images, which are too many to keep")
    return frechet_infinity(generated.features, real.statistics)[0]


def _inception_score(network: FeatureNetwork) -> InceptionScore:
    if network.name not in NAMES:
        raise ValueError(f"an Inception score needs the network {' or '.join(NAMES)}, got {network.name}")
    tap = "logits_unbiased" if network.name == "inception" else "logits"
    logits = feature_network(network.name, network.weights_file, tap=tap)
    return InceptionScore(logits.to(next(network.parameters()).device))


def _score_of(metric: InceptionScore, images: ImageSet, rounding: str) -> MetricResult:
    metric.splits = min(10, max(1, images.num_images // 100))  # a split of few images says nothing
    device = next(metric.inception.parameters()).device
    for batch in images.batches(64):
        metric.update(batch.to(device))
    metric.rounding_used = rounding
    return metric.result()


def _holds_moments(path: Path) -> bool:
    if path.suffix != ".npz" or not path.is_file():
        return False
    from vargen.metrics._files import open_npz

    with open_npz(path) as file:
        return "mu" in file and "sigma" in file


def _text(shape: tuple[int, int] | None) -> str:
    return f"{shape[1]}x{shape[0]}" if shape else "unknown"
