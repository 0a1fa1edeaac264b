"""The callback that shows a picture while it is drawn."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vargen
from tests.tiny import SCALES, tiny_pipeline, tiny_scale_pipeline
from vargen.display import preview as module


def test_one_frame_a_forward_and_a_last_one_without_the_front():
    pipe, preview = tiny_pipeline(), vargen.LivePreview(scale=1)
    output = pipe(class_labels=[1, 2], seed=3, callback_on_step_end=preview)
    assert len(preview.frames) == 16 + 1
    picture = np.asarray(preview.frames[-1])[2:10, 2:10]
    assert np.array_equal(picture, np.asarray(output.images[0]))
    first = np.asarray(preview.frames[0])[2:10, 2:10]
    undrawn = np.ones((8, 8), dtype=bool)
    undrawn[:2, :2] = False
    assert (first[undrawn] == 128).all()
    assert not np.array_equal(first[:2, :2], picture[:2, :2])  # tinted
    assert (np.asarray(preview.frames[1])[2:4, 2:4] == picture[:2, :2]).all()  # the tint moves on


def test_every_and_max_images_limit_the_work():
    pipe, preview = tiny_pipeline(), vargen.LivePreview(every=5, max_images=2, scale=1)
    pipe(class_labels=[1, 2, 3], seed=3, callback_on_step_end=preview)
    assert len(preview.frames) == 3 + 2
    assert preview.frames[0].width == 2 * (8 + 2) + 2


def test_chunks_of_a_call_and_a_second_call_start_anew():
    pipe, preview = tiny_pipeline(), vargen.LivePreview(scale=1)
    output = pipe(class_labels=[1, 2], seed=3, batch_size=1, callback_on_step_end=preview)
    assert len(preview.frames) == 2 * 17
    assert np.array_equal(np.asarray(preview.frames[16])[2:10, 2:10], np.asarray(output.images[0]))
    assert (np.asarray(preview.frames[17])[4:10, 2:10] == 128).all()
    pipe(class_labels=[1], seed=3, callback_on_step_end=preview)
    assert len(preview.frames) == 17


def test_scales_show_as_a_strip():
    pipe, preview = tiny_scale_pipeline(), vargen.LivePreview(scale=1)
    output = pipe(class_labels=[1, 2], seed=3, callback_on_step_end=preview)
    assert len(preview.frames) == len(SCALES)
    assert preview.frames[0].size == (len(SCALES) * 10 + 2, 2 * (8 + 18 + 2) + 2)
    last = np.asarray(preview.frames[-1])
    assert np.array_equal(last[30:38, 22:30], np.asarray(output.images[1]))
    assert (np.asarray(preview.frames[0])[2:10, 22:30] == 128).all()


def test_videos_show_as_frames_and_continuous_tokens_are_counted():
    tokens = torch.full((1, 4, 3), float("nan"))
    tokens[0, 0] = 0.0
    pipe = SimpleNamespace(backbone=SimpleNamespace(), decode_codes=lambda codes: torch.zeros(len(codes), 3, 17, 8, 8))
    preview = vargen.LivePreview(scale=1)
    preview(pipe, 0, 1, {"codes": tokens})
    assert preview.frames[0].width == 5 * 10 + 2


def test_frames_are_written_and_saved(tmp_path):
    preview = vargen.LivePreview(folder=tmp_path / "frames", every=8)
    tiny_pipeline()(class_labels=[1], seed=3, callback_on_step_end=preview)
    assert sorted(path.name for path in (tmp_path / "frames").iterdir()) == [f"frame_000{i}.png" for i in range(3)]
    preview.save(tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3
    assert preview._repr_html_().startswith('<img src="data:image/gif')


def test_pictures_are_the_same_with_and_without_preview():
    pipe = tiny_pipeline()
    plain = pipe(class_labels=[1], seed=3)
    watched = pipe(class_labels=[1], seed=3, callback_on_step_end=vargen.LivePreview())
    assert torch.equal(plain.codes, watched.codes)


def test_jupyter_updates_one_picture_in_place(monkeypatch):
    shown, updates = [], []

    def show(picture, display_id):
        shown.append(picture)
        return SimpleNamespace(update=updates.append)

    fake = SimpleNamespace(Image=lambda data, format: Image.open(io.BytesIO(data)), display=show)
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    monkeypatch.setattr(module, "in_jupyter", lambda: True)
    preview = vargen.LivePreview()
    tiny_pipeline()(class_labels=[1], seed=3, callback_on_step_end=preview)
    assert (len(shown), len(updates)) == (1, 16)
    assert np.array_equal(np.asarray(updates[-1]), np.asarray(preview.frames[-1]))


def test_outside_jupyter_nothing_is_shown():
    assert not module.in_jupyter()


@pytest.mark.parametrize("option", ["every", "max_images", "scale"])
def test_options_below_one_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        vargen.LivePreview(**{option: 0})


def test_nothing_drawn_has_nothing_to_show():
    assert vargen.LivePreview()._repr_html_() is None
    with pytest.raises(ValueError, match="at least one frame"):
        vargen.LivePreview().gif()
