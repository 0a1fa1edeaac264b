"""What the metrics share: uint8 rounding, and lists of features that gather over uneven and empty ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vargen.images import ROUNDINGS, Rounding, quantise
from vargen.validation.extras import extra

with extra("eval", "vargen.metrics"):
    from torchmetrics import Metric
    from torchmetrics.utilities.data import dim_zero_cat
    from torchmetrics.utilities.distributed import gather_all_tensors


class ExactMetric(Metric):
    """A metric whose states and network keep their dtype, and whose value follows every change of its states.

    ``set_dtype``, ``half`` and ``to(dtype)`` move nothing between dtypes: sums are float64 already, counts are integers, and
    a network in another precision measures something else.
    """

    def changed(self) -> None:
        """Forget a computed value: states that are set without ``update`` would otherwise leave it standing."""
        self._computed = None
        self._update_count += 1

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the states of another metric of this class, or those of a dictionary."""
        super().merge_state(incoming_state)
        self.changed()  # a value computed before is stale now

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:  # type: ignore[override]
        def moved(tensor: Tensor) -> Tensor:
            probe = fn(tensor.detach().new_empty(0))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        return super()._apply(moved, exclude_state)


class QuantisedMetric(ExactMetric):
    """A metric over images that sees what a PNG file would hold."""

    rounding: Rounding
    rounding_used: str  # the rounding, or "given as uint8"

    def set_rounding(self, rounding: Rounding) -> None:
        """Choose how floats become uint8: see ``vargen.images.quantise``."""
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        self.rounding, self.rounding_used = rounding, "given as uint8"

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the states of another metric of this class, or those of a dictionary."""
        super().merge_state(incoming_state)
        if isinstance(incoming_state, QuantisedMetric) and incoming_state.rounding_used == incoming_state.rounding:
            self.rounding_used = incoming_state.rounding_used

    def quantise(self, images: Tensor) -> Tensor:
        """Return uint8 images and remember whether rounding happened here."""
        if images.dtype == torch.uint8:
            return images
        self.rounding_used = self.rounding
        return quantise(images, self.rounding)


class FeatureListMetric(QuantisedMetric):
    """A metric that keeps every feature, as lists of ``[B, D]`` float64 tensors named in ``_reductions``."""

    num_features: int

    def replace_lists(self, *names: str) -> None:
        """Declare list states that are concatenated before they are gathered.

        torchmetrics leaves them as they are, so ranks with different numbers of batches wait for each other forever.
        """
        for name in names:
            self.add_state(name, [], dist_reduce_fx="cat")

    def _sync_dist(self, dist_sync_fn: Callable = gather_all_tensors, process_group: Any | None = None) -> None:
        for name, reduction in self._reductions.items():
            if reduction == dim_zero_cat and len(getattr(self, name)) == 0:  # a rank that has seen no image
                empty = torch.zeros(0, self.num_features, dtype=torch.float64, device=self.device)
                setattr(self, name, [empty])
        super()._sync_dist(dist_sync_fn, process_group=process_group)

    def stacked(self, name: str) -> Tensor:
        """Return the ``[N, D]`` features kept under a name."""
        kept = getattr(self, name)
        if isinstance(kept, list) and not kept:
            return torch.zeros(0, self.num_features, dtype=torch.float64, device=self.device)
        if isinstance(kept, list) and len(kept) == 1:
            return kept[0]  # perhaps a memory map: no copy
        return dim_zero_cat(kept)
