"""Conventions of pixels: rounding, crop, resize."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from vargen.images import center_crop, from_pil, preprocess, resize, to_pil, to_uint8


def test_pixels_survive_the_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    pictures = to_pil(levels.float() / 127.5 - 1)
    assert torch.equal(to_uint8(from_pil(pictures)), levels)
    assert torch.equal(to_uint8(from_pil(pictures), "llamagen"), levels)
    assert preprocess(pictures).aminmax() == (-1, 1)


def test_roundings_follow_their_formulas() -> None:
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.2039, 0.999, 1.0, 2.0])
    official = [int(min(max(127.5 * v + 128, 0), 255)) for v in x.tolist()]
    assert to_uint8(x, "llamagen").tolist() == official
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 153, 255, 255, 255]
    assert to_uint8(x, "truncate").tolist() == [0, 0, 0, 127, 153, 254, 255, 255]
    with pytest.raises(ValueError, match="rounding must be one of"):
        to_uint8(x, "floor")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([float("nan")]))


def test_crop_is_adms() -> None:
    wide = Image.new("RGB", (200, 64), "red")
    wide.paste("blue", (68, 0, 132, 64))  # the centre square
    crop = center_crop(wide, 16)  # halved twice to 50 x 16, then cut
    assert crop.size == (16, 16)
    assert crop.getpixel((8, 8)) == (0, 0, 255)
    batch = preprocess([wide, Image.new("RGB", (40, 90))], 16)
    assert batch.shape == (2, 3, 16, 16)
    assert batch[1].eq(-1).all()
    with pytest.raises(ValueError, match="share one size"):
        from_pil([wide, Image.new("RGB", (40, 90))])


def test_resize_is_plain_bicubic() -> None:
    ramp = torch.linspace(-1, 1, 8).expand(1, 1, 8, 8)
    assert resize(ramp, 4).shape == (1, 1, 4, 4)
    torch.testing.assert_close(resize(ramp, 8), ramp)
