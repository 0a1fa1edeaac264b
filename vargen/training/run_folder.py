"""The folder of a training run: what must be true before a run works in it, and what the run writes beside checkpoints."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from vargen.evaluation.drawing.claims import Claims
from vargen.files import atomic_write, make_folder, writing
from vargen.training.checkpoints import checkpoint_folders
from vargen.training.recipe import RESUMABLE, Recipe, differences, load_recipe, may_change
from vargen.training.sources import RECIPE_FILE, stored_recipe
from vargen.validation.printable import printable, shown
from vargen.validation.reading import local_path, parse_json, read_json

METRICS_FILE = "metrics.jsonl"
OVERRIDES_FILE = "overrides.json"  # what --set said at the start and at every resume since
_CLAIM = "run"


def open_recipe(
    recipe: str | Path, overrides: Sequence[str], output: str | Path | None, resume: bool
) -> tuple[Recipe, Path, list[str]]:
    """Read a recipe as a run reads it: under the overrides that its folder remembers, too, when it resumes.

    Returns:
        The recipe, the run folder, all overrides.
    """
    run = local_path(output) if output is not None else Path("runs") / load_recipe(recipe, overrides).name
    by_key = {text.partition("=")[0].strip(): text for text in (*(_stored(run) if resume else ()), *overrides)}
    return load_recipe(recipe, list(by_key.values())), run, list(by_key.values())


def _stored(run: Path) -> list[str]:
    file = run / OVERRIDES_FILE
    if not file.is_file():
        return []
    found = read_json(file)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{printable(file)} must be a list of texts like 'section.key=value', got {shown(found)}")
    return found


def check_run_folder(run: Path, recipe: Recipe, resume: bool) -> None:
    """Refuse a folder that holds a run already, and on resuming one that holds none or another one.

    Raises:
        ValueError: as said; of settings that may not change, the first is named with both values.
    """
    if not resume:
        if checkpoint_folders(run):
            raise ValueError(
                f"{printable(run)} already holds a run; continue it with --resume or choose another --output"
            )
        return
    if not checkpoint_folders(run):
        raise ValueError(f"nothing to resume in {printable(run)}: it has no checkpoint; start without --resume")
    for key, (old, new) in differences(stored_recipe(run), recipe).items():
        if not may_change(key):
            raise ValueError(
                f"cannot resume {printable(run)}: {key!r} differs from the run's recipe ({shown(old)}, now {shown(new)}); "
                f"only {', '.join(RESUMABLE)} may change"
            )


@contextmanager
def held(run: Path, recipe: Recipe, resume: bool, accelerator: Accelerator) -> Iterator[None]:
    """Keep other runs out of a folder. The main process holds the claim; all processes of the run hear of a refusal.

    Raises:
        ValueError: another process trains there, or what ``check_run_folder`` refuses.
    """
    check_run_folder(run, recipe, resume)  # before anything is made in it
    with ExitStack() as stack:
        refused = None
        if accelerator.is_main_process:
            claims = Claims(run / ".claims")
            if not stack.enter_context(claims.hold(_CLAIM)):
                refused = f"{printable(run)} is being trained by {claims.holder(_CLAIM)}; wait for it, or choose another --output"
            else:
                try:
                    check_run_folder(run, recipe, resume)  # again: another run may just have ended
                except ValueError as error:
                    refused = str(error)
        texts = [refused]
        broadcast_object_list(texts)
        if texts[0] is not None:
            raise ValueError(texts[0])
        yield


def prepare_folder(run: Path, recipe: Recipe, overrides: Sequence[str], step: int) -> None:
    """Write down the recipe, and what a resumed run changed in it; drop metrics of steps that were lost."""
    make_folder(run / "samples")
    keep_metrics_until(run / METRICS_FILE, step)
    if (run / RECIPE_FILE).is_file():
        changed = differences(stored_recipe(run), recipe)
        if changed and step > 0:
            texts = (f"{key} {shown(old)} -> {shown(new)}" for key, (old, new) in changed.items())
            warnings.warn(f"{printable(run)} goes on from step {step} with {', '.join(texts)}", stacklevel=2)
            append_metrics(run, {"step": step, "changed": {key: new for key, (_, new) in changed.items()}})
    for name, content in ((RECIPE_FILE, recipe.to_dict()), (OVERRIDES_FILE, list(overrides))):
        with atomic_write(run / name, overwrite=True) as beside:
            beside.write_text(json.dumps(content, indent=1), encoding="utf-8")


def append_metrics(run: Path, values: Mapping[str, Any]) -> None:
    """Add a line to the metrics of a run; NaN and infinity, which JSON lacks, become null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    target = run / METRICS_FILE
    with writing(target), target.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain, allow_nan=False) + "\n")


def keep_metrics_until(file: Path, step: int) -> None:
    """Drop the lines of a metrics file that lie behind ``step``: the resumed run writes them again."""
    if not file.is_file():
        return
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if parse_json(line, file.name).get("step", 0) <= step:
                lines.append(line)
        except (ValueError, TypeError, AttributeError):  # the line that a kill cut off
            continue
    with atomic_write(file, overwrite=True) as beside:
        beside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
