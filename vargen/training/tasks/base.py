"""What a training run trains: a task builds the model and knows its loss, its metrics and its pictures.

The loop in ``vargen.training.run`` is written once for all of them. A new method is one file with one ``Task``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from vargen.training.data import open_dataset
from vargen.training.recipe import Recipe, build
from vargen.validation.extras import extra
from vargen.validation.printable import shown

with extra("train", "training"):
    from torchvision.utils import make_grid  # type: ignore[import-untyped]

TASKS = {  # name -> (module, class); imported when asked for
    "vq": ("vargen.training.tasks.vq", "VQTask"),
    "llamagen": ("vargen.training.tasks.llamagen", "LlamaGenTask"),
    "eagle": ("vargen.training.tasks.eagle", "DrafterTask"),
    "row": ("vargen.training.tasks.row", "RowTask"),
    "multiscale-vq": ("vargen.training.tasks.multiscale_vq", "MultiScaleVQTask"),
    "var": ("vargen.training.tasks.var", "VARTask"),
    "nar": ("vargen.training.tasks.nar", "NARTask"),
    "kl": ("vargen.training.tasks.kl", "KLTask"),
    "mar": ("vargen.training.tasks.mar", "MARTask"),
    "causal-mar": ("vargen.training.tasks.mar", "CausalMARTask"),
    "mar-draft": ("vargen.training.tasks.mar_draft", "MARDraftTask"),
    "video-fsq": ("vargen.training.tasks.video", "VideoTask"),
    "nbp": ("vargen.training.tasks.nbp", "NBPTask"),
}
MAX_GRID = 1024  # pictures on a sample grid


class Task:
    """Base of all tasks, over any data set of ``vargen.datasets.base``.

    Args:
        recipe: the run. ``recipe.options`` is read into the subclass's ``Options`` dataclass.
        rank: of this process.
        world_size: number of processes.
    """

    Options: ClassVar[type[Any]]
    data_kind: ClassVar[str] = "image"  # or "clip"

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        if recipe.data.batch_size % world_size:
            got = f"{recipe.data.batch_size} over {world_size} processes"
            raise ValueError(f"data.batch_size must be a multiple of the number of processes, got {got}")
        self.recipe, self.rank, self.world_size = recipe, rank, world_size
        self.options = build(self.Options, recipe.options, "options")
        pictures = getattr(self.options, "grid_size", 1)
        if not 1 <= pictures <= MAX_GRID:
            raise ValueError(f"options.grid_size must be in 1..{MAX_GRID}, got {pictures}")
        self.device = torch.device("cpu")
        self.start = (0, 0)  # a step and how many examples lie before it: a resumed run may have another batch size
        self.train_data = open_dataset(recipe, "train", self.data_kind, **self.data_options())
        self.test_data = open_dataset(recipe, "test", self.data_kind, **self.data_options())

    def data_options(self) -> dict[str, Any]:
        """Arguments of the data set that the task decides."""
        return {}

    def condition_settings(self) -> dict[str, Any]:
        """Settings of a backbone that the data set decides.

        Attributes are dropped by the data set; labels by the backbone, which has a null label only if it drops some.
        """
        drop = self.recipe.data.null_dropout if self.train_data.condition_type == "class" else 0.0
        return {**self.train_data.condition_settings(), "class_dropout_prob": drop}

    def build(self, initialize: bool) -> nn.Module:
        """Make the model to train.

        Args:
            initialize: also do slow initialisation that looks at data; a resumed run loads its weights instead.
        """
        raise NotImplementedError

    def setup(self, device: torch.device) -> None:
        """Move what the task itself owns (frozen models) to the device of training."""
        self.device = device

    def compile(self, model: nn.Module) -> None:
        """Compile the expensive part of the training forward in place."""
        model.compile()

    def first_example(self, step: int) -> int:
        """How many examples lie before a step."""
        since, examples = self.start
        return examples + (step - since) * self.recipe.data.batch_size

    def batch(self, step: int) -> dict[str, Tensor]:
        """Examples of one step for this process: a function of (recipe, start, step, rank) alone."""
        indices = np.arange(self.first_example(step) + self.rank, self.first_example(step + 1), self.world_size)
        return self.encode(self.on_device(self.train_data.examples(indices)))

    def test_batch(self, start: int, size: int) -> dict[str, Tensor]:
        """Examples of the test split, which no training step sees."""
        return self.encode(self.on_device(self.test_data.examples(np.arange(start, start + size))))

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add what frozen models make of the examples: codes, latents, hidden states."""
        return batch

    def conditions(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What test examples are scored under, by the suffix of the metric: their condition, none, the data set's own."""
        given = batch["condition"]
        settings = self.condition_settings()
        if settings["condition_type"] == "attributes":
            null = {"_null": torch.zeros_like(given)}
        else:
            null = {"_null": torch.full_like(given, settings["num_classes"])} if settings["class_dropout_prob"] else {}
        return {"": given, **null, **self.test_data.variants(given)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar to minimise and detached numbers for the log."""
        raise NotImplementedError

    def after_step(self, model: nn.Module, step: int) -> None:
        """Change weights in a way that gradients do not; like everything in a step, a function of weights and step."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measure a model on ``data.num_eval_images`` test examples."""
        raise NotImplementedError

    def sample_grid(self, model: nn.Module) -> Tensor:
        """Draw pictures to look at: ``[3, H, W]`` uint8."""
        raise NotImplementedError

    def captions(self) -> list[str]:
        """One text a picture of the sample grid."""
        examples = self.test_data.examples(np.arange(getattr(self.options, "grid_size", 1)))
        return self.test_data.captions(examples[self.test_data.condition_type])

    def test_batches(self, size: int = 64) -> list[dict[str, Tensor]]:
        """All test examples in batches."""
        total = self.recipe.data.num_eval_images
        return [self.test_batch(start, min(size, total - start)) for start in range(0, total, size)]

    def on_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Examples on the device of training, their condition also under the name "condition"."""
        moved = {key: value.to(self.device) for key, value in batch.items()}
        return {**moved, "condition": moved[self.train_data.condition_type]}


def make_task(recipe: Recipe, rank: int = 0, world_size: int = 1) -> Task:
    """Build the task that a recipe names.

    Raises:
        ValueError: unknown task, or options that the task does not know.
    """
    if recipe.task not in TASKS:
        raise ValueError(f"unknown task {shown(recipe.task)}; choose from {', '.join(TASKS)}")
    module, name = TASKS[recipe.task]
    return getattr(import_module(module), name)(recipe, rank, world_size)


def model_from(kind: type[Any], config: Mapping[str, Any], **fixed: Any) -> Any:
    """Build a diffusers-style model from a recipe's ``[model]`` table, unknown keys refused by name.

    Args:
        kind: model class.
        config: the table.
        fixed: settings that the task decides.
    """
    import inspect

    from vargen.training.recipe import check_keys

    allowed = [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", *fixed)]
    check_keys(config, allowed, "model")
    return kind(**config, **fixed)


def paired_grid(above: Tensor, below: Tensor) -> Tensor:
    """Rows of at most 16 pictures ``[n, 3, H, W]``, each above its counterpart."""
    columns = min(16, len(above))
    pairs = zip(above.split(columns), below.split(columns), strict=True)
    return to_grid(torch.cat([part for pair in pairs for part in pair]), columns)


def to_grid(images: Tensor, num_columns: int, scale: int = 3, gap: int = 2) -> Tensor:
    """Tile images ``[n, 3, H, W]`` in [-1, 1] row by row, enlarged without smoothing, as ``[3, H', W']`` uint8."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    grid = make_grid(pixels.cpu(), nrow=num_columns, padding=gap, pad_value=255)
    return grid[:, gap:-gap, gap:-gap] if len(pixels) > 1 else grid  # torchvision frames all but a single picture
