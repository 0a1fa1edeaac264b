"""Training of the continuous family: autoencoder, both transformers and the drafter, one after the other at tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vargen.backbones.mar.causal import CausalMARTransformer
from vargen.backbones.mar.model import MARTransformer
from vargen.training.run import train
from vargen.training.sources import read_run
from vargen.training.tasks.base import make_task
from vargen.training.tasks.kl import load_autoencoder
from vargen.training.tasks.mar import load_continuous

SHORT = [
    "data.batch_size=4", "data.num_eval_images=4", "schedule.num_steps=2", "schedule.warmup_steps=1",
    "schedule.decay_steps=1", "log.log_every=1", "log.sample_every=2", "options.grid_size=2",
    "compile=false",
]  # fmt: skip
HEAD = ["model.head_depth=1", "model.head_width=16", 'model.num_sampling_steps="4"']
BLOCKS = [f"model.{part}_{name}" for part in ("encoder", "decoder") for name in ("dim=16", "depth=1", "num_heads=2")]


@pytest.mark.slow
def test_every_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vargen.training.tasks.kl.SCALE_IMAGES", 32)
    metrics = train("heroes32-kl", [*SHORT, "model.block_out_channels=[8, 8]"]).metrics
    assert metrics["psnr"] > 5
    autoencoder = load_autoencoder("runs/heroes32-kl")
    assert 0.01 < autoencoder.config.scaling_factor < 100
    autoencoder.save_pretrained(tmp_path / "saved")
    assert load_autoencoder(tmp_path / "saved").config.scaling_factor == autoencoder.config.scaling_factor
    decoder = [*SHORT, "model.block_out_channels=[8, 8]", "options.freeze_encoder=true"]
    train("heroes32-kl-decoder", decoder)
    sharper = load_autoencoder("runs/heroes32-kl-decoder")
    assert sharper.config.scaling_factor == autoencoder.config.scaling_factor  # the latents are the same numbers
    for name, same in {"encoder": True, "quant_conv": True, "decoder": False}.items():
        pairs = zip(getattr(sharper, name).parameters(), getattr(autoencoder, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == same
    train("heroes32-mar-early", [*SHORT, *HEAD, *BLOCKS])
    assert train("heroes32-mar", [*SHORT, *HEAD, *BLOCKS]).metrics["held_out_loss"] > 0
    started = make_task(read_run("runs/heroes32-mar")[0]).build(initialize=True).state_dict()
    torch.testing.assert_close(dict(started), read_run("runs/heroes32-mar-early")[1])
    small = ["model.dim=16", "model.num_layers=2", "model.num_heads=2"]
    assert train("heroes32-mar-causal", [*SHORT, *HEAD, *small]).metrics["held_out_loss"] > 0
    found = train("heroes32-mar-draft", [*SHORT, "model.num_layers=1", "options.num_positions=3"]).metrics
    assert 0 < found["held_out_acceptance"] <= 1
    assert found["held_out_path_kl"] > 0
    target = load_continuous("runs/heroes32-mar-causal")
    drafter = load_continuous("runs/heroes32-mar-draft")
    assert isinstance(drafter, CausalMARTransformer)
    assert drafter.config.num_sampling_steps == target.config.num_sampling_steps
    assert isinstance(load_continuous("runs/heroes32-mar", MARTransformer), MARTransformer)
    with pytest.raises(ValueError, match="trains no MARTransformer"):
        load_continuous("runs/heroes32-mar-causal", MARTransformer)
    with pytest.raises(ValueError, match="needs a run of task 'kl'"):
        load_autoencoder("runs/heroes32-mar")
    line = json.loads((tmp_path / "runs/heroes32-kl/metrics.jsonl").read_text().splitlines()[0])
    assert {"l1", "mse", "kl_nats"} <= line.keys()
    assert all(torch.isfinite(p).all() for p in drafter.parameters())
