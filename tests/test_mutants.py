"""Mistakes that must not pass: each is made in a copy of the tree, and the test named for it has to fail there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
CODE = ("vargen", "samplers", "kernels", "tokenizers", "tests")
LARGE = ("vargen/assets", "tests/golden")  # linked, not copied


def test_every_mutant_changes_what_stands_there_once() -> None:
    for mutant in MUTANTS:
        text = (ROOT / mutant.file).read_text()
        assert text.count(mutant.old) == 1, f"{mutant.name}: the text to change is not in {mutant.file}, or twice"
        file, _, name = mutant.test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(), mutant.name


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    for name in CODE:
        skip = [Path(path).name for path in LARGE if Path(path).parent.name == name]
        ignored = shutil.ignore_patterns("__pycache__", *skip)
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for path in LARGE:
        (folder / path).symlink_to(ROOT / path)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(folder: Path, test: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", test]
    code = "import sys, vargen; sys.exit(not vargen.__file__.startswith(sys.argv[1]))"  # the copy, not the original
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=folder, env=environment, check=True)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.cluster
@pytest.mark.parametrize("test", sorted({mutant.test for mutant in MUTANTS}))
def test_the_copy_itself_passes(copy: Path, test: str) -> None:
    result = run(copy, test)
    assert result.returncode == 0, result.stdout


@pytest.mark.cluster
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_dies(copy: Path, mutant: Mutant) -> None:
    file = copy / mutant.file
    text = file.read_text()
    file.write_text(text.replace(mutant.old, mutant.new))
    try:
        result = run(copy, mutant.test)
    finally:
        file.write_text(text)
    assert result.returncode == 1, f"{mutant.name} lives:\n{result.stdout}"
