"""Packed golden files give back their numbers."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from tests.golden_files import load_file, pack, unpack, unpacked


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
