"""Picture files from outside: formats that run programs, bombs, damage; every refusal is one printable line."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.outside import at_most, read_or_refused, refusal
from vargen.validation import pictures
from vargen.validation.pictures import FORMATS, MAX_PIXELS, batch_count, image_size, open_frames, open_image

ROOT = Path(__file__).resolve().parents[1]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"


def encoded(kind: str, size: tuple[int, int] = (12, 9), frames: int = 1, **options: object) -> bytes:
    made = [Image.fromarray(np.full((size[1], size[0], 3), 40 * i, np.uint8)) for i in range(frames)]
    more = {"save_all": True, "append_images": made[1:]} if frames > 1 else {}
    buffer = io.BytesIO()
    made[0].save(buffer, kind, **more, **options)
    return buffer.getvalue()


def png(width: int, height: int, rows: int) -> bytes:
    """An RGB file of this size that holds so many rows of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes((3 * width + 1) * rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiled_tiff(side: int) -> bytes:
    """A file of one pixel in one tile of side x side, compressed."""
    tags = [(256, 1), (257, 1), (258, 8), (259, 5), (262, 1), (277, 1), (322, side), (323, side), (324, 200), (325, 8)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + b"\x80\x00\x00\x00\x10\x10\x10\x10"


def refused(source: Any) -> str:
    return refusal(lambda: open_image(source))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_listed_format_is_read(kind: str) -> None:
    image = open_image(io.BytesIO(encoded(kind)))
    assert image.size == image_size(io.BytesIO(encoded(kind))) == (12, 9)
    assert image.convert("RGB").getpixel((3, 3)) == (0, 0, 0)
    assert [frame.size for frame in open_frames(io.BytesIO(encoded(kind)))] == [(12, 9)]


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "JPEG2000", "SGI"])
def test_no_other_format_is_read(kind: str) -> None:
    assert "none of PNG" in refused(io.BytesIO(encoded(kind)))


def test_a_postscript_file_called_png_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow alone would hand it to Ghostscript."""
    monkeypatch.setattr("subprocess.Popen", lambda *_args, **_more: pytest.fail("a program was started"))
    file = tmp_path / "picture.png"
    file.write_bytes(EPS)
    with Image.open(file) as plain:
        assert plain.format == "EPS"
    assert "picture.png is not a readable image" in refused(file)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    for side in (9000, 100_000):  # the first is below the bounds of Pillow itself
        (tmp_path / "bomb.png").write_bytes(png(side, side, 8))
        with at_most(megabytes=16):
            assert f"more than {MAX_PIXELS:,}" in refused(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="has 12x9 pixels, more than 100;"):
        open_image(io.BytesIO(encoded("PNG")), max_pixels=100)


def test_frames_count_together() -> None:
    film = encoded("GIF", frames=5)
    assert len(open_frames(io.BytesIO(film), max_pixels=5 * 12 * 9)) == 5
    with pytest.raises(ValueError, match=r"more than 4 frames of 12x9 pixels, together more than 539"):
        open_frames(io.BytesIO(film), max_pixels=5 * 12 * 9 - 1)


def test_frames_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_FRAMES", 3)
    with pytest.raises(ValueError, match="more than 3 frames"):
        open_frames(io.BytesIO(encoded("GIF", frames=4)))


def test_a_progressive_jpeg_of_many_scans_is_refused() -> None:
    """Each scan walks over all pixels: 400 of 24 bytes each on 8192 x 8192 pixels take more than a minute."""
    plain = encoded("JPEG", (64, 64), progressive=True)
    scan = plain[plain.rfind(b"\xff\xda") : -2]
    assert "of 50 scans" in refused(io.BytesIO(plain[:-2] + scan * 40 + b"\xff\xd9"))
    assert open_image(io.BytesIO(plain)).size == (64, 64)
    assert open_image(io.BytesIO(plain + b"\xff\xda" * 1000)).size == (64, 64)  # a telephone's film behind the picture


def test_a_tile_far_larger_than_its_picture_is_refused() -> None:
    """300 bytes took 15 seconds and 1.5 GB."""
    assert "tiles of 40000x40000 pixels" in refused(io.BytesIO(tiled_tiff(40_000)))
    assert "tiles" not in refused(io.BytesIO(tiled_tiff(16)))  # the compressed data is nonsense


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_one_line(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, kind)
    assert "not a readable image" in refused(io.BytesIO(buffer.getvalue()[: len(buffer.getvalue()) // 3]))


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    assert "is not a file" in refused(tmp_path / "pipe.png")
    assert "is not a file" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "none.png")
    (tmp_path / "huge.png").touch()
    os.truncate(tmp_path / "huge.png", 2**40)  # no byte on disk
    assert "is larger than" in refused(tmp_path / "huge.png")


def test_a_name_cannot_steer_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "a\x1b[31m\u202egnp.png"
    file.write_bytes(b"none")
    assert r"a\x1b[31m\u202egnp.png" in refused(file)


SAMPLES = {kind: encoded(kind, frames=2 if kind in ("GIF", "WEBP", "TIFF") else 1) for kind in FORMATS}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(FORMATS),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 400),
    tail=st.binary(max_size=30),
)
def test_any_damage_is_read_or_one_line(kind: str, changes: list[tuple[int, int]], cut: int, tail: bytes) -> None:
    data = bytearray(SAMPLES[kind])
    for place, value in changes:
        data[place % len(data)] = value
    data = data[: len(data) - cut % len(data)] + tail if cut else data + tail
    for read in (open_image, open_frames, image_size):
        read_or_refused(lambda read=read: read(io.BytesIO(bytes(data)), max_pixels=2**16))  # type: ignore[misc]


def test_batches_count_pixels() -> None:
    assert batch_count(64, 32, 32) == batch_count(64, 512, 512) == 64
    assert batch_count(64, 1024, 1024) == 16
    assert batch_count(64, 8192, 8192) == batch_count(64, 0, 5) // 64 == 1


def test_pillow_opens_files_in_one_place_only() -> None:
    """``Image.open`` reads anything: only ``vargen.validation.pictures`` may call it."""
    folders = [ROOT / name for name in ("vargen", "samplers", "tokenizers", "kernels", "notebooks", "examples")]
    files = [file for folder in folders for kind in ("*.py", "*.ipynb") for file in folder.rglob(kind)]
    assert [file.name for file in files if re.search(r"\bImage\.open\(", file.read_text())] == ["pictures.py"]
