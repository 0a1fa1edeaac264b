"""Tensors that follow from the settings of a model alone: rotations of places, orders, masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class DeviceTables:
    """Tables by device, each made once, on the CPU.

    They are no buffers: they keep their dtype when weights are halved, and no checkpoint holds them. While a graph is traced
    nothing is kept, for a cache that fills at the first call is traced twice; models make theirs when they are built or moved.
    """

    def __init__(self) -> None:
        self._made: dict[torch.device, tuple[Tensor, ...]] = {}

    def get(self, device: torch.device, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The tables on a device, from ``make``."""
        found = self._made.get(device)
        if found is None:
            # whatever the default device is; training may follow, which cannot save an inference tensor
            with torch.device("cpu"), torch.inference_mode(False):
                found = tuple(table.to(device) for table in make())
            if not torch.compiler.is_compiling():
                self._made[device] = found
        return found
