"""Exponential moving average of weights, a plain model beside the trained one."""

from __future__ import annotations

import copy

import torch
from diffusers.training_utils import EMAModel
from torch import nn


class EMA(EMAModel):
    """Average of the weights over about ``1 / (1 - decay)`` steps, shorter at the start so that the initial weights fade.

    Args:
        model: the trained model; it is copied once.
        decay: in [0, 1); 0 keeps a plain copy.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        super().__init__(self.model.parameters(), decay=decay, foreach=True)
        self.shadow_params = list(self.model.parameters())  # a model to evaluate, not loose copies of its weights

    def get_decay(self, optimization_step: int) -> float:
        """The warm-up of diffusers, but without its first step, which keeps nothing of the initial weights."""
        return min(self.decay, optimization_step / (9 + optimization_step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards ``model`` after step ``step``, counted from 0; buffers are copied."""
        self.optimization_step = step  # of a resumed run too
        self.step(model.parameters())
        for average, value in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(value)
