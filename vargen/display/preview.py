"""Watch a picture while it is drawn: a ready-made ``callback_on_step_end``.

Letters: B images, N code positions, (h, w) the grid of codes, K scales.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vargen.display.notebook import gif, gif_html, png
from vargen.files import atomic_write, make_folder
from vargen.images import to_pil
from vargen.pipelines.grid import SMALL, image_grid
from vargen.validation.reading import local_path

FRONT = np.array([255.0, 214.0, 10.0])  # what the last forward drew is tinted with it
TINT = 0.45
GREY = (128, 128, 128)  # a scale that is not drawn yet
VIDEO_FRAMES = 5  # frames of a video shown beside each other


class LivePreview:
    """Show what is drawn so far after every forward pass, with what the last one added in yellow.

    In Jupyter the picture is updated in place. Elsewhere the frames are kept, and written where ``folder`` says. Next-scale
    models show a strip of their scales, videos a strip of frames.

    Args:
        every: forwards between two frames; each frame decodes the codes once.
        max_images: images shown of a batch.
        scale: enlargement by a whole factor; default: small images become about 192 pixels.
        folder: where to write ``frame_0000.png``, ...; it is made if needed.
        on_frame: called with every frame (PIL image) instead of showing it in Jupyter.

    Attributes:
        frames: PIL images of the last call.

    Raises:
        ValueError: every, max_images or scale below 1.

    Example:
        >>> from vargen import ImagePipeline, LivePreview  # doctest: +SKIP
        >>> preview = LivePreview(every=4)  # doctest: +SKIP
        >>> pipe("deep elf with a red cloak", callback_on_step_end=preview)  # doctest: +SKIP
        >>> preview.save("growing.gif")  # doctest: +SKIP
    """

    def __init__(
        self,
        every: int = 1,
        max_images: int = 4,
        scale: int | None = None,
        folder: str | Path | None = None,
        on_frame: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        for name, value in (("every", every), ("max_images", max_images), ("scale", scale)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.every, self.max_images, self.scale = every, max_images, scale
        self.folder = None if folder is None else local_path(folder)
        self.on_frame = on_frame
        self.frames: list[Image.Image] = []
        self._handle: Any = None
        self._drawn: Tensor | None = None  # [B, N] bool, at the last frame
        self._front: tuple[int, int] | None = None  # grid of the tinted cells, where there is one
        self._strip: dict[int, list[Image.Image]] = {}  # number of scales drawn -> one picture an image

    def __call__(self, pipe: Any, step: int, num_forwards: int, tensors: dict[str, Tensor]) -> None:
        """Draw a frame; the arguments are those of ``callback_on_step_end``."""
        if step == 0:
            self.frames, self._handle = [], None
        codes = tensors["codes"]
        drawn = ~codes.isnan().any(-1) if codes.is_floating_point() else codes >= 0  # B N
        if self._drawn is None or self._drawn.shape != drawn.shape or bool((self._drawn & ~drawn).any()):
            self._forget_batch()  # the next images of a call with batch_size
        done = bool(drawn.all())
        if num_forwards % self.every and not done:
            return
        shown = drawn[: self.max_images]
        before = torch.zeros_like(shown) if self._drawn is None else self._drawn[: self.max_images]
        pixels = pipe.decode_codes(codes[: self.max_images])
        passes = f"{num_forwards} forward{'s' * (num_forwards != 1)}"
        labels = [f"{passes}, {int(row.sum())}/{row.numel()}" for row in shown]
        self._emit(self._frame(pipe, pixels, shown & ~before, shown, labels))
        if done and self._front is not None:
            self._emit(self._frame(pipe, pixels, torch.zeros_like(shown), shown, labels))  # without the tint
        self._drawn = drawn.clone()

    def gif(self, fps: float = 8) -> bytes:
        """Return the frames of the last call as a GIF.

        Raises:
            ValueError: nothing was drawn yet, or fps outside (0, 50].
        """
        return gif(self.frames, fps, scale=1)

    def save(self, path: str | Path, fps: float = 8) -> None:
        """Write the frames of the last call as a GIF."""
        with atomic_write(path, overwrite=True) as beside:
            beside.write_bytes(self.gif(fps))

    def _repr_html_(self) -> str | None:
        return gif_html(self.frames, scale=1, title="what was drawn, forward by forward") if self.frames else None

    def _forget_batch(self) -> None:
        self._drawn, self._front, self._strip = None, None, {}

    def _frame(self, pipe: Any, pixels: Tensor, front: Tensor, drawn: Tensor, labels: list[str]) -> Image.Image:
        if pixels.ndim == 5:
            return self._sheet(*_video_strip(pixels, labels))
        if hasattr(pipe.backbone, "scales"):
            return self._sheet(*self._scale_strip(pipe.backbone.scales, to_pil(pixels), drawn, labels))
        grid = getattr(pipe.backbone, "grid_size", None)
        self._front = tuple(grid) if grid is not None and grid[0] * grid[1] == front.shape[1] else None
        images = to_pil(pixels)
        if self._front is not None:
            images = [_tint(image, row.view(self._front)) for image, row in zip(images, front, strict=True)]
        return self._sheet(images, len(images), labels)

    def _scale_strip(self, scales: Any, images: list[Image.Image], drawn: Tensor, labels: list[str]) -> Any:
        ends = torch.tensor([h * w for h, w in scales]).cumsum(0)
        self._strip[int((ends <= int(drawn[0].sum())).sum())] = images
        empty = [Image.new("RGB", images[0].size, GREY)] * len(images)
        panels = [self._strip.get(k + 1, empty) for k in range(len(ends))]
        names = [f"{h}x{w}" for h, w in scales]
        texts = [names[k] if k else label for label in labels for k in range(len(names))]
        return [column[b] for b in range(len(images)) for column in panels], len(names), texts

    def _sheet(self, images: list[Image.Image], columns: int, labels: list[str]) -> Image.Image:
        side = max(images[0].size)
        target = max(1, 192 // side) if side <= SMALL else 1
        return image_grid(images, columns, self.scale or target, labels)

    def _emit(self, frame: Image.Image) -> None:
        self.frames.append(frame)
        if self.folder is not None:
            make_folder(self.folder)
            with atomic_write(self.folder / f"frame_{len(self.frames) - 1:04d}.png", overwrite=True) as beside:
                frame.save(beside)
        if self.on_frame is not None:
            self.on_frame(frame)
        elif in_jupyter():
            self._show(frame)

    def _show(self, frame: Image.Image) -> None:
        from IPython.display import Image as Picture
        from IPython.display import display

        picture = Picture(data=png(frame), format="png")
        if self._handle is None:
            self._handle = display(picture, display_id=True)
        else:
            self._handle.update(picture)


def in_jupyter() -> bool:
    """Whether this process is the kernel of a notebook."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


def _tint(image: Image.Image, front: Tensor) -> Image.Image:
    """Colour the cells ``[h, w]`` of a picture where ``front`` is True."""
    pixels = np.asarray(image.convert("RGB")).astype(float)
    mask = front.cpu().numpy()
    rows, columns = pixels.shape[0] // mask.shape[0], pixels.shape[1] // mask.shape[1]
    mask = mask.repeat(rows, axis=0).repeat(columns, axis=1)[..., None]
    return Image.fromarray(np.where(mask, pixels * (1 - TINT) + FRONT * TINT, pixels).round().astype(np.uint8))


def _video_strip(pixels: Tensor, labels: list[str]) -> tuple[list[Image.Image], int, list[str]]:
    """Some frames of every video ``[B, 3, T, H, W]``, one video a row."""
    length = pixels.shape[2]
    count = min(VIDEO_FRAMES, length)
    moments = torch.linspace(0, length - 1, count).round().long()
    images = [image for video in pixels[:, :, moments].transpose(1, 2) for image in to_pil(video)]
    return images, count, [f"frame {moments[k]}" if k else label for label in labels for k in range(count)]
