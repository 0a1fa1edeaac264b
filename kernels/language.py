"""Triton where it can be imported, and a stand-in elsewhere.

The stand-in keeps the modules importable and the plain-operator rules callable through ``.fn``; a kernel that is
launched through it says what is missing.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    HAS_TRITON = True
except ImportError:
    triton = tl = None
    HAS_TRITON = False

    class jit:  # type: ignore[no-redef]
        """What ``triton.jit`` returns, as far as it is used without Triton."""

        def __init__(self, fn: Any = None, **options: Any) -> None:
            self.fn = fn

        def __call__(self, fn: Any) -> Any:
            """Take the function when used as ``@jit(option=...)``."""
            return type(self)(fn)

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError(f"{self.fn.__name__} needs triton; install it or set VARGEN_KERNELS=torch")


def constant(value: float) -> Any:
    """A number that kernels know by the name of a global, a member of an enum for example."""
    plain = int(value) if isinstance(value, int) else value
    return tl.constexpr(plain) if HAS_TRITON else plain


INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"  # read once, as Triton does when it decorates


def use_triton(tensor: Tensor) -> bool:
    """Whether an operation on ``tensor`` runs as a Triton kernel.

    The only switch is the environment variable ``VARGEN_KERNELS``: ``torch`` (or ``0``) takes the PyTorch references,
    ``triton`` the kernels, on the CPU too if ``TRITON_INTERPRET=1`` was set before Triton was imported; unset means
    kernels on CUDA devices and references elsewhere.
    """
    choice = os.environ.get("VARGEN_KERNELS", "")
    if choice in ("0", "torch") or not HAS_TRITON:
        return False
    return tensor.is_cuda or (choice == "triton" and INTERPRET)


BLOCK_LIMIT = 16384  # a row of so many float32 fits the registers of one program
STREAM_BLOCK = 8192  # longer rows are streamed in tiles of this size
PIECE_LIMIT = 4096  # draws hold noise and several scores per code, so they go in smaller pieces


def launch_options(num_codes: int) -> dict[str, Any]:
    """Tiling of a row (searches in TILES of BLOCK, draws in PIECES of PIECE) and launch options."""
    block = max(triton.next_power_of_2(num_codes), 64)
    if block > BLOCK_LIMIT:
        block = STREAM_BLOCK
    piece = min(block, PIECE_LIMIT)
    return {
        "BLOCK": block,
        "TILES": -(-num_codes // block),
        "PIECE": piece,
        "PIECES": -(-num_codes // piece),
        "num_warps": min(max(block // 512, 1), 16),
        # without fused multiply-add a logit is the same number wherever it is computed, in kernels and references
        "enable_fp_fusion": False,
    }
