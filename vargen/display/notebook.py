"""Results as notebooks show them: sheets of pictures, maps of decoding, animations.

Nothing here needs Jupyter: the functions return PIL images, bytes and HTML that carries its pictures inside.

Letters: B images, N code positions, (h, w) the grid of codes, F frames.
"""

from __future__ import annotations

import base64
import colorsys
import html
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor

from vargen.images import to_pil
from vargen.outputs import DecodeStats
from vargen.pipelines.grid import SMALL, image_grid

BANDS = "#d7191c", "#fdae61", "#ffffbf", "#abdda4", "#2b83ba"  # neighbouring forwards differ, however many there are
EMPTY = "#52525b"  # a code that is not drawn
GOLDEN_RATIO = 0.618034  # steps of it around the colour wheel keep neighbouring codes apart
MAX_SMALL, MAX_LARGE, MAX_MAPS = 64, 16, 16  # images on a sheet: pixel art, larger ones; maps beside them
SHEET_WIDTH = 800  # pixels that a sheet of small images is enlarged to at most
MAX_SEEDS = 8  # seeds listed one by one
MAX_FPS = 50  # what browsers play of a GIF


def as_images(images: Any) -> list[Image.Image]:
    """Return any picture output of a pipeline as PIL images.

    Args:
        images: PIL images, ``[B, H, W, 3]`` array in [0, 1] or uint8, or ``[B, 3, H, W]`` tensor in [0, 1].
    """
    if isinstance(images, torch.Tensor):
        return to_pil(images.float() * 2 - 1)
    if isinstance(images, np.ndarray):
        pixels = images if images.dtype == np.uint8 else (images.clip(0, 1) * 255).round().astype(np.uint8)
        return [Image.fromarray(one) for one in pixels]
    return list(images)


def trace_map(trace: Any, grid: tuple[int, int]) -> Image.Image:
    """Draw which forward pass made which code permanent: one pixel a code, neighbouring passes in different colours.

    Args:
        trace: ``[N]`` integers, a row of ``stats.commit_trace``; below 0 where nothing was drawn.
        grid: (h, w) with h * w = N.
    """
    palette = np.array([ImageColor.getrgb(colour) for colour in (*BANDS, EMPTY)], dtype=np.uint8)
    steps = torch.as_tensor(trace).view(grid).cpu().numpy()
    return Image.fromarray(palette[np.where(steps < 0, len(BANDS), steps % len(BANDS))])


def code_map(codes: Any, grid: tuple[int, int]) -> Image.Image:
    """Draw codes as colours, one pixel a code: equal codes look equal, nothing else is meant.

    Args:
        codes: ``[N]`` integers, below 0 where nothing was drawn.
        grid: (h, w) with h * w = N.
    """
    values = torch.as_tensor(codes).view(grid).tolist()
    pixels = [[_code_colour(code) for code in row] for row in values]
    return Image.fromarray(np.array(pixels, dtype=np.uint8))


def _code_colour(code: int) -> tuple[int, int, int]:
    if code < 0:
        return ImageColor.getrgb(EMPTY)[:3]
    red, green, blue = colorsys.hsv_to_rgb(code * GOLDEN_RATIO % 1, 0.35 + code % 7 / 12, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def code_grid(num_codes: int, size: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Guess (h, w) of a raster of codes from the picture's (width, height); None where no whole numbers fit.

    Example:
        >>> code_grid(128, (64, 32))
        (8, 16)
    """
    width, height = size or (1, 1)
    rows = round(math.sqrt(num_codes * height / width))
    return (rows, num_codes // rows) if rows and num_codes == rows * round(rows * width / height) else None


def sheet(images: Sequence[Image.Image], labels: Sequence[str] | None = None) -> Image.Image:
    """Put at most 64 small or 16 large images on one sheet; small ones are enlarged, nearest neighbour."""
    shown = list(images)[: MAX_SMALL if max(images[0].size) <= SMALL else MAX_LARGE]
    columns = _columns(len(shown))
    scale = _enlargement(max(shown[0].size), columns)
    return image_grid(shown, columns, scale, list(labels)[: len(shown)] if labels else None)


def _enlargement(side: int, columns: int, wanted: int = 192) -> int:
    """Factor that makes small pictures about ``wanted`` pixels large and a row of them no wider than a sheet."""
    return max(1, min(SHEET_WIDTH // (columns * side), wanted // side)) if side <= SMALL else 1


def _columns(count: int) -> int:
    return count if count <= 4 else math.ceil(math.sqrt(count))


def png(image: Image.Image) -> bytes:
    """Return the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def gif(frames: Any, fps: float = 8, scale: int | None = None) -> bytes:
    """Return the bytes of a GIF that plays without end and rests on its last frame.

    Args:
        frames: F PIL images of one size, ``[F, H, W, 3]`` array in [0, 1] or uint8, or ``[F, 3, H, W]`` tensor in [0, 1].
        fps: frames a second, at most ``MAX_FPS`` (what browsers play).
        scale: enlargement by a whole factor, nearest neighbour; default: small frames become about 192 pixels.

    Raises:
        ValueError: no frames, or fps outside (0, 50].
    """
    pictures = as_images(frames)
    if not pictures:
        raise ValueError("a GIF needs at least one frame, got none")
    if not 0 < fps <= MAX_FPS:
        raise ValueError(f"fps must be in (0, {MAX_FPS}], got {fps}")
    side = max(pictures[0].size)
    factor = scale or (max(1, 192 // side) if side <= SMALL else 1)
    large = [one.resize((one.width * factor, one.height * factor), 0) for one in _one_palette(pictures)]
    duration = frame_times(len(large), fps)
    duration[-1] = max(duration[-1], 1000 if len(large) > 1 else 0)
    buffer = io.BytesIO()
    large[0].save(buffer, "GIF", save_all=True, append_images=large[1:], duration=duration, loop=0)
    return buffer.getvalue()


def frame_times(count: int, fps: float) -> list[int]:
    """How long each of ``count`` frames is shown, in milliseconds: whole hundredths of a second, as a GIF counts, that sum up.

    Example:
        >>> sum(frame_times(17, 60))
        280
    """
    ends = [round(100 * (index + 1) / fps) for index in range(count)]
    return [10 * (end - start) for start, end in zip([0, *ends], ends, strict=False)]


def _one_palette(pictures: list[Image.Image]) -> list[Image.Image]:
    """Give all frames the same 256 colours, exact where there are no more: only what changes is then stored."""
    packed = [np.asarray(one.convert("RGB")).astype(np.int32) @ (65536, 256, 1) for one in pictures]
    colours = np.unique(np.concatenate([np.unique(one) for one in packed]))
    table = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=-1).astype(np.uint8)
    if len(colours) > 256:
        palette = Image.fromarray(table[None]).quantize(256)
        return [one.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE) for one in pictures]
    frames = [Image.fromarray(np.searchsorted(colours, one).astype(np.uint8), "P") for one in packed]
    for frame in frames:
        frame.putpalette(table.tobytes())
    return frames


def frames_of(videos: Sequence[Any], columns: int | None = None) -> list[Image.Image]:
    """Put videos of one length beside each other: frame t of the result shows frame t of all (F PIL images).

    Args:
        videos: each one as :func:`gif` takes its frames.
        columns: videos in a row.
    """
    return [image_grid(moment, columns, 1) for moment in zip(*map(as_images, videos), strict=True)]


def clips_html(videos: Sequence[Any], fps: float) -> str:
    """Return an ``<img>`` element in which at most 16 videos play side by side; arguments as for :func:`frames_of`."""
    shown = [as_images(video) for video in videos[:MAX_LARGE]]
    columns = _columns(len(shown))
    wanted = 128 if columns == 1 else 96  # smaller than pictures: a GIF of many frames is large
    scale = _enlargement(max(shown[0][0].size), columns, wanted)
    return gif_html(frames_of(shown, columns), min(fps, MAX_FPS), scale, title="clips")


def png_html(image: Image.Image, title: str = "") -> str:
    """Return an ``<img>`` element that carries the picture inside."""
    return _img("png", png(image), title)


def gif_html(frames: Any, fps: float = 8, scale: int | None = None, title: str = "") -> str:
    """Return an ``<img>`` element that carries the animation inside; arguments as for :func:`gif`."""
    return _img("gif", gif(frames, fps, scale), title)


def _img(kind: str, data: bytes, title: str) -> str:
    text = html.escape(title, quote=True)
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" alt="{text}" title="{text}"/>'


def stats_line(
    stats: DecodeStats, num_images: int, num_codes: int, seeds: Sequence[int] = (), what: str = "image"
) -> str:
    """Say in one line what a batch cost and what it keeps.

    Example:
        >>> stats_line(DecodeStats(num_forwards=40), 1, 256, [7])
        '1 image · 40 forwards, 6.4 codes each · exact · seed 7'
    """
    mean = stats.num_forwards if stats.forwards_per_image is None else stats.forwards_per_image.double().mean().item()
    parts = [f"{num_images} {what}{'s' * (num_images != 1)}"]
    each = (
        f"{mean:.1f}".removesuffix(".0")
        + f" forward{'s' * (mean != 1)}"
        + f" {'an' if what[0] in 'aeiou' else 'a'} {what}" * (num_images > 1)
    )
    parts.append(f"{each}, {num_codes / max(mean, 1):.1f} codes each")
    if stats.num_drafter_forwards:
        parts.append(f"{stats.num_drafter_forwards} drafter forwards")
    parts.append(stats.guarantee)
    if seeds:
        parts.append(f"seed{'s' * (len(seeds) > 1)} {_list_seeds(seeds)}")
    return " · ".join(parts)


def _list_seeds(seeds: Sequence[int]) -> str:
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} to {seeds[-1]}"
    more = f", ... ({len(seeds)} in all)" if len(seeds) > MAX_SEEDS else ""
    return ", ".join(map(str, seeds[:MAX_SEEDS])) + more


def output_sheet(output: Any) -> Image.Image | None:
    """Draw the images of an ``ImagePipelineOutput``, or its codes where it has no images; None where neither fits."""
    if output.images is not None:
        return sheet(as_images(output.images), [f"seed {seed}" for seed in output.seeds])
    codes = output.codes[-1] if isinstance(output.codes, list) else output.codes  # the finest of several scales
    grid = code_grid(codes.shape[1])
    if grid is None or codes.is_floating_point():
        return None
    return sheet([code_map(row, grid) for row in codes[:MAX_SMALL]], [f"seed {seed}" for seed in output.seeds])


def output_maps(output: Any) -> Image.Image | None:
    """Draw which forward made which code permanent, for the first 16 images; None where there is nothing to see."""
    trace = output.stats.commit_trace
    if trace is None or bool((trace.diff(dim=1) > 0).all()):  # one code a forward, in order: plain stripes
        return None
    size = None if output.images is None else as_images(output.images[:1])[0].size
    grid = code_grid(trace.shape[1], size)
    if grid is None:
        return None
    maps = [trace_map(row, grid) for row in trace[:MAX_MAPS]]
    return image_grid(maps, _columns(len(maps)), max(1, 96 // max(grid)))  # half as large as the pictures


def _most(output: Any) -> int:
    small = output.images is None or max(as_images(output.images[:1])[0].size) <= SMALL
    return MAX_SMALL if small else MAX_LARGE


def output_html(output: Any) -> str:
    """Return what a notebook shows of an ``ImagePipelineOutput``: pictures, map of the decode, seeds, statistics."""
    codes = output.codes
    num_codes = sum(part.shape[1] for part in codes) if isinstance(codes, list) else codes.shape[1]
    lines = [stats_line(output.stats, len(output.seeds), num_codes, output.seeds), *output.stats.notes]
    pictures, maps = output_sheet(output), output_maps(output)
    parts = [png_html(pictures, "images" if output.images is not None else "codes")] if pictures else []
    if maps:
        parts.append(png_html(maps, "codes of one colour were made permanent by one forward pass"))
        lines[0] += " · map: codes of one colour came from one forward"
    shown = min(len(output.seeds), _most(output))
    if shown < len(output.seeds):
        lines.append(f"{shown} of {len(output.seeds)} shown")
    text = "".join(f"<div><small>{html.escape(line)}</small></div>" for line in lines)
    return "".join(f"<div>{part}</div>" for part in parts) + text
