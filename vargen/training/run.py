"""The training loop: one for every task, resumable to the bit.

Every random draw of step s is a function of (seed, s, rank); everything else that a step reads is in the checkpoint. A run
that was killed at any moment therefore continues to the very weights it would have had.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn

from vargen.files import atomic_write, make_folder, writing
from vargen.training.checkpoints import (
    checkpoint_folders,
    keep_metrics_until,
    load_named_state,
    load_optimizer,
    load_state,
    load_weights,
    named_state,
    save_checkpoint,
)
from vargen.training.ema import EMA
from vargen.training.optim import MuonAdamW, parameter_groups
from vargen.training.recipe import Recipe, load_recipe, same_weights
from vargen.training.sources import RECIPE_FILE, stored_recipe
from vargen.training.tasks.base import Task, make_task
from vargen.validation.printable import printable
from vargen.validation.reading import local_path

METRICS_FILE = "metrics.jsonl"
_STEP_SEED = 1_000_003  # prime: (seed, step, rank) -> seed of the step's dropout without collisions that matter


@dataclass
class TrainingResult:
    """What a finished or stopped run leaves behind."""

    output: Path  # run folder
    step: int  # finished steps
    finished: bool  # False when a signal stopped the run; resume continues it
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation


def train(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    resume: bool = False,
) -> TrainingResult:
    """Run a recipe.

    Under ``accelerate launch`` the batch is shared by the processes. SIGINT and SIGTERM finish the step, write a checkpoint
    and return.

    Args:
        recipe: a recipe, a TOML file, or the name of a shipped recipe.
        overrides: ``"section.key=value"`` strings applied to a file.
        output: run folder for checkpoints, metrics and sample grids; default ``runs/<recipe name>``.
        resume: continue the run in that folder from its newest checkpoint. Only the schedule and what is logged may have
            changed.

    Raises:
        ValueError: unusable recipe or data, a run folder in the way, nothing to resume.
        WriteError: the disk is full, or a file too large for the system or a limit; ``resume`` goes on from the last
            checkpoint.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        raise ValueError("overrides apply to a recipe file; use dataclasses.replace on a Recipe")
    run = local_path(output) if output is not None else Path("runs") / recipe.name
    _check_run_folder(run, recipe, resume)
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    if accelerator.device.type == "cpu":
        _keep_freed_memory()
    return _Loop(recipe, run, resume, accelerator).run()


class _Loop:
    """State of one run: built, resumed, stepped."""

    def __init__(self, recipe: Recipe, run: Path, resume: bool, accelerator: Accelerator) -> None:
        self.recipe, self.folder, self.accelerator = recipe, run, accelerator
        set_seed(recipe.seed)
        self.task: Task = make_task(recipe, accelerator.process_index, accelerator.num_processes)
        checkpoint = checkpoint_folders(run)[-1] if resume else None
        model = self.task.build(initialize=checkpoint is None)
        self.ema = EMA(model, recipe.ema_decay)
        o = recipe.optimizer
        groups = parameter_groups(model, optimizer=o.name, lr=o.lr, muon_lr=o.muon_lr, weight_decay=o.weight_decay)
        optimizer = MuonAdamW(groups, betas=o.betas)
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.step = 0
        if checkpoint is not None:
            self._load(checkpoint, model, optimizer)
        self.task.setup(accelerator.device)
        self.ema.model.to(accelerator.device)
        if recipe.compile:
            self.task.compile(model)
        self.plain = model  # the model without wrappers: names, weights, averages
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.metrics: dict[str, float] = {}
        self.started = (time.perf_counter(), self.step)

    def run(self) -> TrainingResult:
        main = self.accelerator.is_main_process
        if main:
            _prepare_folder(self.folder, self.recipe, self.step)
        if self.step == 0:
            self._save()  # what initialisation found (a codebook) can be used at once
        with _stop_signals() as stopped:
            while self.step < self.recipe.schedule.num_steps and not stopped:
                self._train_step()
                self._report(bool(stopped))
        return TrainingResult(self.folder, self.step, self.step >= self.recipe.schedule.num_steps, self.metrics)

    def _train_step(self) -> None:
        seed = self.recipe.seed * _STEP_SEED + self.step * self.accelerator.num_processes
        torch.manual_seed(seed + self.accelerator.process_index)
        factor = self.recipe.schedule.factor(self.step)
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor
        batch = self.task.batch(self.step)
        self.model.train()
        with self.accelerator.autocast():
            loss, numbers = self.task.loss(self.model, batch)
        self.accelerator.backward(loss)
        norm: Any = None
        if self.recipe.optimizer.max_grad_norm > 0:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.task.after_step(self.plain, self.step)
        self.ema.update(self.plain, self.step)
        self.step += 1
        log = self.recipe.log
        if self.step % log.log_every == 0 or self.step == 1:
            self._log_step(loss, numbers, norm, factor)

    def _log_step(self, loss: Tensor, numbers: dict[str, Tensor], norm: Any, factor: float) -> None:
        means = {
            k: float(self.accelerator.reduce(v.float(), "mean")) for k, v in {"loss": loss.detach(), **numbers}.items()
        }
        if not all(value == value for value in means.values()):
            raise ValueError(f"the loss is NaN at step {self.step}; lower the learning rate and resume")
        seconds, since = time.perf_counter() - self.started[0], self.step - self.started[1]
        self.started = (time.perf_counter(), self.step)
        rate = since * self.recipe.data.batch_size / max(seconds, 1e-9)
        extra = {} if norm is None else {"grad_norm": float(norm)}
        self._write({**means, **extra, "lr_factor": factor, "images_per_second": rate})

    def _report(self, stopping: bool) -> None:
        log, last = self.recipe.log, self.step == self.recipe.schedule.num_steps
        if stopping or last or _due(self.step, log.checkpoint_every, last):
            self._save()  # before anything that can fail
        if self.accelerator.is_main_process:
            if _due(self.step, log.eval_every, last):
                self.metrics = self.task.evaluate(self.ema.model)
                self._write(self.metrics)
            if _due(self.step, log.sample_every, last):
                self._write_grid()

    def _write(self, values: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        line = {"step": self.step, "images": self.step * self.recipe.data.batch_size, **values}
        target = self.folder / METRICS_FILE
        with writing(target), target.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _write_grid(self) -> None:
        pixels = self.task.sample_grid(self.ema.model).permute(1, 2, 0).numpy()
        target = self.folder / "samples" / f"step-{self.step:08d}.png"
        with atomic_write(target, overwrite=True) as beside:
            Image.fromarray(pixels).save(beside, format="PNG")
        with atomic_write(target.with_name("captions.txt"), overwrite=True) as beside:  # the same at every step
            beside.write_text("".join(f"{text}\n" for text in self.task.captions()), encoding="utf-8")

    def _save(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            inner: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            scaler = self.accelerator.scaler
            save_checkpoint(
                self.folder,
                self.step,
                weights={"model": _own_state(self.plain), "ema": _own_state(self.ema.model)},
                optimizer={"state": named_state(inner, self.plain), "scaler": scaler.state_dict() if scaler else {}},
                state={"step": self.step, "num_processes": self.accelerator.num_processes},
                keep=self.recipe.log.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _load(self, checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = load_state(checkpoint)
        self.step = int(state["step"])
        model.load_state_dict(load_weights(checkpoint, "model"))
        self.ema.model.load_state_dict(load_weights(checkpoint, "ema"))
        saved = load_optimizer(checkpoint)
        load_named_state(optimizer, model, saved["state"])
        if self.accelerator.scaler is not None and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    # state_dict() of a compiled submodule is that of the module itself: Module.compile() adds no prefix
    return dict(model.state_dict())


def _due(step: int, period: int, last: bool) -> bool:
    return period > 0 and (last or step % period == 0)


def _check_run_folder(run: Path, recipe: Recipe, resume: bool) -> None:
    if not resume:
        if checkpoint_folders(run):
            raise ValueError(
                f"{printable(run)} already holds a run; continue it with --resume or choose another --output"
            )
        return
    if not checkpoint_folders(run):
        raise ValueError(f"nothing to resume in {printable(run)}: it has no checkpoint; start without --resume")
    changed = same_weights(stored_recipe(run), recipe)
    if changed:
        raise ValueError(
            f"cannot resume {printable(run)}: {changed!r} differs from the run's recipe; only schedule and log may change"
        )


def _prepare_folder(run: Path, recipe: Recipe, step: int) -> None:
    make_folder(run / "samples")
    with atomic_write(run / RECIPE_FILE, overwrite=True) as beside:
        beside.write_text(json.dumps(recipe.to_dict(), indent=1), encoding="utf-8")
    keep_metrics_until(run / METRICS_FILE, step)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying from them; a second one kills."""
    caught: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, _frame: Any) -> None:
        caught.append(number)
        signal.signal(number, previous[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals stay as they are
        pass
    try:
        yield caught
    finally:
        for caught_number, handler in previous.items():
            signal.signal(caught_number, handler)


def _keep_freed_memory() -> None:
    """Tell glibc not to return freed buffers: mapping the logits anew at every step costs a tenth of the time on CPUs."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 1 << 28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(option, value)
