"""`python -m vargen.cli`, for trees that are not installed."""

from vargen.cli.main import app

if __name__ == "__main__":
    app(prog_name="vargen")
