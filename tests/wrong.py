"""Values of every kind, most of which an argument refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

WRONG: tuple[Any, ...] = (
    0, -1, 1, 10**12, 10**400, 10**5000, 1.5, -0.5, math.nan, math.inf, True, None, "", "x", "9" * 5000, b"x", [], [1], [0, 0],
    [-1, 5], (10**9, 10**9), [1, None], [[1, [2]]], {"a": 1}, {1, 2}, object(), 1j, np.int64(3), np.float32(0.25), np.nan,
    np.ones((2, 2)), torch.ones(2), print,
)  # fmt: skip
