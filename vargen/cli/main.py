"""The `vargen` command. Importing it is cheap; each command imports what it needs when it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

import vargen
from vargen.cli import bench, convert, data, demo, generate, generate_video, models, train, verify
from vargen.cli import eval as evaluate
from vargen.validation.printable import printable

HELP = """
Visual autoregressive generation: tokenizers, backbones and samplers that plug into one another.

Start with:  vargen generate "deep elf with a red cloak" -n 16 --seed 7 -o heroes.png
"""


class Commands(TyperGroup):
    """The commands; what a message about wrong usage quotes (names of files, perhaps, from a pattern) is escaped."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - as the parent's
        with _escaped_usage():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:  # noqa: D102
        with _escaped_usage():
            return super().invoke(ctx)


@contextmanager
def _escaped_usage() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):  # of click, which some versions of typer bring along
            text = printable(error.format_message())
            error.format_message = lambda: text  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    name="vargen",
    cls=Commands,
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: brackets in examples stay brackets
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vargen {vargen.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and leave."
    ),
) -> None:
    pass


app.command("generate")(generate.generate)
app.command("generate-video")(generate_video.generate_video)
app.command("models")(models.models)
app.command("convert")(convert.convert)
app.command("verify")(verify.verify)
app.command("train")(train.train)
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)
app.add_typer(data.app, name="data")
app.add_typer(evaluate.app, name="eval")
