"""Shared by all tests: Triton's interpreter where there is no GPU, golden files, poisoned buffers."""

import os
from dataclasses import fields, is_dataclass, replace
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


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")  # log(0), inf - inf


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def golden():
    """Read ``tests/golden/<name>.safetensors``, or one prefix of it."""
    from tests.golden_files import load_file

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


@pytest.fixture
def on_kernel(monkeypatch):
    """Call a function with the Triton kernels: compiled on a CUDA device, interpreted elsewhere; CPU in, CPU out."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setenv("VARGEN_KERNELS", "triton")
            out = function(*moved(args, device), **moved(kwargs, device))
        return moved(out, "cpu")

    return run


def moved(value, device):
    """Tensors inside tuples, dicts and dataclasses, on another device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if is_dataclass(value):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value
