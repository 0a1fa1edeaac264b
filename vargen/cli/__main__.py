"""`python -m vargen.cli`, for trees that are not installed."""

from vargen.cli.main import app

app(prog_name="vargen")
