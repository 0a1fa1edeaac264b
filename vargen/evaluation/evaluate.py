"""Evaluate a model or two image sets: distances, precision and recall, attribute accuracy, one report.

Protocols and traps: every number carries network, layer, counts, resize and rounding; where a second real set exists
the same metric between real images stands beside it (the floor).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vargen.evaluation.conditions import Conditions, check_num, hero_conditions
from vargen.evaluation.distances import distances, load_reference, logit_score, score_of, stored_score
from vargen.evaluation.drawing.generate import CHUNK, TIMEOUT, Measure, generate, ordered_images, pack, process_rank
from vargen.evaluation.drawing.run_folder import RunImages
from vargen.evaluation.features import Progress, extract, stored_bank
from vargen.evaluation.images import ImageSet, described, read_images
from vargen.evaluation.report import Report, environment
from vargen.images import Rounding
from vargen.metrics.attribute_accuracy import AttributeAccuracy
from vargen.metrics.inception_score import InceptionScore
from vargen.metrics.networks.registry import FeatureNetwork, feature_network

if TYPE_CHECKING:
    from vargen.pipelines.image import ImagePipeline
    from vargen.samplers.base import Sampler


def evaluate_fid(
    pipe: ImagePipeline,
    out: str | Path,
    *,
    num: int = 2000,
    reference: str | Path | ImageSet = "heroes",
    conditions: Conditions | None = None,
    network: str | FeatureNetwork = "lite0",
    seed: int = 0,
    chunk: int = CHUNK,
    rounding: Rounding = "nearest",
    settings: dict[str, Any] | None = None,
    model: str = "",
    infinity: bool = False,
    interval: bool = False,
    inception_score: bool = False,
    keep_images: bool = True,
    npz: bool = False,
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
) -> Report | None:
    """Draw ``num`` images and compare them with real ones.

    Started several times on one folder, under ``accelerate launch``, torchrun or by hand, on one machine or on several
    with a common file system, the processes share the drawing; the images are the same whatever their number.

    Args:
        pipe: an ``ImagePipeline``.
        out: folder for images, report and sample grid; an interrupted run goes on there.
        num: images, and heroes of the reference.
        reference: ``"heroes"``, a folder of images, an npz of images, an npz with ``mu`` and ``sigma``, or what
            ``read_images`` returns (its ``rotate`` and ``background`` say how pictures are read).
        conditions: default for heroes: captions of fresh test heroes.
        network: name or ``FeatureNetwork``.
        seed: image i uses ``seed + i``.
        chunk: images decoded together.
        rounding: how pixels become 8 bits, see ``vargen.images.quantise``.
        settings: keywords of the pipeline call.
        model: name for the report.
        infinity: also extrapolate the distance to infinitely many images.
        interval: also compute the standard error of the distance, from which a 95 % interval follows.
        inception_score: also compute it, from the network's logits.
        keep_images: False stores features, digests and the first images only.
        npz: also write ``samples.npz`` for ADM's evaluator.
        timeout: seconds to wait for other processes while nothing gets finished.
        progress: called as the work goes on.

    Returns:
        The report, already written as ``report.json``, ``report.md`` and ``grid.png``; None on every rank but the first,
        where only images are drawn.

    Raises:
        ValueError: unusable settings, a folder of another run, a full disk, another process that hangs.
    """
    if num < 2:
        raise ValueError(f"num must be at least 2, got {num}; distances need a covariance")
    check_num(num)
    if npz and not keep_images:
        raise ValueError("samples.npz holds the images: keep_images=False cannot be combined with npz=True")
    network = feature_network(network)
    conditions = conditions or _default_conditions(reference, num)
    # everything that can fail for want of a file comes before the drawing
    attributes = AttributeAccuracy() if conditions.heroes is not None else None
    score = logit_score(network) if inception_score else None
    first = process_rank() == 0
    real = load_reference(reference, num, network, progress=progress) if first else None
    dtype = str(getattr(pipe, "dtype", "")).removeprefix("torch.")
    record = {"model": model, "sampler": sampler_record(getattr(pipe, "sampler", None)), "dtype": dtype}
    measures = _Measures(network, score, attributes, conditions, keep_images)
    drawn = generate(
        pipe,
        conditions,
        out,
        seed=seed,
        chunk=chunk,
        rounding=rounding,
        settings=settings,
        record=record,
        measures=measures.functions(),
        keep_images=keep_images,
        timeout=timeout,
        progress=progress,
    )
    if real is None:
        return None
    shape = RunImages(out).shape if keep_images else None
    bank = stored_bank("generated images", drawn.measured(measures.features), shape)
    results = distances(real, bank, network, rounding, infinity=infinity, interval=interval)
    if score is not None:
        results.append(stored_score(score, torch.from_numpy(drawn.measured(measures.logits)), rounding))
    if attributes is not None and conditions.heroes is not None:
        found = torch.from_numpy(drawn.measured(measures.attributes)).long()
        attributes.add_found(found, conditions.heroes.attributes, conditions.heroes.visible)
    if npz:
        pack(drawn, Path(out) / "samples.npz")
    protocol = {"num": num, "seed": seed, "chunk": chunk, "rounding": rounding, "conditions": conditions.source}
    digests = drawn.run.digests()
    report = Report(
        kind="fid",
        subject={**record, "settings": settings or {}},
        protocol={**protocol, "reference": real.source, "images_digest": _joint_digest(digests)},
        results=[r.to_dict() for r in results],
        attributes=attributes.result().to_dict() if attributes is not None else None,
        decode=drawn.decode_record(),
        environment=environment(pipe),
    )
    drawn.discard_maps()
    grid = ordered_images(out, 64) if keep_images else drawn.run.images(0)
    report.write(out, grid=grid, captions=[str(v) for v in conditions.values()[:64]])
    return report


@dataclass(frozen=True)
class _Measures:
    """What is computed on every chunk as it is drawn, and the names under which the results are kept."""

    network: FeatureNetwork
    score: InceptionScore | None
    accuracy: AttributeAccuracy | None
    conditions: Conditions
    keep_images: bool

    @property
    def features(self) -> str:
        return f"features-{self.network.digest()[:16]}"

    @property
    def logits(self) -> str:
        assert self.score is not None
        return f"logits-{self.score.inception.digest()[:16]}"

    @property
    def attributes(self) -> str:
        assert self.accuracy is not None
        return f"attributes-{self.accuracy.classifier.digest()[:16]}"

    def functions(self) -> dict[str, Measure]:
        functions: dict[str, Measure] = {self.features: lambda images, _: _features(self.network, images)}
        if self.score is not None:
            inception = self.score.inception
            functions[self.logits] = lambda images, _: _features(inception, images)
        if self.accuracy is not None:
            functions[self.attributes] = self._find
        return functions

    def _find(self, images: Tensor, start: int) -> np.ndarray:
        assert self.accuracy is not None
        assert self.conditions.heroes is not None
        asked = self.conditions.heroes.attributes[start : start + len(images)]
        return self.accuracy.find(images, asked).to(torch.int16).numpy()


def _features(network: FeatureNetwork, images: Tensor) -> np.ndarray:
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    return network(images.to(device)).cpu().numpy()


def _joint_digest(digests: list[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def compare(
    a: str | Path | ImageSet,
    b: str | Path | ImageSet,
    *,
    network: str | FeatureNetwork = "lite0",
    infinity: bool = False,
    interval: bool = False,
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
    results = distances(real, bank, network, "given as uint8", infinity=infinity, interval=interval)
    if inception_score:
        results.append(score_of(logit_score(network), images, "given as uint8"))
    return Report(
        kind="compare",
        subject={"images": described(images)},
        protocol={"reference": real.source},
        results=[r.to_dict() for r in results],
        environment=environment(None),
    )


def sampler_record(sampler: Sampler | None) -> dict[str, Any]:
    """Return class and settings of a pipeline's sampler as plain JSON values; {} for none."""
    if sampler is None:
        return {}
    config = {k: v for k, v in dict(getattr(sampler, "config", {})).items() if not k.startswith("_")}
    return {"name": type(sampler).__name__, **config}


def _default_conditions(reference: str | Path | ImageSet, num: int) -> Conditions:
    if str(reference) != "heroes":
        raise ValueError(
            "say what the model shall draw: a file of prompts (--prompts) or a number of classes (--classes)"
        )
    return hero_conditions(num)
