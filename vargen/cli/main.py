"""The `vargen` command. Importing it is cheap; each command imports what it needs when it runs."""

from __future__ import annotations

import typer

import vargen
from vargen.cli import bench, convert, data, demo, generate, generate_video, models, train, verify
from vargen.cli import eval as evaluate

HELP = """
Visual autoregressive generation: tokenizers, backbones and samplers that plug into one another.

Start with:  vargen generate "deep elf with a red cloak" -n 16 --seed 7 -o heroes.png
"""

app = typer.Typer(
    name="vargen",
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
