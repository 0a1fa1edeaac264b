"""xAR: official numbers of the training forward and of a full generation, sizes, cells, batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.golden_files import load_file, unpacked
from vargen.backbones.xar.model import XARTransformer
from vargen.checkpoints.verify import verify_checkpoint
from vargen.samplers.schedule.next_cell import NextCellSampler

GOLDEN = Path(__file__).parent / "golden" / "xar"


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="module")
def xar() -> XARTransformer:
    return XARTransformer.from_original(unpacked(GOLDEN / "xar.safetensors"), num_heads=2)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@torch.no_grad()
def test_official_training_forward(io: dict[str, Tensor], xar: XARTransformer) -> None:
    clean = xar.to_cells(io["latents"])
    assert torch.equal(clean.flatten(1, 2), io["sequence"])
    assert torch.equal(xar.to_latents(clean.flatten(1, 2)), io["latents"])
    t = io["train.t"].view(4, 2).T  # cell-major in the file
    x = torch.lerp(clean, io["train.noise"], t[..., None, None])
    condition = xar.class_emb(io["labels"])[:, None] + xar.time_embed((1000 * t).floor())
    assert close(condition.transpose(0, 1).flatten(0, 1), io["train.condition"])
    assert close(xar.z_proj(x).flatten(1, 2), io["train.z_proj"])
    velocity = xar(x, t, io["labels"])
    assert close(velocity.flatten(1, 2), io["train.velocity"])
    assert close((velocity - (io["train.noise"] - clean)).square().mean()[None], io["train.loss"])


def test_official_generation(io: dict[str, Tensor], xar: XARTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((GOLDEN / "config.json").read_text())
    sampler = NextCellSampler(guidance_scale=config["cfg"], num_steps=config["num_steps"])
    calls: list[tuple[Tensor, Tensor]] = []
    inner = xar.velocity

    def velocity(session, cell, x, t, clean=None):  # type: ignore[no-untyped-def]
        out = inner(session, cell, x, t, clean)
        calls.append((x, out))
        return out

    monkeypatch.setattr(xar, "velocity", velocity)
    output = sampler.sample(
        xar,
        io["labels"],
        seeds=[0, 1],
        noise=lambda cell: (io[f"gen.cell{cell}.init_noise"], io[f"gen.cell{cell}.step_noise"]),
    )
    for i, (x, out) in enumerate(calls):
        if f"gen.call{i}.x" in io:
            assert close(x, io[f"gen.call{i}.x"][:2, -64:])
            assert close(out.flatten(0, 1), io[f"gen.call{i}.velocity"][:, -64:])
    assert output.latents is not None
    assert close(xar.to_latents(output.latents), io["gen.latents"])
    assert output.stats.num_forwards == len(config["calls"]) == 16


def test_cells_see_only_earlier_cells(io: dict[str, Tensor], xar: XARTransformer) -> None:
    x, t = xar.to_cells(io["latents"]), torch.full((2, 4), 0.3)
    changed = x.clone()
    changed[:, 2] += 1
    with torch.no_grad():
        before, after = xar(x, t, io["labels"]), xar(changed, t, io["labels"])
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 3], after[:, 3])


def test_batches_do_not_matter(xar: XARTransformer) -> None:
    sampler = NextCellSampler(num_steps=3, guidance_scale=2.0)
    both = sampler.sample(xar, torch.tensor([1, 5]), seeds=[8, 9]).latents
    alone = sampler.sample(xar, torch.tensor([5]), seeds=[9]).latents  # a batch of one breaks the official splitter
    assert both is not None
    assert alone is not None
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_published_sizes() -> None:
    millions = {"B": 172.6, "L": 608.4, "H": 1186.0}
    for size, count in millions.items():
        with torch.device("meta"):
            weights = XARTransformer.from_size(size).state_dict()
        report = verify_checkpoint({**weights, "mask": torch.empty(1, 1, 256, 256, device="meta")})
        assert (report.ok, report.size) == (True, f"xar_{size}")
        assert round(report.num_parameters / 1e6, 1) == count


def test_training_and_refusals(io: dict[str, Tensor], xar: XARTransformer) -> None:
    loss = xar.loss(io["latents"], io["labels"], generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(loss)
    with pytest.raises(ValueError, match="num_heads cannot be read"):
        XARTransformer.from_original(unpacked(GOLDEN / "xar.safetensors"))
    with pytest.raises(ValueError, match="class label must be in"):
        xar.open(torch.tensor([1001]))
    with pytest.raises(ValueError, match="set num_steps"):
        NextCellSampler(num_diffusion_steps=5)
