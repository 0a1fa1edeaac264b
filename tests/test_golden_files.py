"""Packed golden files give back their numbers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.golden_files import draw, load_file, pack, unpack, unpacked


def test_packing_keeps_shapes_and_all_bits_but_those_asked_for() -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, 7, generator=g),
        "b": torch.tensor(-1.5),
        "c": torch.zeros(2),
        "d": torch.ones(4),
    }
    tensors["edge"] = torch.tensor([1.9999999, -3.9999998, 1e-30, 1e30])  # rounding carries into the exponent
    exact = unpack(pack(tensors))
    assert all(torch.equal(exact[name], value) for name, value in tensors.items())
    out = unpack(pack(tensors, bits=4))
    for name, value in tensors.items():
        assert out[name].shape == value.shape
        assert ((out[name] - value).abs() <= value.abs() * 2**-20).all()
    assert torch.equal(out["b"], tensors["b"])
    assert torch.equal(out["d"], tensors["d"])


def test_plain_and_packed_files_read_alike(tmp_path) -> None:
    tensors = {"x": torch.arange(6.0).view(2, 3)}
    save_file(tensors, tmp_path / "plain.safetensors")
    (tmp_path / "packed.safetensors.xz").write_bytes(pack(tensors))
    for name in ("plain", "packed"):
        assert torch.equal(load_file(tmp_path / f"{name}.safetensors")["x"], tensors["x"])
    assert unpacked(tmp_path / "plain.safetensors") == tmp_path / "plain.safetensors"


def test_drawn_tensors_come_back_and_other_streams_are_noticed() -> None:
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(100, generator=generator)[40:46].view(2, 3) * 2.0 - 1.0
    generator = torch.Generator().manual_seed(3)
    torch.randn(17, generator=generator)
    normal = torch.randn(4, generator=generator) * 0.5
    recipe = [
        {"key": "u", "kind": "rand", "seed": 3, "start": 40, "shape": [2, 3], "scale": 2.0, "offset": -1.0},
        {"key": "skipped", "kind": "randn", "seed": 3, "shape": [17], "scale": 1.0, "offset": 0.0},
        {"key": "n", "kind": "randn", "seed": 3, "shape": [4], "scale": 0.5, "offset": 0.0},
    ]
    skipped = torch.randn(17, generator=torch.Generator().manual_seed(3))
    for entry, value in zip(recipe, (uniform, skipped, normal), strict=True):
        entry["ends"] = [float(value.flatten()[0]), float(value.flatten()[-1])]
    found = draw(recipe)
    assert torch.equal(found["u"], uniform)
    assert torch.equal(found["n"], normal)
    recipe[0]["ends"] = [0.5, 0.5]
    with pytest.raises(ValueError, match="draws other numbers for u"):
        draw(recipe)
