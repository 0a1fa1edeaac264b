"""Acceptance maps: one square a code, one colour a forward pass."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.toys import SpatialBackbone
from vargen.display.plot import BANDS, acceptance_map, diagonal_front
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler


def test_a_map_shows_the_run_it_was_made_from():
    backbone = SpatialBackbone(32, (3, 4))
    out = SpeculativeJacobiSampler(window=4).sample(backbone, torch.zeros(2, dtype=torch.int64), seeds=[1, 2])
    figure = acceptance_map([Image.new("RGB", (8, 6)), np.zeros((6, 8, 3))], out.stats.commit_trace, (3, 4))
    assert len(figure.axes) == 4
    for steps, axis in zip(out.stats.commit_trace, figure.axes[1::2], strict=True):
        assert axis.get_title().startswith(f"{int(steps[-1]) + 1} forwards")
        assert len(axis.patches) == 12
        for place, step in zip(axis.patches, steps.tolist(), strict=True):
            colour = tuple(int(BANDS[step % len(BANDS)][i : i + 2], 16) / 255 for i in (1, 3, 5))
            assert place.get_facecolor()[:3] == pytest.approx(colour)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), r"commit_trace must be \[B, 12\]"),
        (torch.zeros(2, 12, dtype=torch.int64), "1 images and 2 traces"),
        (torch.full((12,), -1), "draw the map when the image is complete"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(trace, message):
    with pytest.raises(ValueError, match=message):
        acceptance_map(Image.new("RGB", (8, 6)), trace, (3, 4))


def test_the_front_of_a_decode_is_what_the_last_pass_drew():
    trace = torch.tensor([0, 1, 2, 1, 2, 3])
    codes = torch.where(trace <= torch.tensor([[1], [3]]), 5, -1)
    figure = diagonal_front([torch.zeros(3, 4, 6)] * 2, codes, trace, (2, 3))
    assert [axis.get_title() for axis in figure.axes[:2]] == ["2 forwards", "4 forwards"]
    maps = [axis.images[0].get_array().tolist() for axis in figure.axes[2:]]
    assert maps == [[[1, 2, 0], [2, 0, 0]], [[1, 1, 1], [1, 1, 2]]]
    with pytest.raises(ValueError, match=r"codes must be \[1, 6\], one row an image, got \[2, 6\]"):
        diagonal_front([torch.zeros(3, 4, 6)], codes, trace, (2, 3))
