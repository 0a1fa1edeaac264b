"""`python -m vargen`: the command, for `accelerate launch -m vargen` and torchrun."""

from vargen.cli.main import app

if __name__ == "__main__":
    app(prog_name="vargen")
