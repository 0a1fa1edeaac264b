"""The training loop: one for every task, resumable to the bit.

Every random draw of step s is a function of (seed, s, rank); everything else that a step reads is in the checkpoint. A run
that was killed at any moment therefore continues to the very weights it would have had.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn

from vargen.files import atomic_write
from vargen.training.checkpoints import (
    all_finite,
    checkpoint_folders,
    load_named_state,
    load_newest,
    load_optimizer,
    load_state,
    load_weights,
    named_state,
    save_checkpoint,
)
from vargen.training.ema import EMA
from vargen.training.optim import MuonAdamW, parameter_groups
from vargen.training.process import keep_freed_memory, stop_signals
from vargen.training.recipe import MAX_STEPS, Recipe
from vargen.training.run_folder import (
    METRICS_FILE,
    append_metrics,
    check_run_folder,
    held,
    open_recipe,
    prepare_folder,
)
from vargen.training.sources import stored_recipe
from vargen.training.tasks.base import Task, make_task
from vargen.validation.reading import local_path

__all__ = ["METRICS_FILE", "TrainingResult", "train"]

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
        resume: continue the run in that folder from its newest checkpoint that is whole. The folder remembers the overrides
            so far; those given now are added. Learning rates, weight decay, clipping, batch size, schedule and logging
            may have changed (``vargen.training.recipe.RESUMABLE``), nothing else.

    A step whose loss or gradient is NaN or infinite changes nothing: it is skipped, or stops the run, as
    ``optimizer.non_finite`` says.

    Raises:
        ValueError: unusable recipe or data, a run folder in the way or in use by another process, nothing to resume,
            training that diverged.
        WriteError: the disk is full, or a file too large for the system or a limit; ``resume`` goes on from the last
            checkpoint.
    """
    overrides = list(overrides)
    if not isinstance(recipe, Recipe):
        recipe, run, overrides = open_recipe(recipe, overrides, output, resume)
    elif overrides:
        raise ValueError("overrides apply to a recipe file; use dataclasses.replace on a Recipe")
    else:
        run = local_path(output) if output is not None else Path("runs") / recipe.name
    check_run_folder(run, recipe, resume)
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with held(run, recipe, resume, accelerator):
        return _Loop(recipe, run, resume, accelerator, overrides).run()


class _Loop:
    """State of one run: built, resumed, stepped."""

    def __init__(
        self, recipe: Recipe, run: Path, resume: bool, accelerator: Accelerator, overrides: Sequence[str] = ()
    ) -> None:
        self.recipe, self.folder, self.accelerator, self.overrides = recipe, run, accelerator, overrides
        set_seed(recipe.seed)
        self.task: Task = make_task(recipe, accelerator.process_index, accelerator.num_processes)
        model = self.task.build(initialize=not resume)
        self.ema = EMA(model, recipe.ema_decay)
        o = recipe.optimizer
        groups = parameter_groups(model, optimizer=o.name, lr=o.lr, muon_lr=o.muon_lr, weight_decay=o.weight_decay)
        optimizer = MuonAdamW(groups, betas=o.betas)
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.step = 0
        self.skipped = 0  # steps in a row
        if resume:
            main = accelerator.is_main_process
            load_newest(run, lambda checkpoint: self._load(checkpoint, model, optimizer), set_aside=main)
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
            prepare_folder(self.folder, self.recipe, self.overrides, self.step)
        if self.step == 0:
            self._save()  # what initialisation found (a codebook) can be used at once
        with stop_signals() as stopped:
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
        norm = self.accelerator.clip_grad_norm_(
            self.model.parameters(), self.recipe.optimizer.max_grad_norm or math.inf
        )
        problem = self._problem(loss, norm)
        if problem is not None:
            self._skip(problem)
            return
        self.skipped = 0
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.task.after_step(self.plain, self.step)
        self.ema.update(self.plain, self.step)
        self.step += 1
        log = self.recipe.log
        if self.step % log.log_every == 0 or self.step == 1:
            self._log_step(loss, numbers, norm, factor)

    def _problem(self, loss: Tensor, norm: Tensor) -> str | None:
        """What keeps a step from being taken, the same in all processes; None if nothing does."""
        finite = torch.stack([loss.detach().isfinite().all(), torch.as_tensor(norm).to(loss.device).isfinite()]).long()
        good = self.accelerator.reduce(finite, "sum") == self.accelerator.num_processes
        if good.all():
            return None
        return "the loss is not finite" if not good[0] else "the gradient is not finite"

    def _skip(self, problem: str) -> None:
        """Pass over a step that would spoil the weights, or stop before it."""
        o, at = self.recipe.optimizer, self.step + 1
        scaler = self.accelerator.scaler
        if scaler is not None:
            self.optimizer.step()  # finds what we found: takes no step and lowers the scale of the loss
        self.optimizer.zero_grad()
        self.skipped += 1
        overflow = scaler is not None and problem.startswith(
            "the gradient"
        )  # of float16, and mended by the lower scale
        if not self._is_finite() or self.skipped > o.max_skipped or (o.non_finite == "stop" and not overflow):
            again = f", as in the {o.max_skipped} steps before" if self.skipped > max(1, o.max_skipped) else ""
            self._stop(f"{problem} at step {at}{again}")
        self.step = at
        self._write({"skipped": problem})
        if self.accelerator.is_main_process:
            warnings.warn(f"{problem} at step {at}, which is skipped", stacklevel=2)

    def _stop(self, problem: str) -> None:
        """End a run that diverged. Weights that are still finite are written, and no checkpoint is deleted for them."""
        if self._is_finite():
            self._save(keep=MAX_STEPS)
        whole = checkpoint_folders(self.folder)
        if not whole:
            raise ValueError(f"{problem}, and nothing was trained yet: what the run starts from is not finite")
        raise ValueError(
            f"{problem}; the run stopped and its weights up to {whole[-1].name} are whole: resume with a lower optimizer.lr "
            f"(now {self.recipe.optimizer.lr:g})"
            + (", or with optimizer.non_finite=skip" if self.recipe.optimizer.non_finite == "stop" else "")
        )

    def _is_finite(self) -> bool:
        return all_finite([*self.plain.state_dict().values(), *self.ema.model.state_dict().values()])

    def _log_step(self, loss: Tensor, numbers: dict[str, Tensor], norm: Tensor, factor: float) -> None:
        means = {
            k: float(self.accelerator.reduce(v.float(), "mean")) for k, v in {"loss": loss.detach(), **numbers}.items()
        }
        seconds, since = time.perf_counter() - self.started[0], self.step - self.started[1]
        self.started = (time.perf_counter(), self.step)
        rate = since * self.recipe.data.batch_size / max(seconds, 1e-9)
        self._write({**means, "grad_norm": float(norm), "lr_factor": factor, "images_per_second": rate})

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

    def _write(self, values: Mapping[str, Any]) -> None:
        if self.accelerator.is_main_process:
            append_metrics(self.folder, {"step": self.step, "images": self.task.first_example(self.step), **values})

    def _write_grid(self) -> None:
        pixels = self.task.sample_grid(self.ema.model).permute(1, 2, 0).numpy()
        target = self.folder / "samples" / f"step-{self.step:08d}.png"
        with atomic_write(target, overwrite=True) as beside:
            Image.fromarray(pixels).save(beside, format="PNG")
        with atomic_write(target.with_name("captions.txt"), overwrite=True) as beside:  # the same at every step
            beside.write_text("".join(f"{text}\n" for text in self.task.captions()), encoding="utf-8")

    def _save(self, keep: int | None = None) -> None:
        self.accelerator.wait_for_everyone()
        if not self._is_finite():
            self._stop(f"the weights are not finite after step {self.step}")
        if self.accelerator.is_main_process:
            inner: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            scaler = self.accelerator.scaler
            save_checkpoint(
                self.folder,
                self.step,
                weights={"model": _own_state(self.plain), "ema": _own_state(self.ema.model)},
                optimizer={"state": named_state(inner, self.plain), "scaler": scaler.state_dict() if scaler else {}},
                state={
                    "step": self.step,
                    "examples": self.task.first_example(self.step),
                    "num_processes": self.accelerator.num_processes,
                },
                keep=keep or self.recipe.log.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _load(self, checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state, saved = load_state(checkpoint), load_optimizer(checkpoint)
        model.load_state_dict(load_weights(checkpoint, "model"))
        self.ema.model.load_state_dict(load_weights(checkpoint, "ema"))
        optimizer.state.clear()  # of a newer checkpoint that broke off here
        load_named_state(optimizer, model, saved["state"])
        if self.accelerator.scaler is not None and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.step = state["step"]
        examples = state.get("examples", self.step * stored_recipe(self.folder).data.batch_size)
        self.task.start = (self.step, examples)


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    # state_dict() of a compiled submodule is that of the module itself: Module.compile() adds no prefix
    return dict(model.state_dict())


def _due(step: int, period: int, last: bool) -> bool:
    return period > 0 and (last or step % period == 0)
