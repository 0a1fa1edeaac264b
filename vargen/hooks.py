"""Hooks that other libraries put around the ``forward`` of a module: they fire around our other methods too.

Offloading and device maps of accelerate (``_hf_hook``), group offloading and layerwise casting of diffusers
(``_diffusers_hook``) bring weights to the device, or to the dtype, of the work just before ``forward`` and take them back
behind it. Models of vargen are entered by other methods as well (``open``, ``step``, ``decode``, ...), which carry the mark
``runs_as_forward``. Nothing here imports accelerate or diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import nn

_ENTERED = "_entered"  # in a module while one of its methods runs with its hooks
Method = TypeVar("Method", bound=Callable[..., Any])


def runs_as_forward(method: Method) -> Method:
    """Mark a method of a module that reads weights: hooks around ``forward`` fire around it too, once for nested calls.

    They bring weights; arguments and results they do not see, as with diffusers' ``apply_forward_hook``: sessions and
    schedules are nobody else's to move, and samplers make their tensors on the model's ``device``.
    """

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__
        if ("_hf_hook" not in own and "_diffusers_hook" not in own) or own.get(_ENTERED, False):
            return method(self, *args, **kwargs)
        hooks = _hooks_around(self)
        own[_ENTERED] = True
        try:
            for hook in hooks:
                hook.pre_forward(self)
            output = method(self, *args, **kwargs)
            for hook in reversed(hooks):
                hook.post_forward(self, None)
            return output
        finally:
            del own[_ENTERED]

    return cast(Method, run)


def hooked(module: nn.Module) -> bool:
    """Whether accelerate or diffusers put hooks around this very module."""
    return "_hf_hook" in module.__dict__ or "_diffusers_hook" in module.__dict__


def execution_device(module: nn.Module) -> torch.device:
    """Where a module works: the device that its hooks bring it to, else that of its weights.

    Weights that are offloaded lie elsewhere, or nowhere (``meta``), while the module does not run.
    """
    for part in module.modules():
        for hook in _accelerate_hooks(part):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
        group = _diffusers_hook(part, "group_offloading")
        if group is not None:
            return torch.device(group.config.onload_device)
    weight = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if weight is None else weight.device


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """Dtype in which a layer with a ``weight`` works, also where it is stored in another (layerwise casting)."""
    inner = getattr(layer, "base_layer", layer)  # of an adapter around it, as peft's
    casting = _diffusers_hook(inner, "layerwise_casting")
    return cast(torch.dtype, inner.weight.dtype if casting is None else casting.compute_dtype)


class HookedModel:
    """Mixin in front of ``ModelMixin``: ``device`` is where the model works, wherever hooks keep its weights meanwhile."""

    @property
    def device(self) -> torch.device:
        """Where inputs are expected."""
        return execution_device(cast(nn.Module, self))


def _hooks_around(module: nn.Module) -> list[Any]:
    """Hooks in the order in which they run before a forward pass."""
    registry = module.__dict__.get("_diffusers_hook")
    # each hook of diffusers lies around those before it; those of accelerate came first: neither allows the other order
    outer = [] if registry is None else [registry.hooks[name] for name in reversed(registry._hook_order)]
    return [*outer, *([module._hf_hook] if "_hf_hook" in module.__dict__ else [])]


def _accelerate_hooks(module: nn.Module) -> Iterator[Any]:
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _diffusers_hook(module: nn.Module, name: str) -> Any:
    registry = module.__dict__.get("_diffusers_hook")
    return None if registry is None else registry.get_hook(name)
