"""Pictures about decoding: which forward pass made which code permanent.

Letters: B images, N code positions, (h, w) the grid of codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

BANDS = "#d7191c", "#fdae61", "#ffffbf", "#abdda4", "#2b83ba"  # neighbouring forwards differ, however many there are
MAX_IMAGES = 8


def acceptance_map(image: Any, commit_trace: Any, grid: tuple[int, int]) -> Figure:
    """Draw images beside maps of their decoding.

    A run of cells in one colour was made permanent by one forward pass; long runs are where drafts were right.

    Args:
        image: a PIL image or a list of B of them, or an array ``[H, W, 3]`` / ``[B, H, W, 3]`` in [0, 1] or uint8.
        commit_trace: ``[N]`` or ``[B, N]`` integers, ``stats.commit_trace`` of the run.
        grid: (h, w) with h * w = N.

    Returns:
        A matplotlib figure, two panels an image; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: the trace does not fit the grid or the images, or a code is not permanent yet.
    """
    images = [np.asarray(one) for one in (image if isinstance(image, list) or np.ndim(image) == 4 else [image])]
    trace = torch.as_tensor(commit_trace)
    trace = trace[None] if trace.ndim == 1 else trace
    if trace.ndim != 2 or trace.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"commit_trace must be [B, {grid[0] * grid[1]}] for a grid of {grid}, got {list(trace.shape)}")
    if len(images) != len(trace):
        raise ValueError(f"there are {len(images)} images and {len(trace)} traces; give one trace an image")
    if bool((trace < 0).any()):
        raise ValueError("commit_trace holds -1: draw the map when the image is complete")
    rows = min(len(images), MAX_IMAGES)
    figure = Figure(figsize=(6.4, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    for (left, right), picture, steps in zip(axes, images, trace, strict=False):
        left.imshow(picture, interpolation="nearest")
        _draw_map(right, steps.view(grid))
        num_forwards = int(steps.max()) + 1
        right.set_title(f"{num_forwards} forwards, {steps.numel() / num_forwards:.1f} codes each", fontsize=9)
        for axis in (left, right):
            axis.set_xticks([])
            axis.set_yticks([])
    return figure


def _draw_map(axis: Any, steps: torch.Tensor) -> None:
    """One square a code, coloured by the forward that made it permanent."""
    h, w = steps.shape
    for row in range(h):
        for column in range(w):
            colour = BANDS[int(steps[row, column]) % len(BANDS)]
            axis.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.3))
    axis.set_xlim(0, w)
    axis.set_ylim(h, 0)
    axis.set_aspect("equal")
