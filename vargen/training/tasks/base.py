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

from vargen.datasets.heroes.compose import HeroesDataset
from vargen.training.recipe import Recipe, build
from vargen.validation.printable import shown

TASKS = {  # name -> (module, class); imported when asked for
    "vq": ("vargen.training.tasks.vq", "VQTask"),
    "llamagen": ("vargen.training.tasks.llamagen", "LlamaGenTask"),
    "eagle": ("vargen.training.tasks.eagle", "DrafterTask"),
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
_EVAL_STREAM = 1  # added to the recipe's seed: evaluation heroes are another stream, of the test split


class Task:
    """Base of all tasks; heroes as data, unless a subclass says otherwise.

    Args:
        recipe: the run. ``recipe.options`` is read into the subclass's ``Options`` dataclass.
        rank: of this process.
        world_size: number of processes.
    """

    Options: ClassVar[type[Any]]
    data_name: ClassVar[str] = "heroes"

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        if recipe.data.name != self.data_name:
            raise ValueError(f"data.name must be {self.data_name!r}, got {shown(recipe.data.name)}")
        if recipe.data.batch_size % world_size:
            got = f"{recipe.data.batch_size} over {world_size} processes"
            raise ValueError(f"data.batch_size must be a multiple of the number of processes, got {got}")
        self.recipe, self.rank, self.world_size = recipe, rank, world_size
        self.options = build(self.Options, recipe.options, "options")
        pictures = getattr(self.options, "grid_size", 1)
        if not 1 <= pictures <= MAX_GRID:
            raise ValueError(f"options.grid_size must be in 1..{MAX_GRID}, got {pictures}")
        self.device = torch.device("cpu")
        self._train = self.dataset(
            recipe.seed, attribute_dropout=recipe.data.attribute_dropout, null_dropout=recipe.data.null_dropout
        )
        self._test = self.dataset(recipe.seed + _EVAL_STREAM, split="test")

    def dataset(self, seed: int, **options: Any) -> HeroesDataset:
        """Open a stream of examples; ``options`` are those of ``HeroesDataset``."""
        return HeroesDataset(seed, **options)

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

    def batch(self, step: int) -> dict[str, Tensor]:
        """Examples of one step for this process: a function of (recipe, step, rank) alone."""
        size = self.recipe.data.batch_size
        indices = np.arange(step * size + self.rank, (step + 1) * size, self.world_size)
        return self._to_device(self._train.examples(indices))

    def test_batch(self, start: int, size: int) -> dict[str, Tensor]:
        """Fresh heroes of the test split that no training step sees."""
        return self._to_device(self._test.examples(np.arange(start, start + size)))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar to minimise and detached numbers for the log."""
        raise NotImplementedError

    def after_step(self, model: nn.Module, step: int) -> None:
        """Change weights in a way that gradients do not; like everything in a step, a function of weights and step."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measure a model on ``data.num_eval_images`` test heroes."""
        raise NotImplementedError

    def sample_grid(self, model: nn.Module) -> Tensor:
        """Draw pictures to look at: ``[3, H, W]`` uint8."""
        raise NotImplementedError

    def test_batches(self, size: int = 64) -> list[dict[str, Tensor]]:
        """All evaluation heroes in batches."""
        total = self.recipe.data.num_eval_images
        return [self.test_batch(start, min(size, total - start)) for start in range(0, total, size)]

    def _to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in batch.items()}


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


def to_grid(images: Tensor, num_columns: int, scale: int = 3, gap: int = 2) -> Tensor:
    """Tile images ``[n, 3, H, W]`` in [-1, 1] row by row, enlarged without smoothing, as ``[3, H', W']`` uint8."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    n, c, h, w = pixels.shape
    rows = -(-n // num_columns)
    grid = torch.full((c, rows * (h + gap) - gap, num_columns * (w + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(pixels.cpu()):
        top, left = i // num_columns * (h + gap), i % num_columns * (w + gap)
        grid[:, top : top + h, left : left + w] = image
    return grid
