"""Contact sheets: many small images on one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

BACKGROUND = (24, 24, 27)
TEXT = (228, 228, 231)
_LABEL_SIZE = 12  # pixels; the size of the font
_LABEL_PAD = 3
SMALL = 128  # sides up to this are enlarged by whole factors when scale is None
_TARGET = 192  # side that automatic enlargement aims at


def image_grid(
    images: Sequence[Image.Image],
    columns: int | None = None,
    scale: int | None = None,
    labels: Sequence[str] | None = None,
    gap: int = 2,
) -> Image.Image:
    """Put images on one sheet, row by row.

    Args:
        images: equally large.
        columns: images in a row; default the smallest square that holds all.
        scale: enlargement by a whole factor, nearest neighbour, so that pixel art stays sharp; default 1 for images
            larger than 128 pixels, else what brings them near 192.
        labels: one line of text under every image, shortened where it does not fit.
        gap: pixels between images, after enlargement.

    Raises:
        ValueError: no images, different sizes, columns or scale below 1, another number of labels than of images.

    Example:
        >>> image_grid([Image.new("RGB", (32, 32))] * 5, columns=3, scale=2).size
        (200, 134)
    """
    _check(images, columns, scale, labels)
    width, height = images[0].size
    factor = scale or _default_scale(max(width, height))
    across = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    down = math.ceil(len(images) / across)
    strip = _LABEL_SIZE + 2 * _LABEL_PAD if labels else 0
    cell = (width * factor + gap, height * factor + strip + gap)
    sheet = Image.new("RGB", (across * cell[0] + gap, down * cell[1] + gap), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_LABEL_SIZE) if labels else None
    for index, image in enumerate(images):
        x, y = gap + index % across * cell[0], gap + index // across * cell[1]
        large = image.convert("RGB").resize((width * factor, height * factor), Image.Resampling.NEAREST)
        sheet.paste(large, (x, y))
        if labels and font:
            place = (x, y + height * factor + _LABEL_PAD)
            pen.text(place, _shorten(labels[index], width * factor, pen, font), fill=TEXT, font=font)
    return sheet


def _check(
    images: Sequence[Image.Image], columns: int | None, scale: int | None, labels: Sequence[str] | None
) -> None:
    if not images:
        raise ValueError("image_grid needs at least one image, got none")
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(f"images must be equally large, got {', '.join(f'{w}x{h}' for w, h in sizes)}")
    for name, value in (("columns", columns), ("scale", scale)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels must hold one text an image: {len(images)} images, got {len(labels)} labels")


def _default_scale(side: int) -> int:
    return 1 if side > SMALL else max(1, _TARGET // side)


def _shorten(
    text: str, width: int, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text.rstrip() + "..."
