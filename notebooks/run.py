"""Run notebooks and store what they show: ``python notebooks/run.py 09 10`` (all without an argument).

Outputs are kept small: no progress bars, one picture format, no long text behind a picture.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
TIMEOUT = 1800  # seconds a cell
MAX_TEXT = 400  # characters of plain text kept behind a picture


def run(path: Path) -> None:
    """Run one notebook from top to bottom and write it back."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of this machine
        if cell.cell_type == "code":
            cell.outputs = [shorten(output) for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)


def shorten(output: dict) -> dict:
    """Keep one picture of an output."""
    data = output.get("data", {})
    if "text/html" in data or "image/png" in data:
        data.pop("image/jpeg", None)
        data["text/plain"] = data.get("text/plain", "")[:MAX_TEXT]
    if "text/html" in data:
        data.pop("image/png", None)
    return output


def main() -> None:
    """Run the notebooks whose names begin as the arguments do."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    chosen = tuple(sys.argv[1:]) or ("",)
    for path in sorted(FOLDER.glob("*.ipynb")):
        if path.name.startswith(chosen):
            run(path)
            sys.stdout.write(f"{path.name}: {path.stat().st_size / 1000:.0f} kB\n")


if __name__ == "__main__":
    main()
