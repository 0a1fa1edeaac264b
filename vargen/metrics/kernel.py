"""Kernel distance: unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al., 2018, arXiv:1801.01401)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from vargen.images import Rounding
from vargen.metrics.base import FeatureListMetric
from vargen.metrics.networks.registry import FeatureNetwork
from vargen.metrics.results import KernelResult, protocol
from vargen.validation.extras import extra

with extra("eval", "vargen.metrics"):
    from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd


class KernelDistance(FeatureListMetric, KernelInceptionDistance):
    """torchmetrics' KID over any feature network, in float64, with subsets drawn from a seed.

    ``subset_size=None`` takes the smaller of 1000 and half the smaller side. The parent draws subsets from the global
    generator, so that two ranks disagree, and cannot gather uneven shards.

    Subsets are drawn by place: the value moves, within its deviation, with the order in which images were added, and so with the
    number of processes, whose shards are gathered one after another.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        *,
        subsets: int = 100,
        subset_size: int | None = None,
        seed: int = 0,
        rounding: Rounding = "nearest",
        **kwargs: Any,
    ) -> None:
        if subset_size is not None and subset_size < 2:
            raise ValueError(f"subset_size must be at least 2, or None to choose it by the images, got {subset_size}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "will save all extracted features": said in our docstring
            super().__init__(
                feature=network, subsets=subsets, subset_size=1000 if subset_size is None else subset_size, **kwargs
            )
        self.wanted_size, self.seed, self.num_features = subset_size, seed, network.num_features
        self.replace_lists("real_features", "fake_features")
        self.set_rounding(rounding)

    @property
    def metric_name(self) -> str:
        """ "KID", or "KD-" and the network."""
        return "KID" if self.inception.is_fid_network else f"KD-{self.inception.label}"

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add images: ``[B, 3, H, W]`` uint8, or float in [0, 1]."""
        self.add_features(self.inception(self.quantise(imgs)), real)

    def add_features(self, features: Tensor, real: bool) -> None:
        """Add ``[B, D]`` features that the network has computed elsewhere."""
        kept = self.real_features if real else self.fake_features
        self.changed()
        kept.append(features.detach().to(self.device, torch.float64))

    def use_features(self, real: Tensor, fake: Tensor) -> None:
        """Take ``[N, D]`` and ``[M, D]`` features as they are, without a copy: they may lie on disk."""
        self.changed()
        self.real_features, self.fake_features = [real], [fake]

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation over the subsets, float64."""
        real, fake = self.stacked("real_features"), self.stacked("fake_features")
        size = self._size(len(real), len(fake))
        generator = torch.Generator().manual_seed(self.seed)
        scores = []
        for _ in range(self.subsets):
            a = real[torch.randperm(len(real), generator=generator)[:size].to(real.device)]
            b = fake[torch.randperm(len(fake), generator=generator)[:size].to(fake.device)]
            scores.append(poly_mmd(a.double(), b.double(), self.degree, self.gamma, self.coef))
        stacked = torch.stack(scores)
        return stacked.mean(), stacked.std(unbiased=False)

    def result(self, **fields: Any) -> KernelResult:
        """Return the distance with its protocol."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            counts = len(self.stacked("real_features")), len(self.stacked("fake_features"))
        mean, std = self.compute()
        return KernelResult(
            metric=self.metric_name,
            value=float(mean),
            std=float(std),
            subsets=self.subsets,
            subset_size=self._size(*counts),
            seed=self.seed,
            **protocol(self.inception, self.rounding_used, *counts),
            **fields,
        )

    def _size(self, num_real: int, num_fake: int) -> int:
        least = min(num_real, num_fake)
        size = min(1000, least // 2) if self.wanted_size is None else self.wanted_size
        if size < 2 or size > least:
            raise ValueError(
                f"a kernel distance over subsets of {max(size, 2)} needs that many images a side, "
                f"got {num_real} real and {num_fake} generated; add images or lower subset_size"
            )
        return size
