"""Exponential moving average of weights, a plain model beside the trained one."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn


class EMA:
    """Average of the weights over about ``1 / (1 - decay)`` steps, shorter at the start so that the initial weights fade.

    Args:
        model: the trained model; it is copied once.
        decay: in [0, 1); 0 keeps a plain copy.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards ``model`` after step ``step``, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = dict(self.model.named_parameters())
        pairs = [(averages[name], p) for name, p in model.named_parameters()]
        floats = [(a, p) for a, p in pairs if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [cast(torch.Tensor, p.detach()) for _, p in floats], 1 - decay)
        buffers = dict(self.model.named_buffers())
        for name, value in model.named_buffers():
            buffers[name].copy_(value)
