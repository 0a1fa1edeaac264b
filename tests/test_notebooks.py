"""The notebooks run top to bottom, and are committed as they ran: one question, one answer, small outputs."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 300_000
TIMEOUT = 300  # seconds a cell, on a machine that is busy with other tests


def read(path: Path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_asks_one_question_and_answers_it(path):
    assert path.stat().st_size < MAX_BYTES
    notebook = read(path)
    first, last = notebook.cells[0], notebook.cells[-1]
    assert first.cell_type == last.cell_type == "markdown"
    assert "?" in first.source
    assert last.source.startswith("**Answer.**")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_those_of_one_run_without_errors(path):
    code = [cell for cell in read(path).cells if cell.cell_type == "code" and cell.source.strip()]
    ran = [cell.execution_count for cell in code if cell.execution_count is not None]
    assert ran in ([], list(range(1, len(code) + 1)))  # committed without outputs, or as one run left them
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert (output.output_type, output.get("name")) != ("stream", "stderr")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # what users have
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    resources = {"metadata": {"path": str(path.parent)}}
    runner = client.NotebookClient(read(path), timeout=TIMEOUT, kernel_name="python3", resources=resources)
    asyncio.run(runner.async_execute())  # raises the error of a cell
