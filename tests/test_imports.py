"""Dependencies point one way, importing vargen is cheap, and every public name resolves."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import vargen

ROOT = Path(__file__).resolve().parents[1]
CORE = (
    "features",
    "hooks",
    "orders",
    "outputs",
    "protocols",
    "random",
    "validation",
)  # modules of vargen that everyone may import
FILES = ("files", "checkpoints")
LIGHT = ("vargen", "vargen.validation.checks", "vargen.registry", "vargen.cli.main")

# room -> rooms and modules of vargen that it may import beside itself and the core
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "tokenizers": ("kernels", *FILES),
    "samplers": ("kernels",),
    "backbones": ("kernels", *FILES),
    "conditioners": ("datasets", *FILES),
    "datasets": FILES,
    "draft_models": ("kernels", "backbones", *FILES),
    "metrics": ("images", "datasets", *FILES),
    "evaluation": ("images", "datasets", "metrics", "tokenizers", "pipelines", "registry", *FILES),
}
# room -> libraries that it may not import, although vargen depends on them
FORBIDDEN_LIBRARIES: dict[str, tuple[str, ...]] = {
    "kernels": ("diffusers", "transformers", "torchvision", "typer", "rich"),
    "tokenizers": ("transformers", "typer", "rich"),
    "samplers": ("transformers", "triton", "typer", "rich"),
    "backbones": ("typer", "rich"),
    "datasets": ("diffusers", "transformers", "triton"),
}


def folder_of(room: str) -> Path:
    return ROOT / room if (ROOT / room).is_dir() and room != "vargen" else ROOT / "vargen" / room


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports at run time, inside functions too; not for type checkers only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def forbidden_imports(room: str, files: list[Path]) -> list[str]:
    found = []
    for path in files:
        for line, name in imports_of(path):
            top, *rest = name.split(".")
            inside = rest[0] if top == "vargen" and rest else ""
            allowed = {room, *CORE, *ALLOWED.get(room, ())}
            if top == "" or (inside and inside not in allowed) or top in FORBIDDEN_LIBRARIES.get(room, ()):
                found.append(f"{path.name}:{line} imports {name}")
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_room_imports_only_what_it_may(room: str) -> None:
    assert forbidden_imports(room, sorted(folder_of(room).rglob("*.py"))) == []


def test_a_forbidden_import_is_seen(tmp_path: Path) -> None:
    """The check above can fail: an upward import, a relative one and a library, even inside a function."""
    path = tmp_path / "bad.py"
    path.write_text(
        "def f():\n    from vargen.pipelines.image import ImagePipeline\nimport triton\nfrom . import base\n"
    )
    assert len(forbidden_imports("samplers", [path])) == 3


@pytest.mark.parametrize("room", CORE)
def test_core_knows_nothing_of_the_rooms(room: str) -> None:
    place = ROOT / "vargen" / room
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    names = [name for path in files for _, name in imports_of(path) if name.startswith("vargen.")]
    assert files
    assert {name.split(".")[1] for name in names} <= set(CORE)


def test_only_the_cli_knows_the_cli() -> None:
    for path in [
        *(ROOT / "vargen").rglob("*.py"),
        *(p for room in ("kernels", "samplers") for p in (ROOT / room).rglob("*.py")),
    ]:
        if "cli" not in path.parts and path.name != "__main__.py":
            assert not [name for _, name in imports_of(path) if name.startswith("vargen.cli")], path


def loaded_after(statement: str) -> set[str]:
    """Top-level names in sys.modules after a statement, in a fresh interpreter."""
    code = f"import sys; {statement}; print(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_import_is_light(module: str) -> None:
    assert not loaded_after(f"import {module}") & {"torch", "triton", "diffusers", "transformers", "numpy"}


def test_kernels_and_noise_need_no_diffusers() -> None:
    modules = "import vargen.random, vargen.kernels.draw, vargen.kernels.verify.verify, vargen.kernels.warp"
    assert not loaded_after(modules) & {"diffusers", "transformers"}


@pytest.mark.parametrize("name", sorted(vargen._names))
def test_public_name_resolves(name: str) -> None:
    found = getattr(vargen, name)
    assert found.__name__ == name
    assert found is getattr(import_module(f"vargen.{vargen._names[name]}"), name)


def test_public_names_are_listed_once() -> None:
    assert vargen.__all__ == ["__version__", *vargen._names]
    assert set(vargen.__all__) <= set(dir(vargen))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Nothing"):
        _ = vargen.Nothing


def test_every_class_that_a_folder_may_name_is_public() -> None:
    """`model_index.json` stores public names, so a component class that is not public could be saved but not loaded."""
    from diffusers import ModelMixin

    from vargen.samplers.base import known_samplers

    for room in ("tokenizers", "backbones", "draft_models", "conditioners"):
        for path in folder_of(room).rglob("*.py"):
            if path.stem != "__init__":
                inside = path.relative_to(folder_of(room)).with_suffix("").parts
                import_module(".".join(("vargen", room, *inside)))
    models = {cls for cls in subclasses(ModelMixin) if cls.__module__.startswith("vargen.")}
    samplers = set(known_samplers())
    missing = {cls.__name__ for cls in models | samplers if not cls.__name__.startswith("_")} - set(vargen._names)
    assert missing == set()


def subclasses(cls: type) -> set[type]:
    return {found for child in cls.__subclasses__() for found in {child, *subclasses(child)}}


def test_nobody_imports_private_names_of_another_module() -> None:
    places = [
        *(ROOT / "vargen").rglob("*.py"),
        *(p for room in ("kernels", "samplers", "tokenizers") for p in (ROOT / room).rglob("*.py")),
    ]
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in places
        for line, name in imports_of(path)
        if name.startswith("vargen.") and name.rpartition(".")[2].startswith("_")
    ]
    assert [entry for entry in found if not entry.endswith(("cli._common", "cli._drawing"))] == []
