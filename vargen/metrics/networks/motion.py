"""A small network that names the motion of a moving hero: the ruler for prompts of videos.

Trained on fresh clips with light noise, so that what a tokenizer gives back is within what it has seen. Its own accuracy on
real clips stands beside every number it gives. The parts of the hero are read by the classifier of still heroes, on the
frame in which the motion shows the hero where a still picture has it.

Letters: B clips, T frames, M motions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vargen.datasets.heroes.atlas import HeroAtlas
from vargen.datasets.heroes.compose import compose
from vargen.datasets.motion.compose import FRAMES, MOTIONS, sample_clips
from vargen.datasets.motion.dataset import MotionDataset
from vargen.metrics.networks.weights import read_classifier, state_digest, write_classifier

MOTION_CLASSIFIER_FOLDER = Path(__file__).parents[2] / "assets" / "models" / "heroes-video-classifier"
_WIDTH = 48
_CENTRED = {"walking left": 8, "walking right": 8, "rising from the ground": 16}  # frame with the hero in its place


class MotionClassifier(nn.Module):
    """Score the motions: frames and their changes, convolved in space, then in time."""

    def __init__(self) -> None:
        super().__init__()
        w = _WIDTH
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(96, w, 1), nn.ReLU())
        self.space = nn.Sequential(nn.Conv2d(w, w, 3, stride=2, padding=1), nn.ReLU())
        self.squeeze = nn.Linear(16 * w, 64)
        self.time = nn.ModuleList([nn.Conv1d(64, 64, 5, padding=2), nn.Conv1d(64, 64, 5, padding=2)])
        self.head = nn.Linear(128, len(MOTIONS))
        self.real_accuracy = 0.0  # of the shipped weights: share of fresh clips that are named rightly

    def digest(self) -> str:
        """Return hex digits that change with the weights."""
        return state_digest(self)

    def forward(self, clips: Tensor) -> Tensor:
        """Score clips.

        Args:
            clips: ``[B, 3, T, 32, 32]`` float in [0, 1].

        Returns:
            ``[B, M]`` logits.
        """
        before = torch.cat([clips[:, :, :1], clips[:, :, :-1]], dim=2)
        both = torch.cat([clips * 2 - 1, 4 * (clips - before)], dim=1)
        frames = self.space(self.stem(rearrange(both, "b c t h w -> (b t) c h w")))
        x = rearrange(F.relu(self.squeeze(frames.flatten(1))), "(b t) c -> b c t", b=len(clips))
        for layer in self.time:
            x = x + F.relu(layer(x))
        return self.head(torch.cat([x.mean(2), x.amax(2)], dim=1))

    @torch.no_grad()
    def predict(self, clips: Tensor, batch_size: int = 32) -> Tensor:
        """Return positions in ``MOTIONS``, ``[B]`` int64, of clips ``[B, 3, T, 32, 32]``, uint8 or float in [0, 1]."""
        if clips.ndim != 5 or clips.shape[1] != 3 or tuple(clips.shape[3:]) != (32, 32):
            raise ValueError(f"the motion classifier reads [B, 3, T, 32, 32] clips, got {tuple(clips.shape)}")
        parts = [p.float() / 255 if p.dtype == torch.uint8 else p.float() for p in clips.split(batch_size)]
        return torch.cat([self(p).argmax(1) for p in parts]) if parts else torch.zeros(0, dtype=torch.int64)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration and half-precision weights."""
        record = {"clips": clips_digest(), "motions": MOTIONS, "real_accuracy": self.real_accuracy}
        write_classifier(folder, self, record)

    @classmethod
    def from_pretrained(cls, folder: str | Path = MOTION_CLASSIFIER_FOLDER) -> MotionClassifier:
        """Load a classifier, by default the shipped one, in float32 and evaluation mode.

        Raises:
            ValueError: there is none, or it was trained on other clips.
        """
        stored, how = read_classifier(folder), "train one with vargen.metrics.networks.motion.train_motion_classifier"
        if stored is None:
            raise ValueError(f"no motion classifier in {folder}; {how}")
        record, state = stored
        if record["clips"] != clips_digest():
            raise ValueError(f"the classifier in {folder} was trained on other clips; {how}")
        model = cls()
        model.load_state_dict(state)
        model.real_accuracy = record["real_accuracy"]
        return model.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class MotionAccuracy:
    """How often clips show the motion and the parts that were asked for; ``real`` are clips composed of the same labels."""

    num_clips: int
    motion: float
    motion_real: float
    motion_shuffled: float  # against the prompts of other clips: what chance would give
    parts: float  # share of the visible parts that the hero classifier reads as asked
    parts_real: float
    parts_shuffled: float
    by_motion: dict[str, float]

    @property
    def motion_share(self) -> float:
        """Accuracy of the motion as a share of the classifier's own on real clips."""
        return self.motion / max(self.motion_real, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            **asdict(self),
            "motion_share": self.motion_share,
            "parts_share": self.parts / max(self.parts_real, 1e-9),
        }


def clips_digest() -> str:
    """Return hex digits that change when parts, motions or the distribution of clips change."""
    return hashlib.sha256(sample_clips(range(32)).clips.tobytes()).hexdigest()[:16]


def measure_motion(
    clips: Tensor, labels: Tensor, real: Tensor, classifier: MotionClassifier | None = None
) -> MotionAccuracy:
    """Compare generated clips with the labels they were asked for.

    Args:
        clips: ``[B, 3, 17, 32, 32]`` uint8, generated.
        labels: ``[B, S]`` attribute ids, the motion last; none of them 0.
        real: ``[B, 3, 17, 32, 32]`` uint8, composed of the same labels.
        classifier: default: the shipped one.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if clips.shape != real.shape or len(clips) != len(labels):
        got = f"{tuple(clips.shape)}, {tuple(real.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"generated clips, real clips and labels must belong together, got {got}")
    if clips.shape[2] != FRAMES[-1]:
        raise ValueError(f"motions are measured on whole clips of {FRAMES[-1]} frames, got {clips.shape[2]}")
    from vargen.metrics.networks.attributes import AttributeClassifier

    classifier = classifier or MotionClassifier.from_pretrained()
    wanted = labels[:, -1] - HeroAtlas.load().num_attributes
    found, found_real = classifier.predict(clips), classifier.predict(real)
    shuffled = wanted.roll(1)
    reader = AttributeClassifier.from_pretrained()
    visible = _visible(labels[:, :-1])
    parts = _centred(clips, wanted, reader) == labels[:, :-1]
    parts_real = _centred(real, wanted, reader) == labels[:, :-1]
    others = _centred(clips, wanted, reader) == labels[:, :-1].roll(1, 0)
    right = (found == wanted).float()
    return MotionAccuracy(
        num_clips=len(clips),
        motion=right.mean().item(),
        motion_real=(found_real == wanted).float().mean().item(),
        motion_shuffled=(found == shuffled).float().mean().item(),
        parts=parts[visible].float().mean().item(),
        parts_real=parts_real[visible].float().mean().item(),
        parts_shuffled=others[visible.roll(1, 0)].float().mean().item(),
        by_motion={m: right[wanted == i].mean().item() for i, m in enumerate(MOTIONS) if bool((wanted == i).any())},
    )


def train_motion_classifier(
    *,
    num_steps: int = 500,
    batch_size: int = 32,
    seed: int = 0,
    start: dict[str, Tensor] | None = None,
    on_step: Callable[[int, float], Any] | None = None,
) -> MotionClassifier:
    """Train a classifier on fresh clips of the training split; deterministic for a number of threads.

    Args:
        num_steps: optimiser steps; the default sees 16k clips, two minutes on one core.
        batch_size: clips a step, each seen once.
        seed: of the clips, the weights and the noise.
        start: weights to go on from; None starts from random ones.
        on_step: called with the step and its loss.

    Raises:
        ValueError: fewer than one step or clip.
    """
    if num_steps < 1 or batch_size < 1:
        raise ValueError(f"num_steps and batch_size must be >= 1, got {num_steps} and {batch_size}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MotionClassifier().train()
        if start is not None:
            model.load_state_dict(start)
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=max(num_steps, 2), pct_start=0.1)
        data = MotionDataset(seed)
        for step in range(num_steps):
            batch = data.examples(np.arange(step * batch_size, (step + 1) * batch_size))
            clips = (batch["clip"] + 1) / 2
            strength = 0.05 * torch.rand(batch_size, 1, 1, 1, 1)
            scores = model((clips + strength * torch.randn_like(clips)).clamp(0, 1))
            loss = F.cross_entropy(scores, batch["labels"][:, -1] - HeroAtlas.load().num_attributes)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            if on_step is not None:
                on_step(step + 1, loss.item())
    return model.eval().requires_grad_(False)


def real_accuracy(classifier: MotionClassifier, num_clips: int = 1000, seed: int = 1) -> float:
    """Share of fresh clips of the test split that a classifier names rightly."""
    batch = MotionDataset(seed, split="test").examples(np.arange(num_clips))
    wanted = batch["labels"][:, -1] - HeroAtlas.load().num_attributes
    return (classifier.predict((batch["clip"] + 1) / 2) == wanted).float().mean().item()


def _centred(clips: Tensor, motions: Tensor, reader: Any) -> Tensor:
    """Attribute ids that the hero classifier reads, ``[B, S - 1]``."""
    frame = torch.tensor([_CENTRED.get(motion, 0) for motion in MOTIONS])[motions]
    return reader.predict(clips[torch.arange(len(clips)), :, frame])


def _visible(attributes: Tensor) -> Tensor:
    """Parts of which something can be seen: the picture changes without them."""
    whole = compose(attributes.numpy())
    atlas = HeroAtlas.load()
    columns = []
    for slot, name in enumerate(atlas.slots):
        without = attributes.clone()
        without[:, slot] = atlas.none_id(name)
        changed = (compose(without.numpy()) != whole).any(-1).sum((1, 2))
        columns.append(torch.from_numpy(changed >= 8))
    return torch.stack(columns, 1)
