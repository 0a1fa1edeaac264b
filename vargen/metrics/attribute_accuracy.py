"""Attribute accuracy of generated heroes: how many visible parts of the caption a classifier finds in the picture.

The number to quote is the *share*: accuracy on generated pictures over the classifier's accuracy on the real heroes of
the very same captions. The control pairs every picture with the caption of another one; it shows what a model that
ignores its prompt would score.

Letters: B images, S slots.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vargen.datasets.heroes.atlas import HeroAtlas
from vargen.datasets.heroes.compose import compose
from vargen.metrics.base import ExactMetric
from vargen.metrics.heroes import draw_heroes
from vargen.metrics.networks.attributes import AttributeClassifier
from vargen.validation.extras import extra

with extra("eval", "vargen.metrics"):
    from torchmetrics.utilities.data import dim_zero_cat


@dataclass(frozen=True, kw_only=True)
class AttributeResult:
    """Accuracy over visible slots; every value in [0, 1], shares may pass 1 by chance."""

    num_images: int
    num_slots: int  # visible parts that were counted
    accuracy: float  # on the generated pictures
    real_accuracy: float  # of the classifier on real heroes of the same captions
    share: float  # accuracy / real_accuracy
    shuffled_accuracy: float  # generated pictures against the captions of others
    per_slot: dict[str, dict[str, float]]  # slot -> accuracy, real_accuracy, share, count

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


class AttributeAccuracy(ExactMetric):
    """Compare what a classifier sees in generated heroes with what their captions asked for.

    Args:
        classifier: default: the shipped one.

    Example:
        >>> from vargen.metrics.heroes import draw_heroes
        >>> real = draw_heroes(32, "prompts")
        >>> metric = AttributeAccuracy()
        >>> metric.update(real.images, real.attributes, real.visible)
        >>> metric.result().share
        1.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    found: list[Tensor]
    real: list[Tensor]
    asked: list[Tensor]
    counted: list[Tensor]

    def __init__(self, classifier: AttributeClassifier | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classifier = classifier if classifier is not None else AttributeClassifier.from_pretrained()
        for name in ("found", "real", "asked", "counted"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, images: Tensor, attributes: Tensor, visible: Tensor) -> None:
        """Add generated heroes.

        Args:
            images: ``[B, 3, 32, 32]``, uint8 or float in [0, 1].
            attributes: ``[B, S]`` full attributes of the heroes whose captions were the prompts.
            visible: ``[B, S]`` bool, slots to count.
        """
        num_slots = len(self.classifier.slot_ids)
        if attributes.shape != (len(images), num_slots) or visible.shape != attributes.shape:
            raise ValueError(
                f"attributes and visible must be {(len(images), num_slots)}, "
                f"got {tuple(attributes.shape)} and {tuple(visible.shape)}"
            )
        self.add_found(self.find(images, attributes), attributes, visible)

    def find(self, images: Tensor, attributes: Tensor) -> Tensor:
        """Return ``[B, 2, S]`` int64: what the classifier sees in the images, and in real heroes of the same labels."""
        pictures = torch.from_numpy(compose(attributes.cpu().numpy())).permute(0, 3, 1, 2)
        return torch.stack([self.classifier.predict(images).cpu(), self.classifier.predict(pictures).cpu()], 1)

    def add_found(self, found: Tensor, attributes: Tensor, visible: Tensor) -> None:
        """Add what ``find`` returned earlier."""
        self.changed()
        self.found.append(found[:, 0].to(self.device))
        self.real.append(found[:, 1].to(self.device))
        self.asked.append(attributes.to(self.device))
        self.counted.append(visible.to(self.device))

    def compute(self) -> Tensor:
        """Return the share as a float64 scalar."""
        return torch.tensor(self._result().share, dtype=torch.float64)

    def result(self) -> AttributeResult:
        """Return all numbers."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            return self._result()

    def _result(self) -> AttributeResult:
        if isinstance(self.found, list) and not self.found:
            raise ValueError("attribute accuracy needs at least one image, got none")
        found, real, asked, counted = (
            dim_zero_cat(kept) for kept in (self.found, self.real, self.asked, self.counted)
        )
        if not counted.any():
            raise ValueError("attribute accuracy needs at least one visible part, got none")
        hits, real_hits = (found == asked) & counted, (real == asked) & counted
        accuracy, real_accuracy = _ratio(hits, counted), _ratio(real_hits, counted)
        # a shift by one pairs every picture with another caption and keeps how often each part is asked for
        shuffled = _ratio((found == asked.roll(1, 0)) & counted.roll(1, 0), counted)
        slots = HeroAtlas.load().slots
        per_slot = {}
        for index, slot in enumerate(slots):
            count = int(counted[:, index].sum())
            if count:
                got, best = _ratio(hits[:, index], counted[:, index]), _ratio(real_hits[:, index], counted[:, index])
                per_slot[slot] = {"accuracy": got, "real_accuracy": best, "share": _share(got, best), "count": count}
        return AttributeResult(
            num_images=len(found),
            num_slots=int(counted.sum()),
            accuracy=accuracy,
            real_accuracy=real_accuracy,
            share=_share(accuracy, real_accuracy),
            shuffled_accuracy=shuffled,
            per_slot=per_slot,
        )


def accuracy_on_real_heroes(classifier: AttributeClassifier, num: int = 4000) -> dict[str, float]:
    """Return the classifier's accuracy on fresh test heroes: visible parts of every slot, and "all" of them.

    "empty" is the share of empty slots that it calls empty.
    """
    real = draw_heroes(num, "reference")
    hits = classifier.predict(real.images) == real.attributes
    empty = real.attributes == torch.tensor([ids[0] for ids in classifier.slot_ids])
    accuracy = {"all": _ratio(hits & real.visible, real.visible), "empty": _ratio(hits & empty, empty)}
    for index, slot in enumerate(HeroAtlas.load().slots):
        accuracy[slot] = _ratio(hits[:, index] & real.visible[:, index], real.visible[:, index])
    return {name: round(value, 4) for name, value in accuracy.items()}


def _ratio(hits: Tensor, counted: Tensor) -> float:
    return float(hits.sum().double() / counted.sum().clamp_min(1))


def _share(accuracy: float, real_accuracy: float) -> float:
    return accuracy / real_accuracy if real_accuracy > 0 else float("nan")
