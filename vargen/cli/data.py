"""`vargen data`: the data sets that the shipped models were trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vargen.cli import _common

MAX_HEROES = 1_000_000  # their files have names of six digits

app = typer.Typer(help="Make training data.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _data() -> None:
    pass


@app.command("heroes")
@_common.one_line_errors
def heroes(
    num_images: Annotated[int | None, typer.Option("-n", "--num-images", help="Heroes to draw.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Folder to write.")] = None,
    seed: Annotated[int, typer.Option(help="Hero i uses seed + i.")] = 0,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Only pairs of base and weapon that training never shows.")
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build the atlas of parts again from Debian's source package.")
    ] = False,
    tarball: Annotated[
        Path | None, typer.Option(help="With --rebuild: the upstream file; default: apt-get source fetches it.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
) -> None:
    """Draw pixel heroes with captions, or rebuild the atlas of parts that they are made of.

    \b
    Examples:
      vargen data heroes -n 100 -o heroes
      vargen data heroes --rebuild --tarball crawl_0.28.0.orig.tar.xz -o atlas
    """
    if rebuild == (num_images is not None):
        raise ValueError(f"give either -n or --rebuild, got {'both' if rebuild else 'neither'}")
    if tarball is not None and not rebuild:
        raise ValueError("--tarball needs --rebuild")
    if output is None:
        raise ValueError("give the folder to write with -o DIR")
    _common.check_number("-n", num_images, 1, MAX_HEROES)
    _common.check_output(output, overwrite=overwrite, folder=True)
    from vargen.datasets.heroes import build_atlas as crawl

    if rebuild:
        crawl.rebuild_atlas(tarball, output, overwrite=overwrite)
    else:
        assert num_images is not None
        crawl.compose_folder(num_images, output, seed, held_out=held_out, overwrite=overwrite)
    _common.say(f"written to {output}")
