"""Shared by all tests: Triton's interpreter where there is no GPU, golden files, poisoned buffers."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

try:
    from triton.runtime.interpreter import InterpretedFunction
except ImportError:
    pass
else:
    call = InterpretedFunction.__call__

    def call_once_patched(self, *args, **kwargs):
        """The interpreter patches the language again for every device function: for ours, the launch has done it."""
        ours = self.fn.__module__.startswith("vargen.")
        return self.rewrite()(*args, **kwargs) if ours else call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call_once_patched

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def golden():
    """Read ``tests/golden/<name>.safetensors``, or one prefix of it."""
    from safetensors.torch import load_file

    def read(name, prefix=""):
        tensors = load_file(GOLDEN / f"{name}.safetensors")
        return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

    return read


@pytest.fixture
def poisoned(monkeypatch):
    """``torch.empty`` returns NaN (integers -7), so that an entry a kernel forgets to write is seen."""

    def poison(make):
        def filled(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(-7)

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
