"""What generating needs, what extras bring, and the one line where one is missing; the package as an index shows it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import textwrap
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.lowest import REQUIREMENT
from vargen.validation.extras import EXTRAS, extra

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ALIASES = {"text": "transformers", "metrics": "eval"}

WITHOUT = """
    import sys

    class Without:
        \"\"\"A finder that does not see some libraries, as if they were not installed.\"\"\"

        def __init__(self, finder, names):
            self.finder, self.names = finder, names

        def __getattr__(self, name):
            return getattr(self.finder, name)

        def find_spec(self, name, path=None, target=None):
            return None if name.partition(".")[0] in self.names else self.finder.find_spec(name, path, target)

    sys.meta_path[:] = [Without(finder, {names!r}) for finder in sys.meta_path]
"""


def run_without(names: set[str], code: str) -> str:
    """Run code in an interpreter in which these libraries cannot be imported."""
    whole = textwrap.dedent(WITHOUT).format(names=names) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", whole], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_generating_needs_neither_matplotlib_nor_torchmetrics_nor_torchvision() -> None:
    code = """
        import importlib.util
        import vargen
        from vargen.cli.main import app

        assert not any(importlib.util.find_spec(name) for name in ("matplotlib", "torchmetrics", "torchvision"))
        pipe = vargen.ImagePipeline.from_pretrained("heroes32-var")
        pipe.set_progress_bar_config(disable=True)
        print(pipe("a minotaur", seed=0).images[0].size)
        print(vargen.ClassConditioner()(["golden retriever"]).tolist())
        for name in vargen.__all__:
            getattr(vargen, name)
    """
    assert run_without({"matplotlib", "torchmetrics", "torchvision"}, code).split("\n")[:2] == ["(32, 32)", "[207]"]


@pytest.mark.slow
def test_a_missing_extra_is_one_line_that_names_it() -> None:
    code = """
        from importlib import import_module

        for module in ("vargen.metrics.frechet", "vargen.metrics.kernel", "vargen.metrics.inception_score",
                       "vargen.metrics.precision_recall", "vargen.metrics.attribute_accuracy", "vargen.metrics.fvd",
                       "vargen.metrics.networks.inception", "vargen.evaluation.benchmark", "vargen.display.plot",
                       "vargen.training.run"):
            try:
                import_module(module)
            except ImportError as error:
                print(error)
        from typer.testing import CliRunner
        from vargen.cli.main import app

        found = CliRunner().invoke(app, ["eval", "compare", "a", "b"])
        print(found.exit_code, found.output.strip())
    """
    lines = run_without({"matplotlib", "torchmetrics", "torchvision"}, code).strip().split("\n")
    assert lines[0] == "vargen.metrics needs torchmetrics; pip install 'vargen[eval]'"
    assert len(lines) == 11
    assert all(line.endswith("; pip install 'vargen[eval]'") for line in lines[:9])
    assert lines[9] == "training needs torchvision; pip install 'vargen[train]'"
    assert lines[10].startswith("2 error: vargen.metrics needs torchmetrics; pip install")


def test_another_failure_inside_an_extra_is_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named 'nothing_like_it'"), extra("eval", "this"):
        import nothing_like_it  # type: ignore[import-not-found]  # noqa: F401


def listed(name: str) -> list[str]:
    return PROJECT["optional-dependencies"][name]


def names(requirements: list[str]) -> set[str]:
    found = [REQUIREMENT.fullmatch(line) for line in requirements]
    return {match["name"] for match in found if match is not None}


def test_extras_are_those_that_the_code_names() -> None:
    assert set(PROJECT["optional-dependencies"]) == {*EXTRAS, *ALIASES, "all", "dev"}
    for alias, name in ALIASES.items():
        assert listed(alias) == [f"vargen[{name}]"]
    assert listed("all") == [f"vargen[{','.join(EXTRAS)}]"]
    dists = {module: {name.lower() for name in found} for module, found in packages_distributions().items()}
    for name, modules in EXTRAS.items():
        wanted = {found.lower() for found in names(listed(name))}
        for module in modules:
            brought = dists.get(module, {module})  # one that is not installed has its module's name
            assert brought & wanted, (name, module)
        assert len(wanted) == len(modules)
    optional = {name for extra_name in EXTRAS for name in names(listed(extra_name))}
    assert names(PROJECT["dependencies"]).isdisjoint(optional)


def test_triton_is_declared_where_it_exists() -> None:
    assert [line for line in PROJECT["dependencies"] if line.startswith("triton")] == [
        "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'"
    ]


def test_imagenet_names_are_those_of_torchvision() -> None:
    from torchvision.models import ResNet18_Weights

    from vargen.conditioners.class_labels import imagenet_names

    assert list(imagenet_names()) == ResNet18_Weights.IMAGENET1K_V1.meta["categories"]


def test_an_index_shows_pictures_and_pages_by_absolute_links() -> None:
    absolute_links = runpy.run_path(str(ROOT / "setup.py"))["absolute_links"]
    repository = PROJECT["urls"]["Repository"]
    text = absolute_links((ROOT / "README.md").read_text(), repository)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) > 15
    assert all(target.startswith(("https://", "#")) for target in targets)
    assert f"]({repository}/raw/main/docs/images/deep_elf.png)" in text
    assert f"[complete examples]({repository}/blob/main/docs/extend.md)" in text
    assert PROJECT["dynamic"] == ["readme"]
    assert any(entry.startswith("Programming Language :: Python :: 3.11") for entry in PROJECT["classifiers"])
