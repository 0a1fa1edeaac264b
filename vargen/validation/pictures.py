"""Open picture files: the one place where Pillow reads what comes from outside.

Pillow chooses a reader by a file's first bytes, whatever its name says, and some readers hand the file to another program
(Ghostscript for EPS). Only the formats below are read, within bounds on pixels, frames and scans: a file of some hundred
kilobytes can otherwise ask for gigabytes or minutes. Pillow only; no torch.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import Image, ImageSequence, features

from vargen.validation.printable import printable
from vargen.validation.rgb import (
    Background,
    Refused,
    flatten,
    is_animation,
    orientation,
    read_background,
    upright_size,
    warn_of_animation,
)

FORMATS: tuple[str, ...] = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
)  # Pillow's names; none of them runs a program
if "avif" in features.modules and features.check_module("avif"):  # Pillow 11.3 and later
    FORMATS = (*FORMATS, "AVIF")
SUFFIXES = tuple(  # under which such a file is meant to be a picture
    f".{name}"
    for name in [
        "png",
        "apng",
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "mpo",
        "webp",
        "gif",
        "bmp",
        "dib",
        "tif",
        "tiff",
        "ppm",
        "pgm",
        "pbm",
        "pnm",
        "pfm",
        "avif",
        "avifs",
    ]
)
MAX_PIXELS = 2**26  # of a picture, or of all frames of a film together: 8192 x 8192
MAX_FRAMES = 10_000
MAX_BYTES = 2**30  # of a file
BATCH_PIXELS = 2**24  # of pictures that are worked on together: 64 of 512 x 512
_MAX_SCANS = 32  # of a progressive JPEG; usual are 10. Every one walks over all pixels, and may be 100 bytes long
_TILE_TAGS = (322, 323)  # TIFF: width and height of a tile, which may be larger than the picture
_SMALL_TILE = 2**20  # pixels of a tile that any picture may have


def open_image(source: str | Path | IO[bytes], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture (the first frame of a film), whole, in the mode that it is stored in.

    Args:
        source: a regular file, or a binary stream.
        max_pixels: beyond which it is refused, before it is decoded.

    Raises:
        ValueError: no such file, another format, damaged, truncated, or too large.
    """
    with _opened(source, max_pixels) as image:
        image.load()
        return image


@dataclass(frozen=True)
class ImageFacts:
    """What a picture file says of itself before it is decoded."""

    size: tuple[int, int]  # width, height as stored
    upright: tuple[int, int]  # with EXIF rotation applied
    turned: bool  # EXIF asks for a rotation or a mirror image
    animated: bool  # more than one frame


def open_rgb(
    source: str | Path | IO[bytes],
    *,
    background: Background | None = None,
    rotate: bool = True,
    max_pixels: int = MAX_PIXELS,
    warn: bool = True,
) -> Image.Image:
    """Read a picture as 8-bit RGB, as ``vargen.validation.rgb.to_rgb`` does with one that is open.

    Args:
        source: a regular file, or a binary stream.
        background: colour behind transparent pixels.
        rotate: apply EXIF rotation.
        max_pixels: beyond which it is refused.
        warn: say so when the first frame of an animation is taken.

    Raises:
        ValueError: as for ``open_image`` and ``to_rgb``.
    """
    colour = read_background(background)
    with _opened(source, max_pixels) as image:
        animated = is_animation(image)
        image.load()
        made = flatten(image, colour, rotate)
    if animated and warn:
        warn_of_animation(_name(source))
    return made


def image_facts(source: str | Path | IO[bytes], *, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Look at a picture without decoding it; arguments and errors as for ``open_image``."""
    with _opened(source, max_pixels) as image:
        return ImageFacts(image.size, upright_size(image), orientation(image) != 1, is_animation(image))


def image_size(source: str | Path | IO[bytes], *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Read width and height of a picture as stored, without decoding it; arguments and errors as for ``open_image``."""
    with _opened(source, max_pixels) as image:
        return image.size


def open_frames(
    source: str | Path | IO[bytes], *, background: Background | None = None, max_pixels: int = MAX_PIXELS
) -> list[Image.Image]:
    """Read all frames of a GIF, WebP, PNG or TIFF as RGB; one frame of a still picture.

    Args:
        source: a regular file, or a binary stream.
        background: colour behind transparent pixels.
        max_pixels: of all frames together.

    Raises:
        ValueError: as for ``open_rgb``.
    """
    colour = read_background(background)
    with _opened(source, max_pixels) as image:
        return _frames(image, colour, max_pixels)


def all_frames(
    image: Image.Image, *, background: Background | None = None, name: str = "the picture"
) -> list[Image.Image]:
    """Frames of a PIL image as RGB, as ``open_frames`` reads those of a file.

    Raises:
        ValueError: too many or too large, or as for ``to_rgb``.
    """
    colour, place = read_background(background), image.tell()
    try:
        return _frames(image, colour, MAX_PIXELS)
    except Refused as error:
        raise ValueError(f"{name} {error}") from None
    finally:
        image.seek(place)


def _frames(image: Image.Image, background: tuple[int, int, int] | None, max_pixels: int) -> list[Image.Image]:
    frames: list[Image.Image] = []
    for frame in ImageSequence.Iterator(image):
        if len(frames) == MAX_FRAMES:
            raise Refused(f"has more than {MAX_FRAMES:,} frames; cut it first")
        if (len(frames) + 1) * frame.width * frame.height > max_pixels:
            size = f"{frame.width}x{frame.height}"
            raise Refused(f"has more than {len(frames)} frames of {size} pixels, together more than {max_pixels:,}")
        frames.append(flatten(frame, background, True))
    return frames


def batch_count(wanted: int, height: int, width: int) -> int:
    """Return how many pictures of a size are worked on together: at most ``wanted``, fewer where they are large.

    Example:
        >>> batch_count(64, 512, 512), batch_count(64, 4096, 4096), batch_count(64, 8192, 8192)
        (64, 1, 1)
    """
    return max(1, min(wanted, BATCH_PIXELS // max(1, height * width)))


@contextmanager
def _opened(source: str | Path | IO[bytes], max_pixels: int) -> Iterator[Image.Image]:
    name = _name(source)
    try:
        with _stream(source) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged side information, which is not read
            if stream.seek(0, io.SEEK_END) > MAX_BYTES:
                raise Refused(f"is larger than {MAX_BYTES:,} bytes")
            stream.seek(0)
            image = Image.open(stream, formats=FORMATS)
            _check_pixels(image, max_pixels)
            _check_cost(image, stream)
            yield image
    except Refused as error:
        raise ValueError(f"{name} {error}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has more than {max_pixels:,} pixels; make it smaller first") from None
    except Image.UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise ValueError(f"{name} is not a readable image: its content is none of {kinds}") from None
    except Exception as error:  # the readers raise whatever they trip over: SyntaxError, struct.error, EOFError, ...
        reason = printable(getattr(error, "strerror", None) or error or type(error).__name__)
        raise ValueError(f"{name} is not a readable image: {reason}") from error


def _name(source: str | Path | IO[bytes]) -> str:
    return printable(getattr(source, "name", "the picture")) if hasattr(source, "read") else printable(source)


@contextmanager
def _stream(source: str | Path | IO[bytes]) -> Iterator[IO[bytes]]:
    if not isinstance(source, str | Path):
        yield source
        return
    if not Path(source).is_file():  # a pipe or a device might never end
        raise Refused("is not a file" if Path(source).exists() else "does not exist")
    with open(source, "rb") as stream:
        yield stream


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        raise Refused(f"has {size} pixels, more than {max_pixels:,}; make it smaller first")


def _check_cost(image: Image.Image, stream: IO[bytes]) -> None:
    """Refuse pictures whose decoding costs far more than their pixels do."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        width, height = (int(tags.get(tag, 0)) for tag in _TILE_TAGS)
        if width * height > max(_SMALL_TILE, 4 * image.width * image.height):  # a tile is decoded whole
            raise Refused(f"has tiles of {width}x{height} pixels, far larger than the picture")
    if image.format in ("JPEG", "MPO") and image.info.get("progressive"):
        position = stream.tell()
        stream.seek(0)
        scans = _num_scans(stream.read())
        stream.seek(position)
        if scans > _MAX_SCANS:
            raise Refused(f"is a progressive JPEG of {scans} scans, more than {_MAX_SCANS}; save it again")


def _num_scans(data: bytes) -> int:
    """Count the scans of a JPEG file up to the end of its first picture."""
    scans, position = 0, 2
    while 0 <= position < len(data) - 3:
        marker = data[position + 1]
        if marker == 0xD9:  # end of the picture: what follows is another one, or a film of a telephone
            break
        scans += marker == 0xDA
        inside_scan = marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD7  # no segment: no length follows
        position += (
            (1 + (marker != 0xFF)) if inside_scan else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        )
        position = data.find(b"\xff", position)
    return scans
