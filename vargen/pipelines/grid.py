"""Contact sheets: many small images on one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from vargen.validation.printable import shown

BACKGROUND = (24, 24, 27)
TEXT = (228, 228, 231)
_LABEL_SIZE = 12  # pixels; the size of the font
_LABEL_PAD = 3
SMALL = 128  # sides up to this are enlarged by whole factors when scale is None
MAX_SHEET = 2**27  # pixels of a sheet: 400 MB
_TARGET = 192  # side that automatic enlargement aims at


def sheet_size(
    count: int,
    size: tuple[int, int],
    columns: int | None = None,
    scale: int | None = None,
    labels: bool = False,
    gap: int = 2,
) -> tuple[int, int]:
    """Return width and height of the sheet that ``image_grid`` makes of ``count`` images of a size (width, height).

    Raises:
        ValueError: columns or scale below 1, or a sheet of more than 2^27 pixels.
    """
    for name, value in (("columns", columns), ("scale", scale)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    across = _across(count, columns)
    width, height = _cell(size, scale or _default_scale(max(size)), labels, gap)
    whole = across * width + gap, math.ceil(count / across) * height + gap
    if whole[0] * whole[1] > MAX_SHEET:
        raise ValueError(
            f"a sheet of {shown(count)} images would have {shown(whole[0])} x {shown(whole[1])} pixels, more than "
            f"{MAX_SHEET:,}; lower the scale or the number of images"
        )
    return whole


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
        ValueError: no images, different sizes, columns or scale below 1, another number of labels than of images, a sheet of
            more than 2^27 pixels.

    Example:
        >>> image_grid([Image.new("RGB", (32, 32))] * 5, columns=3, scale=2).size
        (200, 134)
    """
    _check(images, labels)
    width, height = images[0].size
    whole = sheet_size(len(images), (width, height), columns, scale, bool(labels), gap)
    factor = scale or _default_scale(max(width, height))
    across, cell = _across(len(images), columns), _cell((width, height), factor, bool(labels), gap)
    sheet = Image.new("RGB", whole, BACKGROUND)
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


def _across(count: int, columns: int | None) -> int:
    return min(columns or math.ceil(math.sqrt(count)), count)


def _cell(size: tuple[int, int], factor: int, labels: bool, gap: int) -> tuple[int, int]:
    strip = _LABEL_SIZE + 2 * _LABEL_PAD if labels else 0
    return size[0] * factor + gap, size[1] * factor + strip + gap


def _check(images: Sequence[Image.Image], labels: Sequence[str] | None) -> None:
    if not images:
        raise ValueError("image_grid needs at least one image, got none")
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(f"images must be equally large, got {', '.join(f'{w}x{h}' for w, h in sizes)}")
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
