"""What notebooks show of results: sheets, maps, animations, one line of statistics."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

import vargen
from tests.tiny import SCALES, tiny_pipeline
from vargen.display import notebook as display
from vargen.outputs import DecodeStats


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers of these sizes are not worth sharing
    yield
    torch.set_num_threads(threads)


def embedded(html: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/(?:png|gif);base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def test_output_shows_pictures_map_seeds_and_statistics():
    pipe = tiny_pipeline(sampler=vargen.SpeculativeJacobiSampler(window=8, temperature=0.5))
    output = pipe(class_labels=[1, 2, 3], seed=5)
    html = output._repr_html_()
    pictures, maps = embedded(html)
    assert pictures.size == (3 * (8 * 24 + 2) + 2, 8 * 24 + 18 + 4)  # 8 pixels become 192, with a label below
    assert maps.size[0] == 3 * (4 * 24 + 2) + 2
    mean = output.stats.forwards_per_image.double().mean().item()
    assert f"3 images · {mean:.1f}".removesuffix(".0") in html
    assert "exact · seeds 5 to 7" in html
    assert Image.open(io.BytesIO(output._repr_png_())).size == pictures.size


def test_enlargement_is_nearest_neighbour():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    large = np.asarray(display.sheet([image]))[2:-2, 2:-2]
    assert np.array_equal(large, np.asarray(image).repeat(48, 0).repeat(48, 1))


def test_next_token_has_no_map_and_codes_show_as_colours():
    pipe = tiny_pipeline()
    output = pipe(class_labels=[1], seed=5, output_type="codes")
    assert len(embedded(output._repr_html_())) == 1
    colours = np.asarray(display.code_map(output.codes[0], (4, 4))).reshape(16, 3)
    for first in range(16):
        for second in range(16):
            same = bool(output.codes[0, first] == output.codes[0, second])
            assert same == bool((colours[first] == colours[second]).all())


@pytest.mark.parametrize("output_type", ["pil", "pt", "np"])
def test_every_picture_type_shows_the_same(output_type):
    pipe = tiny_pipeline()
    expected = pipe(class_labels=[1, 4], seed=5)._repr_png_()
    assert pipe(class_labels=[1, 4], seed=5, output_type=output_type)._repr_png_() == expected


def test_many_images_are_cut_and_notes_are_escaped():
    images = [Image.new("RGB", (8, 8))] * 70
    output = vargen.ImagePipelineOutput(
        images=images, codes=torch.zeros(70, 16, dtype=torch.long), seeds=[9, 4] * 35, stats=DecodeStats(16)
    )
    output.stats.notes.append("<b>a note</b>")
    html = output._repr_html_()
    assert "64 of 70 shown" in html
    assert "9, 4, 9, 4, 9, 4, 9, 4, ... (70 in all)" in html
    assert "&lt;b&gt;a note" in html


def test_one_forward_is_singular():
    line = display.stats_line(DecodeStats(num_forwards=1, num_drafter_forwards=3), 1, 16, [2, 3])
    assert line == "1 image · 1 forward, 16.0 codes each · 3 drafter forwards · exact · seeds 2, 3"


@pytest.mark.parametrize(
    ("num_codes", "size", "grid"),
    [(256, (32, 32), (16, 16)), (128, (64, 32), (8, 16)), (sum(n * n for n in SCALES), None, None), (2, (9, 1), None)],
)
def test_the_grid_of_codes_is_guessed_from_the_picture(num_codes, size, grid):
    assert display.code_grid(num_codes, size) == grid


def test_gif_keeps_every_frame_and_its_time():
    frames = torch.rand(5, 3, 6, 4)
    with Image.open(io.BytesIO(display.gif(frames, fps=10, scale=3))) as film:
        assert (film.n_frames, film.size, film.info["loop"]) == (5, (12, 18), 0)
        for number, frame in enumerate(frames):
            film.seek(number)
            pixels = np.asarray(film.convert("RGB"))[::3, ::3]
            assert np.array_equal(pixels, (frame * 255).round().byte().permute(1, 2, 0).numpy())
            assert film.info["duration"] == (1000 if number == 4 else 100)


def test_gif_of_many_colours_stays_close_and_stores_what_changes():
    still = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    still[:, 16:] = 0.5
    frames = still.repeat(6, 1, 1, 1)
    frames[:, :, 20, 0] = torch.linspace(0, 1, 6)[:, None]
    film = display.gif(frames, scale=1)
    assert len(film) < 0.7 * sum(len(display.gif(frame[None], scale=1)) for frame in frames)
    with Image.open(io.BytesIO(film)) as opened:
        opened.seek(5)
        error = np.abs(np.asarray(opened.convert("RGB")) / 255.0 - frames[5].permute(1, 2, 0).numpy())
    assert error.mean() < 0.05


def test_videos_stand_beside_each_other():
    videos = [np.full((4, 5, 5, 3), shade, dtype=np.uint8) for shade in (10, 200)]
    frames = display.frames_of(videos)
    assert len(frames) == 4
    assert frames[0].getpixel((3, 3)) == (10, 10, 10)
    assert frames[0].getpixel((10, 3)) == (200, 200, 200)
    assert 'alt="&quot;two&quot;"' in display.gif_html(frames, title='"two"')


def test_gif_refuses_what_it_cannot_play():
    with pytest.raises(ValueError, match="at least one frame"):
        display.gif([])
    with pytest.raises(ValueError, match="fps must be in"):
        display.gif([Image.new("RGB", (2, 2))], fps=0)
