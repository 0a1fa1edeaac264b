"""Training on any data set: a class with labels, written here, goes through tokenizers, transformers and export."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.test_training import assert_same_run, llamagen_table, vq_table
from tests.test_var import tiny_recipes
from vargen.datasets.base import DATASETS, Dataset
from vargen.datasets.heroes.dataset import HeroesDataset
from vargen.pipelines.image import ImagePipeline
from vargen.training.export import export_pipeline
from vargen.training.recipe import parse_recipe
from vargen.training.run import train
from vargen.training.tasks.base import make_task

SIDE = 16


class Stripes(Dataset):
    """Stripes down, across or nothing, in a colour drawn by index."""

    kind = "image"
    condition_type = "class"
    image_size = (SIDE, SIDE)
    words = ("down", "across", "flat")

    def __init__(self, seed, split="train", *, attribute_dropout=0.0, null_dropout=0.0, contrast=1.0):
        self.seed, self.split, self.contrast = seed, split, contrast

    def examples(self, indices):
        drawn = [np.random.default_rng([self.seed, self.split == "test", int(i)]) for i in indices]
        labels = torch.tensor([int(rng.integers(len(self.words))) for rng in drawn])
        colours = torch.tensor(np.stack([rng.uniform(0.5, 1, 3) for rng in drawn]), dtype=torch.float32)
        on = (torch.arange(SIDE) // 2 % 2).float() * 2 - 1
        patterns = torch.stack([on.expand(SIDE, SIDE), on[:, None].expand(SIDE, SIDE), torch.ones(SIDE, SIDE)])
        return {"image": self.contrast * colours[:, :, None, None] * patterns[labels][:, None], "class": labels}


@pytest.fixture(scope="module")
def toy():
    """The data set under a name; heroes cannot be drawn meanwhile."""

    def refuse(self, indices):
        raise AssertionError("heroes are drawn")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "stripes", (__name__, "Stripes"))
        patch.setattr(HeroesDataset, "examples", refuse)
        yield {"name": "stripes", "batch_size": 4, "num_eval_images": 8, "null_dropout": 0.1}


@pytest.fixture(scope="module")
def vq(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stripes") / "vq"
    metrics = train(parse_recipe(vq_table(data={**toy, "options": {"contrast": 0.9}})), output=folder).metrics
    assert metrics["psnr"] > 15
    assert "psnr_foreground" not in metrics  # these images have none
    return folder


def test_next_token_learns_resumes_and_is_exported(toy, vq, tmp_path):
    schedule = {"num_steps": 40, "warmup_steps": 2, "decay_steps": 10}
    optimizer = {"name": "muon", "lr": 2e-2, "muon_lr": 0.05}
    log = {"log_every": 10, "eval_every": 40, "sample_every": 40, "checkpoint_every": 20}
    rest = {"data": toy, "optimizer": optimizer, "log": log, "ema_decay": 0.8}
    recipe = parse_recipe(llamagen_table(vq, schedule=schedule, **rest))
    metrics = train(recipe, output=tmp_path / "run").metrics
    assert metrics["held_out_nats_per_token"] < 0.7 * math.log(64)
    assert metrics["held_out_nats_per_token_null"] < 0.7 * math.log(64)
    labels = make_task(recipe).test_data.examples(np.arange(2))["class"].tolist()
    captions = (tmp_path / "run/samples/captions.txt").read_text().splitlines()
    assert captions == [Stripes.words[label] for label in labels]

    stopped = tmp_path / "stopped"
    half = {**schedule, "num_steps": 20, "decay_steps": 0}  # the same steps as long as nothing decays
    train(parse_recipe(llamagen_table(vq, schedule=half, **rest)), output=stopped)
    train(recipe, output=stopped, resume=True)
    assert_same_run(tmp_path / "run", stopped)

    pipe = ImagePipeline.from_pretrained(export_pipeline(tmp_path / "run", tmp_path / "model"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.backbone.grid_size == (SIDE // 2, SIDE // 2)  # from the data set: the recipe does not say
    assert pipe("across", seed=0, output_type="pt").images.shape == (1, 3, SIDE, SIDE)


def test_next_scale_trains(toy, tmp_path):
    tokenizer, transformer = tiny_recipes(tmp_path, "patch")
    data = {"data": {**toy, "null_dropout": 0.0}}
    sizes = {**tokenizer["model"], "scales": [1, 4, SIDE // 2]}
    train(parse_recipe({**tokenizer, **data, "model": sizes}), output=tmp_path / "tokenizer")
    metrics = train(parse_recipe({**transformer, **data}), output=tmp_path / "run").metrics
    assert 0 < metrics["held_out_nats_per_token"] < 50
    assert "held_out_nats_per_token_null" not in metrics  # no label is ever dropped, so there is no null label
