"""Training of EAGLE drafters: the released loss, runs that learn and continue to the bit, and what is exported."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.test_training import assert_same_run, newest
from tests.tiny import CODEBOOK_SIZE, tiny_backbone, tiny_tokenizer
from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.conditioners.attributes import AttributeConditioner
from vargen.datasets.heroes.compose import HeroAtlas
from vargen.draft_models.eagle import EagleDrafter
from vargen.pipelines.image import ImagePipeline
from vargen.samplers.window.draft_model import DraftModelSampler
from vargen.samplers.window.lantern import LanternSampler
from vargen.samplers.window.next_token import NextTokenSampler
from vargen.training.export import export_drafter
from vargen.training.recipe import parse_recipe
from vargen.training.run import METRICS_FILE, train
from vargen.training.tasks.base import make_task
from vargen.training.tasks.eagle import DrafterTask, drafter_losses, hidden_states


def hero_backbone():
    """Random weights over the codes of the tiny tokenizer, for heroes of 32 x 32 pixels."""
    torch.manual_seed(1)
    atlas = HeroAtlas.load()
    backbone = LlamaGenTransformer(
        dim=32,
        num_layers=1,
        num_heads=2,
        codebook_size=CODEBOOK_SIZE,
        condition_type="attributes",
        num_attributes=atlas.num_attributes,
        num_condition_tokens=len(atlas.slots),
        condition_rope="identity",
    )
    for weight in (backbone.output.weight, backbone.cls_embedding.embedding_table.weight):
        nn.init.normal_(weight, std=0.5)
    return backbone.eval()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Folder of a pipeline with random weights."""
    folder = tmp_path_factory.mktemp("pipeline")
    parts = {"conditioner": AttributeConditioner("heroes"), "sampler": NextTokenSampler()}
    ImagePipeline(tokenizer=tiny_tokenizer(), backbone=hero_backbone(), **parts).save_pretrained(folder)
    return folder


def table(pipeline, **changes):
    return {
        "name": "tiny-eagle",
        "task": "eagle",
        "model": {"num_heads": 2, "ffn_dim": 48},
        "options": {"backbone": str(pipeline), "tokenizer": str(pipeline), "distribution_weight": 1.0, "noise": 0.01},
        "data": {"batch_size": 2, "num_eval_images": 2, "attribute_dropout": 0.5, "null_dropout": 0.1},
        "optimizer": {"lr": 5e-3},
        "schedule": {"num_steps": 6, "warmup_steps": 1, "decay_steps": 2},
        "log": {"log_every": 1, "eval_every": 0, "sample_every": 0, "checkpoint_every": 3},
        **changes,
    }


@pytest.fixture(scope="module")
def run(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eagle") / "run"
    assert train(parse_recipe(table(pipeline)), output=folder).finished
    return folder


def test_the_loss_is_the_released_one(golden):
    stored = golden("lantern/drafter", "train.")
    weights = golden("lantern/drafter", "weights.")
    drafter = EagleDrafter.from_original(weights, grid_size=(16, 16), num_heads=4, num_condition_tokens=120)
    embeddings = drafter.embed(stored["input_ids"])
    with torch.no_grad():
        predicted = drafter(stored["hidden_states"], embeddings)
        real = stored["attention_mask"] > 0
        torch.testing.assert_close(predicted[real], stored["predict"][real], rtol=0, atol=1e-5)
        head = nn.Linear(32, 64, bias=False)
        head.weight = nn.Parameter(golden("lantern/drafter")["lm_head.weight"])
        mask = stored["loss_mask"].float()
        feature, cross_entropy = drafter_losses(predicted, stored["target"], head, mask)
        torch.testing.assert_close(feature + 0.1 * cross_entropy, stored["loss"][0], rtol=1e-5, atol=0)
        agree = (head(predicted).argmax(-1) == head(stored["target"]).argmax(-1)) & (mask > 0)
    assert (agree.sum(), mask.sum()) == (stored["correct_top1"], stored["total"])


def test_features_are_those_of_the_backbone(pipeline):
    """What the drafter learns from is what it gets when it drafts."""
    task = make_task(parse_recipe(table(pipeline)))
    batch = task.batch(0)
    codes, condition = batch["codes"], batch["attributes"]
    hidden = hidden_states(task.backbone, codes, condition)
    assert torch.equal(hidden, batch["hidden"])
    with torch.no_grad():
        logits = task.backbone(codes, condition)
    first = task.backbone.num_condition_tokens - 1
    torch.testing.assert_close(task.backbone.output(hidden)[:, first:], logits, rtol=1e-5, atol=1e-5)


def test_drafters_learn(pipeline, tmp_path):
    schedule = {"num_steps": 40, "warmup_steps": 2, "decay_steps": 10}
    optimizer = {"name": "muon", "lr": 3e-3, "muon_lr": 0.02}
    log = {**table(pipeline)["log"], "eval_every": 40}
    recipe = parse_recipe(table(pipeline, schedule=schedule, optimizer=optimizer, log=log))
    task = make_task(recipe)
    torch.manual_seed(0)
    before = task.evaluate(task.build(initialize=True))["held_out_acceptance"]
    result = train(recipe, output=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert result.metrics["held_out_acceptance"] > before + 0.1


def test_a_stopped_run_continues_to_the_same_weights(pipeline, run, tmp_path, monkeypatch):
    loss, calls = DrafterTask.loss, []

    def stopped(self, model, batch):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return loss(self, model, batch)

    recipe = parse_recipe(table(pipeline))
    monkeypatch.setattr(DrafterTask, "loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, output=tmp_path / "run")
    monkeypatch.setattr(DrafterTask, "loss", loss)
    train(recipe, output=tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", run)


def test_another_seed_gives_other_weights(pipeline, run, tmp_path):
    train(parse_recipe(table(pipeline, seed=1)), output=tmp_path / "run")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "run", run)


def test_exported_drafters_are_what_samplers_take(pipeline, run):
    folder = export_drafter(run, pipeline)
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    saved = load_file(newest(run) / "ema.safetensors")
    assert torch.equal(stored["fc.weight"], saved["fc.weight"].half())
    assert json.loads((pipeline / "training.json").read_text())["eagle"]["step"] == 6
    with pytest.raises(ValueError, match="exists"):
        export_drafter(run, pipeline)

    pipe = ImagePipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    pipe.sampler = LanternSampler.from_config(pipe.sampler.config, relaxation="none", depth=2)
    ask = {"prompt": "human", "seed": 0, "output_type": "codes"}
    drafted = pipe(**ask)
    assert drafted.stats.num_drafter_forwards > drafted.stats.num_forwards  # two a pass
    assert pipe.drafters == ["eagle"]
    pipe.load_drafter("eagle")
    pipe.eagle = None  # it is found in the slot too
    assert pipe.drafters == []
    assert torch.equal(pipe(**ask).codes, drafted.codes)
    pipe.sampler = DraftModelSampler()
    with pytest.raises(ValueError, match=r"drafter EagleDrafter lacks .*; give a causal backbone"):
        pipe(**ask)
    pipe.drafter = None
    pipe.sampler = LanternSampler()
    with pytest.raises(ValueError, match=r"needs drafter=, an EagleDrafter .* \(pipe.eagle\) or a small backbone"):
        pipe(**ask)


def test_what_cannot_be_exported_is_named(pipeline, run, tmp_path):
    with pytest.raises(ValueError, match=r"no model_index.json"):
        export_drafter(run, tmp_path)
    other = tmp_path / "other"
    parts = {"tokenizer": tiny_tokenizer(), "sampler": NextTokenSampler()}
    ImagePipeline(backbone=tiny_backbone(), **parts).save_pretrained(other)
    with pytest.raises(ValueError, match=r"was made for a backbone of .* this one has"):
        export_drafter(run, other)
    assert not (other / "drafters" / "eagle").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"backbone": "heroes32-lamagen"}}, "did you mean 'heroes32-llamagen'"),
        ({"options": {"distribution_wait": 1.0}}, "did you mean 'distribution_weight'"),
        ({"model": {"dim": 64}}, "dim"),
    ],
)
def test_bad_recipes_are_named(pipeline, changes, message):
    if "options" in changes:
        changes = {"options": {**table(pipeline)["options"], **changes["options"]}}
    with pytest.raises(ValueError, match=message):
        make_task(parse_recipe(table(pipeline, **changes))).build(initialize=True)
