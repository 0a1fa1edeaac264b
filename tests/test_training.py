"""Training: recipes, optimizer, and runs that continue to the bit after a kill."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vargen.training.checkpoints import checkpoint_folders, load_optimizer
from vargen.training.ema import EMA
from vargen.training.export import export_pipeline
from vargen.training.optim import parameter_groups
from vargen.training.recipe import load_recipe, parse_recipe
from vargen.training.run import METRICS_FILE, train
from vargen.training.sources import load_tokenizer
from vargen.training.tasks.base import make_task

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "vargen" / "assets" / "models"


def vq_table(**changes):
    model = {
        "encoder_type": "patch",
        "base_channels": 8,
        "channel_multipliers": [1, 2],
        "num_res_blocks": 1,
        "z_channels": 8,
        "codebook_size": 64,
        "codebook_dim": 12,
        "l2_norm": False,
        "norm_num_groups": 4,
        "attention": False,
    }
    table = {
        "name": "tiny-vq",
        "task": "vq",
        "model": model,
        "options": {"num_kmeans_images": 32, "num_kmeans_iterations": 3, "grid_size": 4},
        "data": {"batch_size": 4, "num_eval_images": 8},
        "optimizer": {"lr": 2e-3},
        "schedule": {"num_steps": 6, "warmup_steps": 1, "decay_steps": 2},
        "log": {"log_every": 1, "eval_every": 3, "sample_every": 6, "checkpoint_every": 3},
    }
    return {**table, **changes}


def llamagen_table(tokenizer, **changes):
    table = vq_table(name="tiny-llamagen", task="llamagen")
    table["model"] = {
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_dim": 48,
        "condition_rope": "identity",
        "token_dropout_p": 0.1,  # dropout is on, so that a resumed run has to find the same masks
        "resid_dropout_p": 0.1,
    }
    table["options"] = {"tokenizer": str(tokenizer), "grid_size": 2}
    table["optimizer"] = {"name": "muon", "lr": 2e-3}
    table["data"] = {"batch_size": 4, "num_eval_images": 4, "attribute_dropout": 0.5, "null_dropout": 0.1}
    table["log"] = {"log_every": 1, "eval_every": 0, "sample_every": 0, "checkpoint_every": 3}
    return {**table, **changes}


@pytest.fixture(scope="module")
def vq_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq") / "run"
    result = train(parse_recipe(vq_table()), output=folder)
    assert result.finished
    assert result.step == 6
    return folder


def newest(run):
    return checkpoint_folders(run)[-1]


def assert_same_run(a, b):
    """Weights, averages and optimizer states of the newest checkpoints are equal to the bit."""
    assert newest(a).name == newest(b).name
    for stem in ("model", "ema"):
        left, right = (load_file(newest(run) / f"{stem}.safetensors") for run in (a, b))
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert torch.equal(value, right[name]), f"{stem}: {name}"
    left, right = (load_optimizer(newest(run))["state"] for run in (a, b))
    assert left.keys() == right.keys()
    for name, state in left.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[name][key])), f"optimizer: {name} {key}"


KILLED = """
    import json, os, signal, sys
    from vargen.training.recipe import parse_recipe
    from vargen.training.run import train
    from vargen.training.tasks import {module} as module

    recipe, output, resume, last = parse_recipe(json.loads(sys.argv[1])), sys.argv[2], sys.argv[3] == "1", int(sys.argv[4])
    task = module.{task}
    loss, calls = task.loss, 0

    def counted(self, model, batch):
        global calls
        calls += 1
        if calls > last:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(self, model, batch)

    task.loss = counted
    train(recipe, output=output, resume=resume)
"""


def run_until_killed(table, output, after, resume=False):
    """Train in a process of its own that dies by SIGKILL in the middle of step ``after`` + 1."""
    names = {"vq": ("vq", "VQTask"), "llamagen": ("llamagen", "LlamaGenTask")}[table["task"]]
    code = textwrap.dedent(KILLED).format(module=names[0], task=names[1])
    command = [sys.executable, "-c", code, json.dumps(table), str(output), "1" if resume else "0", str(after)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("task", ["vq", "llamagen"])
def test_killed_run_continues_to_the_same_weights(task, vq_run, tmp_path):
    table = vq_table() if task == "vq" else llamagen_table(vq_run)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(parse_recipe(table), output=straight)
    run_until_killed(table, killed, after=4)
    assert newest(killed).name == "step-00000003"
    result = train(parse_recipe(table), output=killed, resume=True)
    assert result.finished
    assert_same_run(straight, killed)
    steps = [json.loads(line)["step"] for line in (killed / METRICS_FILE).read_text().splitlines()]
    straight_steps = [json.loads(line)["step"] for line in (straight / METRICS_FILE).read_text().splitlines()]
    assert steps == straight_steps  # the lines of the lost step 4 are not there twice


@pytest.mark.usefixtures("one_thread")
def test_another_seed_gives_other_weights(vq_run, tmp_path):
    """Negative control of the test above: equality is not for free."""
    for seed in (0, 1):
        train(parse_recipe(llamagen_table(vq_run, seed=seed)), output=tmp_path / str(seed))
    with pytest.raises(AssertionError, match="model"):
        assert_same_run(tmp_path / "0", tmp_path / "1")


def test_half_written_checkpoint_is_ignored(vq_run, tmp_path):
    table = llamagen_table(vq_run)
    run = tmp_path / "run"
    train(parse_recipe({**table, "schedule": {"num_steps": 3, "warmup_steps": 1, "decay_steps": 0}}), output=run)
    torn = run / "checkpoints" / ".writing-step-00000006"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"cut off")
    assert train(parse_recipe(table), output=run, resume=True).step == 6
    assert newest(run).name == "step-00000006"


def test_signal_finishes_the_step_and_writes_a_checkpoint(vq_run, tmp_path):
    table = llamagen_table(vq_run, schedule={"num_steps": 100_000, "warmup_steps": 1, "decay_steps": 2})
    code = """
        import json, sys
        from vargen.training.recipe import parse_recipe
        from vargen.training.run import train
        result = train(parse_recipe(json.loads(sys.argv[1])), output=sys.argv[2])
        assert not result.finished
        sys.stdout.write(str(result.step))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), json.dumps(table), str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / METRICS_FILE
    for _ in range(1200):
        if metrics.is_file() and metrics.read_text().count("\n") >= 4:
            break
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert newest(tmp_path / "run").name == f"step-{int(stdout):08d}"


@pytest.mark.parametrize("encoder", ["patch", "conv"])
def test_reconstruction_improves_on_the_initialised_tokenizer(encoder, tmp_path):
    schedule = {"num_steps": 40, "warmup_steps": 5, "decay_steps": 20}
    table = vq_table(schedule=schedule, ema_decay=0.9, optimizer={"name": "muon", "lr": 3e-3})
    table["data"] = {"batch_size": 8, "num_eval_images": 32}
    if encoder == "conv":
        table["model"] = {**table["model"], "encoder_type": "conv", "codebook_dim": 8, "l2_norm": True}
    recipe = parse_recipe(table)
    torch.manual_seed(0)
    task = make_task(recipe)
    before = task.evaluate(task.build(initialize=True).eval())
    after = train(recipe, output=tmp_path / "run").metrics
    least = {"patch": 0.01, "conv": 3.0}[encoder]  # dB; bare patches are hard to improve, random weights are not
    assert after["psnr"] > before["psnr"] + least
    assert after["psnr_foreground"] > before["psnr_foreground"]


def test_transformer_learns(vq_run, tmp_path):
    schedule = {"num_steps": 30, "warmup_steps": 3, "decay_steps": 10}
    table = llamagen_table(vq_run, schedule=schedule, ema_decay=0.8)
    table["log"] = {**table["log"], "eval_every": 30}
    metrics = train(parse_recipe(table), output=tmp_path / "run").metrics
    assert metrics["held_out_nats_per_token"] < 0.8 * torch.log(torch.tensor(64.0))  # from ln V at the start


@pytest.mark.parametrize(
    ("recipe", "overrides", "start", "component"),
    [
        ("heroes32-llamagen", ["options.tokenizer=heroes32-llamagen"], "heroes32-llamagen", "backbone"),
        ("heroes32-eagle", [], "heroes32-llamagen", "drafters/eagle"),
        ("heroes32-multiscale-vq", [], "heroes32-var", "tokenizer"),
        ("heroes32-var", ["options.tokenizer=heroes32-var"], "heroes32-var", "backbone"),
        ("heroes32-nar", [], "heroes32-nar", "backbone"),
        (
            "heroes32-mar-draft",
            ["options.tokenizer=heroes32-mar", "options.backbone=heroes32-mar-causal"],
            "heroes32-mar-causal",
            "drafter",
        ),
        ("heroes-video-nbp", ["options.tokenizer=heroes-video-nbp"], "heroes-video-nbp", "backbone"),
    ],
)
def test_training_starts_from_given_weights(recipe, overrides, start, component):
    task = make_task(load_recipe(recipe, [*overrides, f"options.start={start}"]))
    found = task.build(initialize=True).state_dict()
    shipped = load_file(MODELS / start / component / "diffusion_pytorch_model.safetensors")
    assert found.keys() == shipped.keys()
    for name, value in shipped.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name


def test_tokenizers_that_go_on_keep_their_codes(vq_run):
    table = vq_table()
    task = make_task(parse_recipe({**table, "options": {**table["options"], "start": str(vq_run)}}))
    before, after = load_tokenizer(vq_run), task.build(initialize=True)
    images = task.test_batch(0, 8)["image"]
    same = (before.encode(images).codes == after.encode(images).codes).float().mean()
    assert same > 0.8
    assert not torch.equal(before.codebook, after.codebook)  # but k-means went on
    fresh = make_task(parse_recipe(table | {"seed": 9})).build(initialize=True)
    assert (before.encode(images).codes == fresh.encode(images).codes).float().mean() < 0.5


def test_unused_codes_move_onto_encoder_outputs():
    table = vq_table(options={"restart_every": 5, "num_restart_images": 16})
    table["model"] = {**table["model"], "encoder_type": "conv", "codebook_dim": 8}
    torch.manual_seed(0)
    task = make_task(parse_recipe(table))
    model = task.build(initialize=False).eval()
    with torch.no_grad():
        model.quantize.embedding.weight[5:] = 100.0  # nobody's neighbour
    before = model.quantize.embedding.weight.detach().clone()
    task.after_step(model, 3)
    assert torch.equal(model.quantize.embedding.weight, before)  # not due yet
    task.after_step(model, 4)
    moved = (model.quantize.embedding.weight != before).any(1)
    assert moved[5:].all()
    assert model.encode(task.test_batch(0, 16)["image"]).codes.unique().numel() > 5


def test_run_leaves_metrics_grids_and_its_recipe(vq_run):
    lines = [json.loads(line) for line in (vq_run / METRICS_FILE).read_text().splitlines()]
    assert {"step", "images", "loss", "l1", "images_per_second"} <= lines[0].keys()
    assert {"psnr", "psnr_foreground"} <= lines[-1].keys()
    assert (vq_run / "samples" / "step-00000006.png").read_bytes().startswith(b"\x89PNG")
    assert parse_recipe(json.loads((vq_run / "recipe.json").read_text())) == parse_recipe(vq_table())
    assert len(checkpoint_folders(vq_run)) == 2


def test_exported_folder_is_a_pipeline_with_half_precision_files(vq_run, tmp_path):
    from vargen.pipelines.image import ImagePipeline

    train(parse_recipe(llamagen_table(vq_run)), output=tmp_path / "run")
    folder = export_pipeline(tmp_path / "run", tmp_path / "model", guidance_scale=1.5, top_k=8)
    for file in folder.rglob("*.safetensors"):
        assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    pipe = ImagePipeline.from_pretrained(folder)
    assert pipe.sampler.guidance_scale == 1.5
    pipe.set_progress_bar_config(disable=True)
    codes = pipe("human with a great sword", seed=3, output_type="codes").codes
    assert codes.shape == (1, 256)
    saved = load_file(newest(tmp_path / "run") / "ema.safetensors")
    assert torch.equal(pipe.backbone.state_dict()["norm.weight"], saved["norm.weight"].half().float())
    facts = json.loads((folder / "training.json").read_text())
    assert facts["backbone"]["step"] == 6
    with pytest.raises(ValueError, match="exists"):
        export_pipeline(tmp_path / "run", folder)


def test_processes_share_the_batch_of_one_process(vq_run):
    recipe = parse_recipe(llamagen_table(vq_run))
    whole = make_task(recipe).batch(5)
    shards = [make_task(recipe, rank, 2).batch(5) for rank in range(2)]
    for key, value in whole.items():
        assert torch.equal(torch.stack([shard[key] for shard in shards], 1).flatten(0, 1), value)
    with pytest.raises(ValueError, match="multiple of the number of processes"):
        make_task(recipe, 0, 3)


@pytest.mark.slow
def test_two_processes_train_the_weights_of_one(vq_run, tmp_path):
    table = llamagen_table(vq_run)
    table["model"] = {**table["model"], "token_dropout_p": 0.0, "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0}
    train(parse_recipe(table), output=tmp_path / "one")
    script = tmp_path / "two.py"
    script.write_text(
        f"from vargen.training.recipe import parse_recipe\n"
        f"from vargen.training.run import train\n"
        f"if __name__ == '__main__':\n"
        f"    train(parse_recipe({table!r}), output={str(tmp_path / 'two')!r})\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launcher, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(newest(tmp_path / name) / "ema.safetensors") for name in ("one", "two"))
    assert json.loads((newest(tmp_path / "two") / "state.json").read_text())["num_processes"] == 2
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


def test_bad_model_option_task_and_data_are_named(vq_run):
    for change, message in [
        ({"task": "gan"}, "unknown task 'gan'; choose from"),
        ({"data": {"name": "cats"}}, "data.name must be one of heroes, motion, got 'cats'"),
        ({"data": {"name": "motion"}}, "data.name must be a set of images for task 'vq', got 'motion'"),
        ({"data": {"options": {"hold_out": True}}}, "unknown key 'data.options.hold_out'.*did you mean 'held_out'"),
        ({"data": {"options": {"seed": 3}}}, "unknown key 'data.options.seed'"),
        ({"options": {"num_kmeans_image": 3}}, "did you mean 'num_kmeans_images'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_task(parse_recipe(vq_table(**change)))
    with pytest.raises(ValueError, match=r"unknown key 'model.codebok_size'.*did you mean 'codebook_size'"):
        make_task(parse_recipe(vq_table(model={"codebok_size": 3}))).build(initialize=False)
    with pytest.raises(ValueError, match="no tokenizer at 'nowhere'"):
        make_task(parse_recipe(llamagen_table("nowhere")))


def test_run_folder_in_the_way_and_nothing_to_resume_are_named(vq_run, tmp_path):
    recipe = parse_recipe(vq_table())
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume"):
        train(recipe, output=vq_run)
    with pytest.raises(ValueError, match="nothing to resume"):
        train(recipe, output=tmp_path / "none", resume=True)
    changed = replace(recipe, optimizer=replace(recipe.optimizer, betas=(0.5, 0.9)))
    with pytest.raises(ValueError, match=r"'optimizer\.betas' differs from the run's recipe"):
        train(changed, output=vq_run, resume=True)


def test_every_trained_parameter_is_in_one_group(vq_run):
    model = make_task(parse_recipe(llamagen_table(vq_run))).build(initialize=False)
    groups = parameter_groups(model, optimizer="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.1)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    muon = {id(p) for p in groups[0]["params"]}
    assert all(("layers." in name and p.ndim == 2) == (id(p) in muon) for name, p in model.named_parameters())


def test_average_follows_the_weights():
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, 0.5)
    nn.init.ones_(model.weight)
    expected = 0.0
    for step in range(8):
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
    torch.testing.assert_close(ema.model.weight, torch.full((1, 2), expected))
    assert not ema.model.weight.requires_grad
