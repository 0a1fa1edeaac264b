"""The README's Python blocks run as written, in one session, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

README = Path(__file__).parents[1] / "README.md"
SKIP = "# doctest: skip"  # blocks that need files a clone does not have


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # one block writes a clip
    run = [block for block in blocks("python") if not block.startswith(SKIP)]
    assert run
    names: dict[str, Any] = {}
    for block in run:
        exec(compile(block, str(README), "exec"), names)
    assert names["output"].stats.num_forwards < 64


def test_commands_exist() -> None:
    from vargen.cli.main import app

    commands = {
        line.split()[1] for block in blocks("bash") for line in block.splitlines() if line.startswith("vargen ")
    }
    assert {"generate", "models", "verify", "convert", "train", "data", "eval"} <= commands
    for command in commands:
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0, result.output


def test_pictures_exist() -> None:
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README.read_text()):
        assert (README.parent / path).is_file(), path
