"""A small convolutional network that reads the parts of a 32x32 hero: one classification a slot.

It measures prompt adherence where captions are exact. Trained on fresh heroes with light noise, blur and colour
shifts, so that the reconstructions of a tokenizer are within what it has seen. It is a ruler, not a product: its own
accuracy on real heroes stands beside every number it gives (``vargen.metrics.attribute_accuracy``).

Letters: B images, S slots, A attribute ids, K classes of a slot ("nothing" first, then its parts).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.datasets.heroes.atlas import HeroAtlas
from vargen.datasets.heroes.compose import HeroesDataset, sample_heroes
from vargen.metrics.networks.weights import read_classifier, state_digest, write_classifier

CLASSIFIER_FOLDER = Path(__file__).parents[2] / "assets" / "models" / "heroes32-classifier"
_WIDTHS = (48, 96, 128)  # channels at 16x16, 8x8 and 4x4 pixels: 0.48M parameters with the heads
_SQUEEZED = 48  # channels of the 4x4 map that the heads read


class AttributeClassifier(nn.Module):
    """Read the attribute of every slot.

    Args:
        slot_ids: per slot, its attribute ids, "nothing" first.
    """

    def __init__(self, slot_ids: list[list[int]]) -> None:
        super().__init__()
        a, b, c = _WIDTHS
        self.slot_ids = [list(ids) for ids in slot_ids]
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), _convolution(12, a))
        self.body = nn.ModuleList(
            [_convolution(a, a), _convolution(a, b, 2), _convolution(b, b), _convolution(b, c, 2)]
        )
        self.squeeze = nn.Sequential(nn.Conv2d(c, _SQUEEZED, 1, bias=False), nn.BatchNorm2d(_SQUEEZED), nn.ReLU())
        self.dropout = nn.Dropout(0.1)
        self.heads = nn.Linear(_SQUEEZED * 16, sum(map(len, slot_ids)))
        self.real_accuracy: dict[str, float] = {}  # of the shipped weights: slot -> accuracy on fresh visible parts

    @classmethod
    def for_heroes(cls) -> AttributeClassifier:
        """Build an untrained classifier for the shipped atlas."""
        atlas = HeroAtlas.load()
        return cls([list(atlas.slot_ids(slot)) for slot in atlas.slots])

    def digest(self) -> str:
        """Return hex digits that change with the weights."""
        return state_digest(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Score every slot.

        Args:
            images: ``[B, 3, 32, 32]`` float in [0, 1].

        Returns:
            One ``[B, K]`` tensor of logits a slot.
        """
        x = self.stem(images * 2 - 1)
        for layer in self.body:
            y = layer(x)
            x = x + y if x.shape == y.shape else y
        flat = self.dropout(self.squeeze(x).flatten(1))
        return list(self.heads(flat).split([len(ids) for ids in self.slot_ids], dim=1))

    @torch.no_grad()
    def predict(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Return attribute ids ``[B, S]`` int64 of ``[B, 3, 32, 32]`` images, uint8 or float in [0, 1]."""
        if images.ndim != 4 or images.shape[1:] != (3, 32, 32):
            raise ValueError(f"the hero classifier reads [B, 3, 32, 32] images, got {tuple(images.shape)}")
        was_training, found = self.training, []
        self.eval()
        device = next(self.parameters()).device
        for part in images.split(batch_size):
            x = part.to(device)
            x = (x.float() / 255 if x.dtype == torch.uint8 else x).to(next(self.parameters()).dtype)
            best = [scores.argmax(1) for scores in self(x)]
            ids = [torch.tensor(ids, device=device)[i] for ids, i in zip(self.slot_ids, best, strict=True)]
            found.append(torch.stack(ids, 1).cpu())
        self.train(was_training)
        return torch.cat(found) if found else torch.zeros(0, len(self.slot_ids), dtype=torch.int64)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration and half-precision weights."""
        record = {"pictures": pictures_digest(), "slot_ids": self.slot_ids, "real_accuracy": self.real_accuracy}
        write_classifier(folder, self, record)

    @classmethod
    def from_pretrained(cls, folder: str | Path = CLASSIFIER_FOLDER) -> AttributeClassifier:
        """Load a classifier, by default the shipped one, in float32 and evaluation mode."""
        stored, how = read_classifier(folder), f"`vargen eval classifier --out {folder}`"
        if stored is None:
            raise ValueError(f"no hero classifier in {folder}: train one with {how}")
        record, state = stored
        if record["pictures"] != pictures_digest():
            raise ValueError(
                f"the classifier in {folder} was trained on other pictures of the heroes; train it again with {how}"
            )
        model = cls(record["slot_ids"])
        model.load_state_dict(state)
        model.real_accuracy = record["real_accuracy"]
        return model.eval()


def pictures_digest() -> str:
    """Return hex digits that change when the parts, their drawing order or the distribution of the heroes change."""
    return hashlib.sha256(sample_heroes(range(256)).images.tobytes()).hexdigest()[:16]


def train_classifier(
    *,
    num_steps: int = 3000,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    augment: bool = True,
    start: dict[str, Tensor] | None = None,
    on_step: Callable[[int, float], Any] | None = None,
) -> AttributeClassifier:
    """Train a classifier on fresh heroes of the training split; deterministic for a number of threads.

    The defaults see 384k heroes: about ten minutes on one core.

    Args:
        num_steps: optimiser steps.
        batch_size: heroes a step, each seen once.
        learning_rate: peak of a one-cycle schedule.
        seed: of the heroes, the weights and the noise.
        augment: light noise, blur and colour shifts.
        start: weights to go on from, for example of a classifier of other parts; None starts from random ones.
        on_step: called with the step and its loss.

    Raises:
        ValueError: fewer than one step or two heroes a step.
    """
    if num_steps < 1 or batch_size < 2:
        raise ValueError(f"num_steps must be >= 1 and batch_size >= 2, got {num_steps} and {batch_size}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AttributeClassifier.for_heroes().to(memory_format=torch.channels_last).train()
        if start is not None:
            model.load_state_dict(start)
        optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, learning_rate, total_steps=max(num_steps, 2), pct_start=0.15
        )
        batches: Iterator[dict[str, Tensor]] = iter(HeroesDataset(seed=seed, batch_size=batch_size))
        for step in range(num_steps):
            batch = next(batches)
            images = (batch["image"] + 1) / 2
            scores = model(_augment(images) if augment else images)
            loss = slot_loss(scores, batch["attributes"], batch["visible"], model.slot_ids)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            if on_step is not None:
                on_step(step + 1, loss.item())
    return model.eval()


def slot_loss(scores: list[Tensor], attributes: Tensor, visible: Tensor, slot_ids: list[list[int]]) -> Tensor:
    """Return the mean cross-entropy over slots that can be read: visible parts and empty slots, not hidden parts."""
    losses = []
    for index, (logits, ids) in enumerate(zip(scores, slot_ids, strict=True)):
        target = attributes[:, index] - ids[0]  # the ids of a slot are consecutive
        hidden = ~visible[:, index] & (target != 0)
        losses.append(F.cross_entropy(logits, target.masked_fill(hidden, -100), reduction="sum"))
    readable = visible | (attributes == torch.tensor([ids[0] for ids in slot_ids]))
    return torch.stack(losses).sum() / readable.sum().clamp_min(1)


def _augment(images: Tensor) -> Tensor:
    """Degrade ``[B, 3, H, W]`` images in [0, 1] by up to what a 28 dB reconstruction shows; half of them not at all."""
    b = len(images)
    strength = torch.rand(b, 1, 1, 1) * (torch.rand(b, 1, 1, 1) < 0.5)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images + 0.4 * strength * torch.rand(b, 1, 1, 1) * (blurred - images)
    shift = 0.02 * strength * torch.randn(b, 3, 1, 1)
    return (images + shift + 0.06 * strength * torch.randn_like(images)).clamp(0, 1)


def _convolution(channels: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=False))
