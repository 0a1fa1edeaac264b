"""`vargen train`: train a model from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vargen.cli import _common


@_common.one_line_errors
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A .toml recipe, or the name of a shipped one.")],
) -> None:
    """Train a model from a recipe."""
    raise ValueError("training is not here yet")
