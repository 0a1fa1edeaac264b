"""Pictures about decoding: which forward pass made which code permanent.

Letters: B images, N code positions, (h, w) the grid of codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vargen.display.notebook import BANDS
from vargen.validation.extras import extra

with extra("eval", "a plot"):
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

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
        raise ValueError(
            f"commit_trace must be [B, {grid[0] * grid[1]}] for a grid of {grid}, got {list(trace.shape)}"
        )
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


def diagonal_front(images: Any, codes: Any, commit_trace: Any, grid: tuple[int, int]) -> Figure:
    """Draw an image as it grows: the picture after some passes, and below each what is drawn and what the last pass drew.

    Args:
        images: k pictures ``[3, H, W]`` around [-1, 1], for example ``pipe.decode_codes`` inside a callback.
        codes: ``[k, N]`` integers, the codes at these moments, -1 where not drawn.
        commit_trace: ``[N]`` integers, ``stats.commit_trace`` of the finished image.
        grid: (h, w) with h * w = N.

    Returns:
        A matplotlib figure of two rows and k columns.

    Raises:
        ValueError: the codes do not fit the grid or the images.
    """
    drawn, trace = torch.as_tensor(codes) >= 0, torch.as_tensor(commit_trace)
    if drawn.ndim != 2 or drawn.shape[1] != grid[0] * grid[1] or len(drawn) != len(images):
        raise ValueError(
            f"codes must be [{len(images)}, {grid[0] * grid[1]}], one row an image, got {list(drawn.shape)}"
        )
    figure = Figure(figsize=(1.25 * len(images), 2.7), layout="constrained")
    axes = figure.subplots(2, len(images), squeeze=False)
    for column, (picture, here) in enumerate(zip(images, drawn, strict=True)):
        pixels = ((torch.as_tensor(picture).float().cpu().clamp(-1, 1) + 1) / 2).permute(1, 2, 0)
        last = int(trace[here].max()) if bool(here.any()) else -1
        state = here.float() + (here & (trace == last)).float()  # 0 open, 1 drawn, 2 the front
        axes[0, column].imshow(pixels.numpy(), interpolation="nearest")
        axes[1, column].imshow(state.view(grid).numpy(), cmap="cividis", vmin=0, vmax=2, interpolation="nearest")
        axes[0, column].set_title(f"{last + 1} forwards", fontsize=8)
        for axis in axes[:, column]:
            axis.set_axis_off()
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
