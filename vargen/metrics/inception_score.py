"""Inception score: exp of the mean KL between p(y|x) and p(y) (Salimans et al., 2016, arXiv:1606.03498)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from vargen.images import Rounding
from vargen.metrics.base import FeatureListMetric
from vargen.metrics.networks.registry import FeatureNetwork
from vargen.metrics.results import InceptionScoreResult, protocol
from vargen.validation.extras import extra

with extra("eval", "vargen.metrics"):
    from torchmetrics.image.inception import InceptionScore as _InceptionScore

_BLOCK = 1024  # images whose logits are in float64 at a time


def split_scores(logits: Tensor, splits: int, seed: int = 0) -> Tensor:
    """Return ``[splits]`` scores of ``[N, C]`` logits, split along a permutation drawn from a seed.

    Images sorted by class would put few classes into each split and pull the score down several times. Logits are read
    a block at a time, so they may lie on disk.
    """
    if len(logits) < splits:
        raise ValueError(f"an Inception score over {splits} splits needs that many images, got {len(logits)}")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    split_of = torch.empty(len(logits), dtype=torch.int64)
    for number, members in enumerate(order.tensor_split(splits)):
        split_of[members] = number
    marginal = torch.zeros(splits, logits.shape[1], dtype=torch.float64)
    negative_entropy, counts = torch.zeros(splits, dtype=torch.float64), split_of.bincount(minlength=splits)
    for block, numbers in zip(logits.split(_BLOCK), split_of.split(_BLOCK), strict=True):
        log_probs = block.to("cpu", torch.float64).log_softmax(1)
        marginal.index_add_(0, numbers, log_probs.exp())
        negative_entropy.index_add_(0, numbers, (log_probs.exp() * log_probs).sum(1))
    marginal /= counts[:, None]
    return (negative_entropy / counts - torch.special.xlogy(marginal, marginal).sum(1)).exp()


class InceptionScore(FeatureListMetric, _InceptionScore):
    """torchmetrics' Inception score over any network tapped at its logits, in float64, with splits from a seed.

    Splits are drawn by place: the value moves, within its deviation, with the order in which images were added, and so with the
    number of processes, whose shards are gathered one after another. With ``splits=1`` it depends on neither.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        *,
        splits: int = 10,
        seed: int = 0,
        rounding: Rounding = "nearest",
        **kwargs: Any,
    ) -> None:
        if not network.tap.startswith("logits") and network.tap != "output":
            raise ValueError(f"an Inception score needs logits, got the tap {network.tap!r}; ask for tap='logits'")
        if splits < 1:
            raise ValueError(f"splits must be at least 1, got {splits}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            super().__init__(feature=network, splits=splits, **kwargs)
        self.seed, self.num_features = seed, network.num_features
        self.replace_lists("features")
        self.set_rounding(rounding)

    @property
    def metric_name(self) -> str:
        """ "IS" for the logits of the Inception network, otherwise "IS-" and the network."""
        return "IS" if self.inception.name == "inception" else f"IS-{self.inception.label}"

    def update(self, imgs: Tensor) -> None:
        """Add images: ``[B, 3, H, W]`` uint8, or float in [0, 1]."""
        self.add_features(self.inception(self.quantise(imgs)))

    def add_features(self, features: Tensor) -> None:
        """Add ``[B, D]`` logits."""
        self.changed()
        self.features.append(features.detach().to(self.device, torch.float64))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation over the splits, float64."""
        scores = split_scores(self.stacked("features"), self.splits, self.seed)
        return scores.mean(), scores.std() if self.splits > 1 else scores.new_tensor(float("nan"))

    def result(self, **fields: Any) -> InceptionScoreResult:
        """Return the score with its protocol."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            count = len(self.stacked("features"))
        mean, std = self.compute()
        return InceptionScoreResult(
            metric=self.metric_name,
            value=float(mean),
            std=float(std),
            splits=self.splits,
            seed=self.seed,
            **protocol(self.inception, self.rounding_used, 0, count),
            **fields,
        )
