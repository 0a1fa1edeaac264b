"""Training loses nothing: steps that diverge, damaged checkpoints, other settings on resume, two runs in one folder."""

import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vargen.training.checkpoints import checkpoint_folders, save_checkpoint
from vargen.training.recipe import parse_recipe
from vargen.training.run import METRICS_FILE, train
from vargen.training.sources import read_run
from vargen.training.tasks.vq import VQTask

TABLE = {
    "name": "tiny",
    "task": "vq",
    "model": {
        "encoder_type": "patch",
        "base_channels": 4,
        "channel_multipliers": [1, 2],
        "num_res_blocks": 1,
        "z_channels": 4,
        "codebook_size": 16,
        "codebook_dim": 12,
        "l2_norm": False,
        "norm_num_groups": 2,
        "attention": False,
    },
    "options": {"num_kmeans_images": 4, "num_kmeans_iterations": 1, "grid_size": 1},
    "data": {"batch_size": 2, "num_eval_images": 2},
    "schedule": {"num_steps": 4, "warmup_steps": 0, "decay_steps": 0},
    "log": {"log_every": 10, "eval_every": 0, "sample_every": 0, "checkpoint_every": 1, "keep_checkpoints": 2},
}


def table(**changes):
    return {**TABLE, **{k: {**TABLE.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()}}


def steps(run):
    return [int(folder.name[-8:]) for folder in checkpoint_folders(run)]


def metrics(run):
    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / METRICS_FILE).read_text().splitlines()]


@pytest.fixture
def spoil(monkeypatch):
    """Make the loss of some steps (counted from 1 over all calls) NaN or infinite, or its gradient infinite."""

    def spoil(which, how="nan"):
        plain, calls = VQTask.loss, [0]

        def loss(self, model, batch):
            value, numbers = plain(self, model, batch)
            calls[0] += 1
            if calls[0] not in which:
                return value, numbers
            if how == "gradient":  # finite itself, with an infinite slope
                weight = next(p for p in model.parameters() if p.requires_grad)
                return value + (weight - weight.detach()).abs().sum().sqrt(), numbers
            return value * float(how), numbers

        monkeypatch.setattr(VQTask, "loss", loss)

    return spoil


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_a_step_that_would_spoil_the_weights_is_skipped(how, spoil, tmp_path):
    """Checked at every step, not only where the loss is logged, and for infinity and gradients too."""
    spoil({2}, how)
    what = "gradient" if how == "gradient" else "loss"
    with pytest.warns(UserWarning, match=f"the {what} is not finite at step 2, which is skipped"):
        assert train(parse_recipe(table()), output=tmp_path / "run").finished
    assert steps(tmp_path / "run") == [3, 4]
    assert all(
        value.isfinite().all()
        for value in load_file(checkpoint_folders(tmp_path / "run")[-1] / "model.safetensors").values()
    )
    assert [line["skipped"] for line in metrics(tmp_path / "run") if "skipped" in line] == [
        f"the {what} is not finite"
    ]


def test_a_skipped_step_changes_nothing(spoil, tmp_path):
    spoil({3})
    with pytest.warns(UserWarning, match="step 3"):
        train(parse_recipe(table(schedule={"num_steps": 3})), output=tmp_path / "run")
    before, after = (load_file(folder / "ema.safetensors") for folder in checkpoint_folders(tmp_path / "run"))
    assert steps(tmp_path / "run") == [2, 3]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("optimizer", [{"non_finite": "stop"}, {"max_skipped": 0}])
def test_a_run_that_stops_keeps_good_checkpoints_and_resumes_with_a_lower_rate(optimizer, spoil, tmp_path):
    run = tmp_path / "run"
    spoil({3})
    recipe = table(optimizer={"lr": 1e-3, **optimizer}, log={"keep_checkpoints": 1})
    with pytest.raises(
        ValueError,
        match=r"the loss is not finite at step 3; .*step-00000002 are whole: resume with a lower optimizer\.lr",
    ):
        train(parse_recipe(recipe), output=run)
    assert steps(run) == [2]
    recipe["optimizer"]["lr"] = 1e-4
    with pytest.warns(UserWarning, match=r"goes on from step 2 with optimizer\.lr 0\.001 -> 0\.0001"):
        assert train(parse_recipe(recipe), output=run, resume=True).finished
    assert {"step": 2, "changed": {"optimizer.lr": 1e-4}} in metrics(run)


def test_a_row_of_skipped_steps_ends_the_run(spoil, tmp_path):
    spoil(range(2, 100))
    with (
        pytest.warns(UserWarning, match="which is skipped"),
        pytest.raises(ValueError, match="at step 4, as in the 2 steps before; the run stopped"),
    ):
        train(parse_recipe(table(schedule={"num_steps": 50}, optimizer={"max_skipped": 2})), output=tmp_path / "run")


def test_weights_that_overflow_are_not_written(monkeypatch, tmp_path):
    """A finite step can still end in infinity: neither that checkpoint is written nor one before it deleted."""
    plain = VQTask.after_step

    def after_step(self, model, step):
        plain(self, model, step)
        if step == 2:
            next(model.parameters()).data.fill_(math.inf)

    monkeypatch.setattr(VQTask, "after_step", after_step)
    with pytest.raises(ValueError, match=r"the weights are not finite after step 3; .*step-00000002 are whole"):
        train(parse_recipe(table(log={"keep_checkpoints": 1})), output=tmp_path / "run")
    assert steps(tmp_path / "run") == [2]


def test_no_checkpoint_takes_weights_that_are_not_finite(tmp_path):
    with pytest.raises(ValueError, match=r"the weights of 'model' after step 3 are not finite \(a\)"):
        save_checkpoint(
            tmp_path, 3, weights={"model": {"a": torch.tensor([math.nan])}}, optimizer={}, state={"step": 3}, keep=1
        )
    assert checkpoint_folders(tmp_path) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("training") / "run"
    train(parse_recipe(table(schedule={"num_steps": 2})), output=run)
    return run


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def cut(folder):
    (folder / "model.safetensors").write_bytes(b"cut off")


def not_finite(folder):
    weights = load_file(folder / "ema.safetensors")
    save_file({name: torch.full_like(value, math.nan) for name, value in weights.items()}, folder / "ema.safetensors")


DAMAGE = {
    "cut": cut,
    "no weights": lambda folder: (folder / "ema.safetensors").unlink(),
    "optimizer": lambda folder: (folder / "optimizer.pt").write_bytes(b"PK"),
    "state": lambda folder: (folder / "state.json").write_text("{"),
    "not finite": not_finite,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(damage, run):
    DAMAGE[damage](checkpoint_folders(run)[-1])
    with pytest.warns(UserWarning, match="step-00000002 is damaged .*; step-00000001 is used instead") as caught:
        assert train(parse_recipe(table()), output=run, resume=True).step == 4
    assert all("\n" not in str(warning.message) for warning in caught)
    assert steps(run) == [3, 4]
    assert len(list((run / "checkpoints").glob("damaged-*-step-00000002"))) == 1  # set aside, for people to look at


def test_a_reader_falls_back_and_renames_nothing(run):
    not_finite(checkpoint_folders(run)[-1])
    with pytest.warns(UserWarning, match="is damaged"):
        _, weights = read_run(run)
    assert all(value.isfinite().all() for value in weights.values())
    assert steps(run) == [1, 2]


def test_nothing_is_set_aside_when_no_checkpoint_can_be_read(run):
    """What fails for all of them is another mistake than damage, and must not cost the checkpoints."""
    for folder in checkpoint_folders(run):
        cut(folder)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read; the newest, step-00000002: "):
        train(parse_recipe(table()), output=run, resume=True)
    assert steps(run) == [1, 2]


def test_a_resumed_run_with_another_batch_size_sees_the_next_examples(run, monkeypatch):
    seen, plain = [], VQTask.batch

    def batch(self, step):
        examples = self.train_data.examples
        self.train_data.examples = lambda indices: seen.append(list(indices)) or examples(indices)
        try:
            return plain(self, step)
        finally:
            self.train_data.examples = examples

    monkeypatch.setattr(VQTask, "batch", batch)
    with pytest.warns(UserWarning, match=r"data\.batch_size 2 -> 3"):
        train(parse_recipe(table(data={"batch_size": 3})), output=run, resume=True)
    assert seen == [[4, 5, 6], [7, 8, 9]]
    assert json.loads((checkpoint_folders(run)[-1] / "state.json").read_text())["examples"] == 10


def test_what_is_trained_may_not_change(run):
    for change in ({"model": {"base_channels": 8}}, {"seed": 3}, {"optimizer": {"name": "muon"}}, {"ema_decay": 0.5}):
        with pytest.raises(
            ValueError, match=r"differs from the run's recipe .*; only schedule, log, compile, optimizer.lr, "
        ):
            train(parse_recipe(table(**change)), output=run, resume=True)


def test_the_run_folder_remembers_its_overrides(tmp_path):
    file, run = tmp_path / "tiny.toml", tmp_path / "run"
    lines = [f"{key} = {json.dumps(TABLE[key])}" for key in ("name", "task")]
    for section in ("model", "options", "data", "schedule", "log"):
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in TABLE[section].items())]
    file.write_text("\n".join(lines))
    train(file, ["schedule.num_steps=1", "model.codebook_size=32"], output=run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(file, output=run, resume=True)  # the same --set need not be given again
    with pytest.warns(UserWarning, match=r"schedule\.num_steps 1 -> 2"):
        result = train(file, ["schedule.num_steps = 2"], output=run, resume=True)
    assert result.step == 2
    assert json.loads((run / "overrides.json").read_text()) == ["schedule.num_steps = 2", "model.codebook_size=32"]


def test_a_second_process_on_a_run_folder_is_refused(run, monkeypatch):
    """While the first one trains; afterwards the folder is free, and one that refuses makes nothing in it."""
    plain, second = VQTask.after_step, []

    def after_step(self, model, step):
        plain(self, model, step)
        if not second:
            second.append(step)
            with pytest.raises(
                ValueError, match=r"is being trained by process \d+ on .*; wait for it, or choose another"
            ):
                train(parse_recipe(table()), output=run, resume=True)

    monkeypatch.setattr(VQTask, "after_step", after_step)
    assert train(parse_recipe(table()), output=run, resume=True).finished
    assert second == [2]
    assert list((run / ".claims").iterdir()) == []
    with pytest.raises(ValueError, match="nothing to resume"):
        train(parse_recipe(table()), output=run.with_name("none"), resume=True)
    assert not run.with_name("none").exists()


def test_metrics_are_json(run, monkeypatch):
    monkeypatch.setattr(VQTask, "evaluate", lambda self, model: {"psnr": math.inf, "loss": math.nan, "psnr_hero": 1.5})
    train(parse_recipe(table(log={"eval_every": 1})), output=run, resume=True)
    assert metrics(run)[-1] == {"step": 4, "images": 8, "psnr": None, "loss": None, "psnr_hero": 1.5}
