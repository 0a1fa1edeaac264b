"""Pictures of every kind become the right RGB by one function, whichever door they come in by."""

from __future__ import annotations

import io
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.outside import refusal
from vargen.evaluation.images import FolderImages, described, read_images
from vargen.images import from_pil, preprocess
from vargen.pipelines.editing import read_edit
from vargen.pipelines.video_frames import read_frames
from vargen.validation.pictures import all_frames, image_facts, open_frames, open_rgb
from vargen.validation.rgb import to_rgb

ROOT = Path(__file__).resolve().parents[1]
LEVELS = np.array([[0, 128, 257, 32768, 65407, 65535]], np.uint16)  # 128 is the last that rounds down
EIGHT_BIT = [0, 0, 1, 128, 255, 255]


def reread(image: Image.Image, kind: str = "PNG", **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return open_rgb(io.BytesIO(buffer.getvalue()))


def grey(image: Image.Image) -> list[int]:
    pixels = np.asarray(image)
    assert image.mode == "RGB"
    assert (pixels == pixels[..., :1]).all()
    return [int(value) for value in pixels[0, :, 0]]


def tagged(orientation: int, size: tuple[int, int] = (4, 2)) -> bytes:
    """A JPEG with a white left half whose camera was held like this."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(np.kron(pixels, np.ones((8, 8, 1), np.uint8))).save(buffer, "JPEG", exif=exif, quality=95)
    return buffer.getvalue()


def film(*levels: int, side: int = 8, kind: str = "GIF") -> bytes:
    made = [Image.new("RGB", (side, side), (level,) * 3) for level in levels]
    buffer = io.BytesIO()
    made[0].save(buffer, kind, save_all=True, append_images=made[1:])
    return buffer.getvalue()


def test_sixteen_bit_grey_is_value_over_257() -> None:
    """Pillow's own conversion makes everything above 255 white."""
    assert grey(to_rgb(Image.fromarray(LEVELS))) == EIGHT_BIT
    assert grey(to_rgb(Image.fromarray(LEVELS.astype(np.int32)))) == EIGHT_BIT  # mode I: how Pillow 10.1 opens the PNG
    assert grey(to_rgb(Image.frombytes("I;16B", (6, 1), LEVELS.astype(">u2").tobytes()))) == EIGHT_BIT
    for kind in ("PNG", "TIFF"):
        assert grey(reread(Image.fromarray(LEVELS), kind)) == EIGHT_BIT
    for wrong in (-1, 65536):
        assert "must lie in [0, 65535]" in refusal(lambda v=wrong: to_rgb(Image.new("I", (2, 2), v)))  # type: ignore[misc]


def test_floating_grey_lies_between_0_and_1() -> None:
    values = np.array([[0, 0.5, 1]], np.float32)
    assert grey(to_rgb(Image.fromarray(values))) == grey(reread(Image.fromarray(values), "TIFF")) == [0, 128, 255]
    for wrong in (-0.1, 1.5, 255, float("nan"), float("inf")):
        assert "has mode F with values in" in refusal(lambda v=wrong: to_rgb(Image.new("F", (2, 2), v)))  # type: ignore[misc]


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    image.info["transparency"] = 0
    return image


def clear_grey() -> Image.Image:
    image = Image.new("L", (2, 1), 7)
    image.putpixel((1, 0), 9)
    image.info["transparency"] = 7
    return image


def clear_sixteen() -> Image.Image:
    image = Image.fromarray(np.array([[5, 257]], np.uint16))
    image.info["transparency"] = 5
    return image


CLEAR = {
    "RGBA": lambda: Image.new("RGBA", (2, 1), (0, 0, 0, 0)),
    "LA": lambda: Image.new("LA", (2, 1), (0, 0)),
    "RGBa": lambda: Image.new("RGBA", (2, 1), (0, 0, 0, 0)).convert("RGBa"),
    "La": lambda: Image.new("LA", (2, 1), (0, 0)).convert("La"),
    "P": palette,
    "L": clear_grey,
    "I;16": clear_sixteen,
}


@pytest.mark.parametrize("kind", CLEAR)
def test_transparent_pictures_ask_for_a_background_and_lie_on_it(kind: str) -> None:
    for entrance in (to_rgb, from_pil, lambda image, **more: preprocess(image, 1, **more)):
        assert re.search(r"is transparent; say what lies behind it: background='white' \(--background white\)$", refusal(lambda e=entrance: e(CLEAR[kind]())))  # type: ignore[misc]  # fmt: skip
    for colour in ("#0a141e", (10, 20, 30), [10, 20, 30]):
        assert to_rgb(CLEAR[kind](), background=colour).getpixel((0, 0)) == (10, 20, 30)  # type: ignore[arg-type]


def test_half_transparent_is_half_and_opaque_needs_no_background() -> None:
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert to_rgb(half, background="black").getpixel((0, 0)) == (128, 0, 0)
    assert to_rgb(Image.new("RGBA", (1, 1), (3, 4, 5, 255))).getpixel((0, 0)) == (3, 4, 5)
    opaque = palette()
    opaque.info["transparency"] = 7  # a colour that is not used
    assert to_rgb(opaque).getpixel((0, 0)) == (10, 20, 30)
    assert to_rgb(Image.new("CMYK", (1, 1), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("wrong", ["whitish", "#12345678", (1, 2), (1, 2, 300), (0.5, 0, 0), 3, ["a", "b", "c"]])
def test_a_background_is_an_opaque_colour(wrong: Any) -> None:
    text = refusal(lambda: to_rgb(Image.new("RGB", (1, 1)), background=wrong))
    assert text.startswith("background must be a colour like 'white'")


def white_side(pixels: np.ndarray) -> str:
    height, width = pixels.shape[:2]
    halves = {
        "left": pixels[:, : width // 2],
        "right": pixels[:, width // 2 :],
        "top": pixels[: height // 2],
        "bottom": pixels[height // 2 :],
    }
    return max(halves, key=lambda side: halves[side].mean())


SIDES = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}


@pytest.mark.parametrize("orientation", SIDES)
def test_exif_rotation_is_applied_once(orientation: int) -> None:
    data = tagged(orientation)
    image = open_rgb(io.BytesIO(data))
    assert white_side(np.asarray(image)) == SIDES[orientation]
    assert image.size == image_facts(io.BytesIO(data)).upright == ((32, 16) if orientation < 5 else (16, 32))
    assert to_rgb(image).tobytes() == image.tobytes()
    raw = open_rgb(io.BytesIO(data), rotate=False)
    assert (raw.size, white_side(np.asarray(raw))) == ((32, 16), "left")


def test_animations_give_one_frame_with_a_warning_and_videos_take_all() -> None:
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        with pytest.warns(UserWarning, match="is an animation: one frame of it is used"):
            assert grey(open_rgb(io.BytesIO(film(0, 255, kind=kind))))[0] < 3
        with Image.open(io.BytesIO(film(0, 255, kind=kind))) as opened:
            with pytest.warns(UserWarning, match="image is an animation"):
                from_pil(opened)
            assert len(all_frames(opened)) == 2
    with Image.open(io.BytesIO(film(0, 100, 255))) as opened:
        for given in (opened, [opened]):
            clip = read_frames(given, (8, 8))
            assert clip is not None
            assert [round(float(frame)) for frame in (clip[0].mean((1, 2, 3)) + 1) * 127.5] == [0, 100, 255]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_frames(io.BytesIO(film(0, 255)))) == 2


class Tokenizer:
    scales = ((1, 1), (2, 2))
    downsample = 4

    def scale_inputs(self) -> None: ...


def test_pipelines_read_pictures_by_the_same_function() -> None:
    picture, mask = Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.new("I;16", (8, 8), 65535)
    assert "image is transparent" in refusal(lambda: read_edit(Tokenizer(), picture, mask))
    found = read_edit(Tokenizer(), picture, mask, background="white")
    assert found is not None
    assert (found[0] == 1).all()
    assert not found[1].any()  # a white mask of 16 bits: nothing is kept
    assert "frame is transparent" in refusal(lambda: read_frames([picture], (8, 8)))
    clip = read_frames([picture], (8, 8), "white")
    assert clip is not None
    assert (clip == 1).all()


def test_folders_hold_every_format_whatever_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".cache").mkdir()
    for name, kind in {"a.png": "PNG", "b.TIF": "TIFF", "c.gif": "GIF", "d.ppm": "PPM", "deep/er/e": "JPEG"}.items():
        Image.new("RGB", (8, 8), (250,) * 3).save(folder / name, kind)
    Image.fromarray(np.full((8, 8), 257 * 250, np.uint16)).save(folder / "f.png")
    Image.new("RGB", (8, 8)).save(folder / ".cache" / "no.png")
    Image.new("RGB", (8, 8)).save(folder / ".no.png")
    Image.new("RGB", (8, 8), (250,) * 3).save(tmp_path / "elsewhere.png")
    os.symlink(tmp_path / "elsewhere.png", folder / "g.png")
    os.symlink(tmp_path / "nowhere.png", folder / "h.png")
    os.symlink(folder, folder / "deep" / "loop")
    (folder / "notes.txt").write_text("hello")
    (folder / "LICENSE").write_text("hello")
    with pytest.warns(UserWarning, match="7 images; skipped: ") as caught:
        images = read_images(folder)
    said = str(caught[0].message).split("skipped: ")[1]
    assert said == (
        "1 broken link, 1 hidden file, 1 hidden folder, 1 link to a folder that is read already, "
        "1 no picture (.txt), 1 no picture (no suffix)"
    )
    assert described(images) == f"{folder} (skipped: {said})"
    assert images.num_images == 7
    assert torch.cat(list(images.batches(4))).unique().tolist() == [250]


def test_folders_follow_the_field_and_say_so(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(tagged(6))
    plain, turned = FolderImages(tmp_path), FolderImages(tmp_path, rotate=True)
    assert (plain.shape, turned.shape) == ((16, 32), (32, 16))
    assert white_side(next(plain.batches(1))[0].permute(1, 2, 0).numpy()) == "left"
    assert white_side(next(turned.batches(1))[0].permute(1, 2, 0).numpy()) == "top"
    assert described(plain).endswith("(EXIF rotation of 1 ignored, as usual in the field)")
    assert described(turned).endswith("(EXIF rotation of 1 applied)")
    assert plain.digest() != turned.digest()  # features are cached under it


def test_folders_take_a_background_and_first_frames(tmp_path: Path) -> None:
    CLEAR["RGBA"]().resize((8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.gif").write_bytes(film(255, 0))
    with pytest.warns(UserWarning, match="1 animations, first frames are used"):
        images = read_images(tmp_path, background="white")
    assert torch.cat(list(images.batches(2))).unique().tolist() == [255]
    assert described(images).endswith("(on background #ffffff; first frames of 1 animations)")
    assert "rotate is for folders" in refusal(
        lambda: read_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), rotate=True)
    )


def test_no_other_place_makes_rgb_of_pictures_from_outside() -> None:
    """Pillow's ``convert("RGB")`` stands where pictures are the library's own."""
    own = {"rgb.py", "notebook.py", "grid.py", "studio.py", "preview.py", "build_atlas.py", "plot.py"}
    rooms = [ROOT / name for name in ("vargen", "samplers", "tokenizers", "kernels")]
    files = {
        file for room in rooms for file in room.rglob("*.py") if re.search(r"convert\(\s*\"RGB\"", file.read_text())
    }
    assert {file.name for file in files} <= own
