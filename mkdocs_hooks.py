"""The reference is read from a copy in which every folder is a package: documentation tools do not follow our links."""

import shutil
from pathlib import Path

ROOMS = ("tokenizers", "samplers", "kernels")


def on_startup(command: str, dirty: bool) -> None:
    """Copy the sources to build/api, before anyone looks for them."""
    root = Path(__file__).parent
    target = root / "build" / "api" / "vargen"
    shutil.rmtree(target, ignore_errors=True)
    skip = shutil.ignore_patterns("assets", "__pycache__", *ROOMS)
    shutil.copytree(root / "vargen", target, ignore=skip)
    for room in ROOMS:
        shutil.copytree(root / room, target / room, ignore=shutil.ignore_patterns("__pycache__"))
        (target / room / "__init__.py").touch()
    for file in target.rglob("*.py"):
        text = file.read_text()
        file.write_text(text.replace(" Example:\n", " Examples:\n"))  # the section whose prompts are shown as code
