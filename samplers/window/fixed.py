"""The width of a window where nothing is said: by the clock where codes do not depend on it, else from a table.

In float32, and in every dtype with ``row_invariant=True``, the codes of the shared-noise rule do not depend on widths, so that a
controller may choose them by the clock. In half precision a row's logits depend a little on the rows beside it, and two runs with
one seed would differ where their clocks do: there the width follows from the device and the number of images alone; so it does
on a CUDA device, whose passes are replayed as graphs of one width.

The table is made of costs of LlamaGen-B in bfloat16 (a forward of 1, 4, 8, 16, 32, 64 rows: 33, 35, 37, 44, 54, 76 ms of one CPU
thread) and of the passes that its hard distribution needs (benchmarks/_models.py); for a GPU, where rows are nearly free up to
some hundreds, it is a guess: untested on GPU.
"""

from __future__ import annotations

from typing import Any

import torch

WINDOW = 32  # of rules whose codes depend on the width
# device class: (most images, width), ascending; beyond the last one next-token sampling
TABLE: dict[str, tuple[tuple[int, int], ...]] = {
    "cpu": ((2, 16), (4, 8)),
    "cuda": ((4, 32), (16, 16), (64, 8)),
    "other": ((2, 16), (4, 8)),
}


def fixed_width(device: str, num_images: int) -> int:
    """Width for half precision: a function of the device's class and the images of the batch, 1 for next-token sampling."""
    table = TABLE.get(device, TABLE["other"])
    return next((width for most, width in table if num_images <= most), 1)


def chosen_window(rule: str, row_invariant: bool, backbone: Any, num_images: int) -> tuple[int | str, str]:
    """The window of a sampler that names none, and why."""
    if rule != "shared-noise":
        return WINDOW, f"window={WINDOW}: codes of rule {rule!r} depend on the width"
    device = torch.device(backbone.device).type
    width = fixed_width(device, num_images)
    if row_invariant or backbone.dtype not in (torch.bfloat16, torch.float16):
        if device == "cuda" and not row_invariant:
            return width, f"window={width}, from the table: passes of one width are replayed as a CUDA graph"
        return "auto", "window='auto': codes do not depend on the width"
    kind = str(backbone.dtype).removeprefix("torch.")
    return width, (
        f"window={width}, from the table for {kind} and {num_images} images: widths change codes a little there; 'auto' may be "
        "faster and repeats only by stats.widths, row_invariant=True makes codes independent of widths"
    )
