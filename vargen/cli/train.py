"""`vargen train`: train a model from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vargen.cli import _common


@_common.one_line_errors
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a .toml file.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Run folder; default: runs/<recipe name>.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in that folder, to the bit; it remembers its --set.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value of the recipe; repeatable."),
    ] = None,
) -> None:
    """Train a model from a recipe. Ctrl-C finishes the step and writes a checkpoint; --resume goes on from it.

    \b
    Examples:
      vargen train heroes32-vq
      vargen train heroes32-llamagen --set data.batch_size=32 -o runs/small
      vargen train heroes32-llamagen --resume
      vargen train heroes32-llamagen --resume --set optimizer.lr=5e-4
      accelerate launch -m vargen.cli train my_recipe.toml
    """
    from vargen.training.run import train as run_recipe

    result = run_recipe(recipe, overrides or (), output, resume)
    state = "finished" if result.finished else "stopped (continue with --resume)"
    _common.say(f"{state} at step {result.step}, written to {result.output}")
    for name, value in result.metrics.items():
        _common.say(f"  {name}: {value:.4g}")
