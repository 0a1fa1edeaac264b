"""Find the frozen models that a training run stands on: a run folder, a saved model, or a shipped model's name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

from diffusers import ModelMixin
from torch import nn

from vargen.checkpoints.reader import load_original, load_strict
from vargen.tokenizers.vq.model import VQTokenizer
from vargen.training.checkpoints import checkpoint_folders, load_newest, load_weights
from vargen.training.recipe import Recipe, parse_recipe
from vargen.training.tasks.base import TASKS, make_task
from vargen.validation.places import MODELS_FOLDER
from vargen.validation.printable import printable
from vargen.validation.reading import local_path, read_json

RECIPE_FILE = "recipe.json"
T = TypeVar("T", bound=ModelMixin)
TOKENIZER_TASKS = {"VQTokenizer": "vq", "MultiScaleVQTokenizer": "multiscale-vq", "VideoFSQTokenizer": "video-fsq"}
OTHER_TASKS = (*TOKENIZER_TASKS.values(), "kl", "eagle", "row")  # what trains no backbone


def load_tokenizer(source: str | Path, kind: type[T] = VQTokenizer) -> T:  # type: ignore[assignment]
    """Load a frozen tokenizer in evaluation mode.

    Args:
        source: folder of a training run (its newest averaged weights are taken), of a saved tokenizer, of a pipeline that
            holds one, or the name of a shipped model.
        kind: its class.

    Raises:
        ValueError: nothing of the kind is there.
    """
    folder = local_path(source)
    if (folder / RECIPE_FILE).is_file():
        recipe, weights = read_run(folder)
        task = TOKENIZER_TASKS[kind.__name__]
        if recipe.task != task:
            raise ValueError(f"{folder} is a run of task {recipe.task!r}, a tokenizer needs a run of task {task!r}")
        model = kind(**recipe.model)
        model.load_state_dict(weights)
    else:
        model = kind.from_pretrained(component_folder(source, "tokenizer"))
    model.eval().requires_grad_(False)
    return model


def load_transformer(run: str | Path) -> nn.Module:
    """Build the transformer of a run with its averaged weights, in evaluation mode.

    Raises:
        ValueError: a run of another kind of task, or no checkpoint yet.
    """
    recipe, weights = read_run(run)
    if recipe.task in OTHER_TASKS:
        tasks = " or ".join(repr(task) for task in TASKS if task not in OTHER_TASKS)
        raise ValueError(f"{run} is a run of task {recipe.task!r}, a backbone needs a run of task {tasks}")
    model = make_task(recipe).build(initialize=False)
    model.load_state_dict(weights)
    return model.eval()


def read_run(run: str | Path) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe of a run and the averaged weights of its newest checkpoint that is whole.

    Raises:
        ValueError: not a run folder, or no checkpoint in it yet.
    """
    folder = local_path(run)
    recipe = stored_recipe(folder)
    if not checkpoint_folders(folder):
        raise ValueError(f"the run {folder} has no checkpoint yet; wait for the first one")
    return recipe, load_newest(folder, lambda checkpoint: load_weights(checkpoint, "ema"))


def start_from_weights(model: nn.Module, source: str, component: str) -> None:
    """Copy the weights of a model of the same shape: training goes on from them.

    Args:
        model: changed in place.
        source: folder of a training run (its newest averaged weights are taken), of a saved model, of a pipeline that
            holds one, or the name of a shipped model.
        component: its folder in a pipeline.

    Raises:
        ValueError: nothing of the kind is there, or its weights have other names or shapes.
    """
    if (local_path(source) / RECIPE_FILE).is_file():
        weights = read_run(source)[1]
    else:
        weights = load_original(component_folder(source, component) / "diffusion_pytorch_model.safetensors")
    load_strict(
        model, {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    )


def stored_recipe(run: Path) -> Recipe:
    """Read the recipe that a run was started with.

    Raises:
        ValueError: not a run folder.
    """
    file = run / RECIPE_FILE
    if not file.is_file():
        raise ValueError(f"{printable(run)} is not the folder of a training run: it has no {RECIPE_FILE}")
    try:
        return parse_recipe(read_json(file))
    except ValueError as error:
        raise ValueError(f"cannot read the recipe {printable(file)}: {error}") from None


def component_folder(source: str | Path, name: str) -> Path:
    """Folder of a component: the folder given, the one of this name inside it, or that of a shipped model.

    Raises:
        ValueError: neither a folder nor the name of a shipped model.
    """
    folder = local_path(source)
    if not folder.is_dir():
        names = sorted(place.name for place in MODELS_FOLDER.glob("*") if place.is_dir())
        folder = MODELS_FOLDER / str(source)
        if not folder.is_dir():
            near = difflib.get_close_matches(str(source), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "train it first with `vargen train heroes32-vq`"
            raise ValueError(f"no {name} at {str(source)!r}; {hint}")
    return folder if (folder / "config.json").is_file() else folder / name
