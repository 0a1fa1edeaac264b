"""Training NAR: the start from LlamaGen's weights, a run that learns, and its export as a pipeline."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vargen
from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.backbones.nar.model import NARTransformer
from vargen.datasets.heroes.compose import HeroAtlas
from vargen.samplers.schedule.neighboring import NeighboringSampler
from vargen.training.checkpoints import checkpoint_folders
from vargen.training.export import export_pipeline
from vargen.training.recipe import load_recipe, parse_recipe
from vargen.training.run import METRICS_FILE, train
from vargen.training.tasks.nar import start_from

SMALL = {"dim": 32, "num_heads": 2, "codebook_size": 64, "condition_rope": "identity", "num_classes": 10}


def llamagen(**config):
    torch.manual_seed(0)
    model = LlamaGenTransformer(**{**SMALL, "num_layers": 3, "grid_size": (1, 8), **config})
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return model.eval()


@torch.no_grad()
def test_on_one_row_the_copy_is_llamagen_itself():
    """Diagonals of a grid of one row are its codes: same order, same mask, and equal heads average to themselves."""
    source = llamagen()
    model = NARTransformer(**SMALL, num_layers=3, grid_size=(1, 8)).eval()
    start_from(model, source, (), torch.zeros(1, dtype=torch.int64))
    codes, labels = torch.randint(0, 64, (4, 8)), torch.tensor([0, 3, 7, 10])
    torch.testing.assert_close(model(codes, labels), source(codes, labels), atol=1e-4, rtol=0)
    right, below = model(codes, labels, parts=True)
    torch.testing.assert_close(right, below)


@torch.no_grad()
def test_narrow_tables_keep_what_occurs_often():
    source = llamagen()
    model = NARTransformer(**SMALL, num_layers=2, grid_size=(1, 8), code_rank=16, ffn_dim=200).eval()
    often = torch.arange(8).repeat(1000)
    start_from(model, source, (0, 2), often)
    w1 = model.layers[1].feed_forward.w1.weight
    assert (w1[:, None] == source.layers[2].feed_forward.w1.weight).all(-1).any(1).all()  # its rows, the strongest
    error = (model.embed(torch.arange(64)) - source.embed(torch.arange(64))).norm(dim=-1)
    assert error[:8].mean() < 0.2 * error[8:].mean()
    assert (model.layers[2].attention.wo.weight == 0).all()


def test_a_start_that_does_not_fit_is_refused():
    model = NARTransformer(**SMALL, num_layers=2, grid_size=(1, 8))
    codes = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="start must be a model of width 32 with 2 heads, got 16 with 2"):
        start_from(model, llamagen(dim=16), (), codes)
    with pytest.raises(ValueError, match=r"blocks must name 2 blocks of 0..2, got \[0, 3\]"):
        start_from(model, llamagen(), (0, 3), codes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run that starts from a tiny LlamaGen of heroes and from the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("nar")
    atlas = HeroAtlas.load()
    counts = {"num_attributes": atlas.num_attributes, "num_condition_tokens": len(atlas.slots)}
    shape = {"dim": 16, "num_heads": 2, "ffn_dim": 24, "condition_rope": "identity"}
    source = LlamaGenTransformer(
        **shape, num_layers=1, codebook_size=4096, condition_type="attributes", class_dropout_prob=0.0, **counts
    )
    source.save_pretrained(folder / "start")
    table = {
        "name": "tiny-nar",
        "task": "nar",
        "model": {**shape, "num_layers": 1, "code_rank": 8, "grid_size": [16, 16]},
        "options": {"tokenizer": "heroes32-llamagen", "start": str(folder / "start"), "grid_size": 2},
        "data": {"batch_size": 2, "num_eval_images": 4, "attribute_dropout": 0.5, "null_dropout": 0.1},
        "optimizer": {"name": "muon", "lr": 2e-2},
        "schedule": {"num_steps": 24, "warmup_steps": 1, "decay_steps": 6},
        "log": {"log_every": 1, "eval_every": 24, "sample_every": 24, "checkpoint_every": 24},
    }
    result = train(parse_recipe(table), output=folder / "run")
    assert result.finished
    return folder / "run"


def test_a_run_learns(run):
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(8.3178, abs=0.1)  # log 4096: nothing is known yet
    assert losses[-1] < 0.7 * losses[0]
    held_out = [line for line in lines if "held_out_nats_per_token" in line]
    assert held_out[-1]["held_out_nats_per_token"] < 8.3
    assert (run / "samples" / "step-00000024.png").is_file()


def test_an_exported_run_draws_in_31_forwards(run, tmp_path):
    folder = export_pipeline(run, tmp_path / "model", guidance_scale=1.5)
    stored = load_file(folder / "backbone" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    for config in folder.rglob("config.json"):  # the tokenizer was loaded from a folder of this machine
        assert "_name_or_path" not in json.loads(config.read_text())
    pipe = vargen.ImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.sampler == NeighboringSampler(guidance_scale=1.5)
    out = pipe("deep elf with a red cloak", seed=1)
    assert (out.stats.num_forwards, out.images[0].size) == (31, (32, 32))
    assert len(checkpoint_folders(run)) > 0


def test_the_shipped_recipe_fits_the_budget():
    recipe = load_recipe("heroes32-nar")
    atlas = HeroAtlas.load()
    with torch.device("meta"):
        model = NARTransformer(
            **recipe.model,
            codebook_size=4096,
            condition_type="attributes",
            num_attributes=atlas.num_attributes,
            num_condition_tokens=len(atlas.slots),
            class_dropout_prob=0.0,
        )
    count = sum(weight.numel() for weight in model.parameters())
    assert count == 1_987_488
    tokenizer = Path(vargen.__file__).parent / "assets/models/heroes32-llamagen/tokenizer"
    others = sum(path.stat().st_size for path in tokenizer.iterdir())
    assert 2 * count + others < 5_000_000  # half precision
