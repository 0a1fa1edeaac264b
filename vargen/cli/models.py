"""`vargen models`: what is shipped, what can be loaded, which sampler fits."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vargen.cli import _common
from vargen.validation.printable import shown
from vargen.validation.reading import read_text


@_common.one_line_errors
def models(
    name: Annotated[str | None, typer.Argument(help="Show the card of one shipped model.")] = None,
) -> None:
    """List shipped models, the published families that load, and the samplers with what they guarantee.

    exact: samples the distribution that the model defines. relaxed: changes it within a stated bound. heuristic: no bound.

    \b
    Examples:
      vargen models
      vargen models heroes32-llamagen
    """
    if name is not None:
        _common.say(_card(name))
        return
    from rich.console import Console

    console = Console()
    for table in (_shipped(), _samplers(), _families(), _memory()):
        console.print(table)


def _card(name: str) -> str:
    from vargen import registry

    known = {model.name: model for model in registry.shipped_models()}
    if name not in known:
        raise ValueError(f"unknown model {shown(name)}; {registry.nearest(name, list(known))}")
    card = known[name].folder / registry.CARD_FILE
    return read_text(card) if card.is_file() else f"{name} has no card ({card})"


def _shipped() -> Any:
    from rich.table import Table

    import vargen
    from vargen import registry

    table = Table("name", "size", "backbone", "samplers that fit", title="shipped models", title_justify="left")
    for model in registry.shipped_models():
        backbone = model.components.get("backbone", "")
        fitting = registry.fitting_samplers(getattr(vargen, backbone)) if backbone in vargen.__all__ else []
        row = (model.name, f"{model.num_bytes / 1e6:.1f} MB", backbone, ", ".join(fitting))
        table.add_row(*map(_common.cell, row))
    return table


def _samplers() -> Any:
    from rich.table import Table

    from vargen import registry

    table = Table("sampler", "guarantee", "class", title="samplers", title_justify="left")
    for name, class_name in registry.sampler_names().items():
        table.add_row(*map(_common.cell, (name, registry.sampler_class(name).guarantee, class_name)))
    return table


def _families() -> Any:
    from rich.table import Table

    import vargen
    from vargen.checkpoints.families import known_families

    title = "published checkpoints (vargen convert CKPT DIR)"
    table = Table("family", "loads as", title=title, title_justify="left")
    for family in known_families():
        if family.loader.split(".")[0] in vargen.__all__:
            table.add_row(*map(_common.cell, (family.title, family.loader)))
    return table


def _memory() -> Any:
    from rich.table import Table

    from vargen.memory import text_to_image_bytes

    title = "memory of a guided decode of one picture, half precision, beside the weights"
    table = Table("model", "cache", "logits", title=title, title_justify="left")
    for name, held in text_to_image_bytes().items():
        table.add_row(name, f"{held.cache / 1e9:.2f} GB", f"{held.logits / 1e6:.1f} MB")
    return table
