"""Pictures of any kind as 8-bit RGB: the one place where grey levels, transparency, rotation and frames are decided.

Pillow's own ``convert("RGB")`` makes 16-bit grey white, drops transparency onto whatever colour lies beneath it, and leaves
photographs lying on their side. Pillow and NumPy only; no torch.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from vargen.validation.printable import shown

Background = str | tuple[int, int, int]  # "white", "#ffffff", (255, 255, 255)

_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # width and height change places


class Refused(Exception):
    """What is wrong with a picture, without its name."""


def to_rgb(
    image: Image.Image, *, background: Background | None = None, rotate: bool = True, name: str = "the picture"
) -> Image.Image:
    """Convert a PIL image of any mode to 8-bit RGB.

    16-bit grey (I, I;16) is value / 257, rounded; F lies in [0, 1]. Of an animation the current frame is taken, with a warning.

    Args:
        image: the picture; it stays as it is.
        background: colour behind transparent pixels: a name, ``"#rrggbb"`` or three integers in 0..255.
        rotate: apply the rotation that a camera wrote into EXIF, as diffusers' ``load_image`` does.
        name: what errors and warnings call it.

    Raises:
        ValueError: transparent without ``background``, values out of range, a mode that cannot be converted.
    """
    colour = read_background(background)
    try:
        made = flatten(image, colour, rotate)
    except Refused as error:
        raise ValueError(f"{name} {error}") from None
    if is_animation(image):
        warn_of_animation(name)
    return made


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of a PIL image when its EXIF rotation is applied."""
    return (image.height, image.width) if orientation(image) in _SIDEWAYS else image.size


def read_background(background: Any) -> tuple[int, int, int] | None:
    """Read a colour.

    Raises:
        ValueError: not an opaque colour.
    """
    if background is None:
        return None
    try:
        found = ImageColor.getrgb(background) if isinstance(background, str) else tuple(int(v) for v in background)
        right = isinstance(background, str) or all(int(v) == v for v in background)
        if right and len(found) == 3 and all(0 <= v <= 255 for v in found):
            return found[0], found[1], found[2]
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"background must be a colour like 'white', '#ffffff' or (255, 255, 255), got {shown(background)}"
    )


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1..8; 1 where there is none, or none that can be read."""
    try:
        if image.format == "PNG" and not {"exif", "Raw profile type exif", "xmp"} & image.info.keys():
            return 1  # Pillow would decode the whole file to look for it
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged side information: Pillow raises whatever it trips over
        return 1
    return found if found in _TURNS else 1


def is_animation(image: Image.Image) -> bool:
    """Whether a file has more frames; the small pictures that telephones put behind a JPEG do not count."""
    try:
        return bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    except Exception:  # its file is closed or damaged
        return False


def warn_of_animation(name: str) -> None:
    """One line about frames that are not used."""
    warnings.warn(f"{name} is an animation: one frame of it is used; frames= of a video takes all", stacklevel=3)


def flatten(image: Image.Image, background: tuple[int, int, int] | None, rotate: bool) -> Image.Image:
    """The conversion of ``to_rgb``, whose errors are nameless.

    Raises:
        Refused: as ``to_rgb``.
    """
    turn = _TURNS.get(orientation(image)) if rotate else None
    if image.mode.startswith("I") or image.mode == "F":
        rgb = _from_numbers(image, background)
    else:
        rgb = _from_colours(image, background)
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info = {}  # nobody turns or composites it again
    return rgb


def _from_numbers(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    values = np.asarray(image)
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    most = 1 if image.mode == "F" else 65535
    if not (low >= 0 and high <= most):  # NaN neither
        raise Refused(f"has mode {image.mode} with values in [{low:g}, {high:g}]; they must lie in [0, {most}]")
    if image.mode == "F":
        grey = np.rint(values * 255)
    else:
        grey = (values.astype(np.int32) + 128) // 257  # value / 257, rounded: 257 is odd, so there are no ties
    rgb = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    clear = image.info.get("transparency")
    if not isinstance(clear, int) or not (values == clear).any():
        return rgb
    rgb.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return _composited(rgb, background)


def _from_colours(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    try:
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            straight = image.convert("LA") if image.mode == "La" else image
            return _composited(straight.convert("RGBA"), background)
        return image.convert("RGB")
    except ValueError:
        raise Refused(f"has mode {image.mode}: convert it to 8-bit RGB first") from None


def _composited(rgba: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    low = rgba.getchannel("A").getextrema()[0]
    if low == 255:  # opaque everywhere
        return rgba.convert("RGB")
    if background is None:
        raise Refused("is transparent; say what lies behind it: background='white' (--background white)")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")
