"""The three rooms at the root are parts of vargen, and the names they share with other libraries stay theirs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.lowest import lowest_versions

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("tokenizers", "samplers", "kernels")


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def tracked(*patterns: str) -> list[str]:
    """Files under version control, or what lies on disk where the tests run from an unpacked archive."""
    listed = subprocess.run(["git", "ls-files", "--", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return listed.stdout.split()
    return [str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / pattern).rglob("*")]


def python_folders(folder: str) -> set[str]:
    """Dotted names of `folder` and of everything below it that holds a Python file."""
    files = [path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts]
    return {".".join(path.parent.relative_to(ROOT).parts) for path in files}


def run_in_root(code: str) -> str:
    """Run `code` in a fresh interpreter with the repository root first on sys.path."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_package_is_listed() -> None:
    rooms = {f"vargen.{name}" for room in ROOMS for name in python_folders(room)}
    package = {name for name in python_folders("vargen") if name.split(".")[1:2] != ["assets"]}
    found = package | rooms | {f"vargen.{room}" for room in ROOMS}
    assert set(settings()["packages"]) == found


def test_listed_packages_are_sorted_and_unique() -> None:
    packages = settings()["packages"]
    assert packages == sorted(set(packages))


def test_package_dir_maps_the_three_rooms() -> None:
    assert settings()["package-dir"] == {f"vargen.{room}": room for room in ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_room_has_no_init(room: str) -> None:
    assert not (ROOT / room / "__init__.py").exists(), f"{room}/__init__.py would shadow another library's package"


def test_no_test_folder_is_named_like_a_library() -> None:
    assert not {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} & set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_room_is_linked_into_the_package(room: str) -> None:
    link = ROOT / "vargen" / room
    if not link.is_symlink():
        pytest.skip("this file system holds no symbolic links")
    assert os.readlink(link) == f"../{room}"


def test_import_works_where_links_are_missing(tmp_path: Path) -> None:
    for folder in ("vargen", *ROOMS):
        skip = shutil.ignore_patterns("__pycache__", "assets", *(ROOMS if folder == "vargen" else ()))
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skip)
    code = "import vargen.tokenizers.vq.model as vq, vargen.kernels.draw as draw; print(vq.__file__, draw.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    vq, draw = (Path(name).parent for name in done.stdout.split())
    assert [vq.parent, draw] == [tmp_path / "tokenizers", tmp_path / "kernels"]


def test_hugging_face_tokenizers_is_not_shadowed() -> None:
    pytest.importorskip("tokenizers")
    location = Path(run_in_root("import tokenizers; tokenizers.Tokenizer; print(tokenizers.__file__)"))
    assert ROOT / "tokenizers" not in location.parents


def test_transformers_and_diffusers_import_in_the_root() -> None:
    pytest.importorskip("transformers")
    code = "import transformers, diffusers; transformers.T5EncoderModel, diffusers.AutoencoderKL; print('both')"
    assert run_in_root(code) == "both"


def test_kernels_of_another_library_is_not_shadowed(tmp_path: Path) -> None:
    """A regular package called `kernels` wins over our folder, although the root comes first on sys.path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'theirs'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.whose)"
    assert run_in_root(code) == "theirs"


def test_rooms_are_importable_by_their_full_names() -> None:
    code = "import vargen.tokenizers, vargen.samplers, vargen.kernels; print(len(vargen.kernels.__path__))"
    assert int(run_in_root(code)) >= 1


BUILD_LIST = """
import sys
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration

distribution = apply_configuration(Distribution({"script_name": "setup.py", "long_description": "set there"}), "pyproject.toml")
build = distribution.get_command_obj("build_py")
build.build_lib = sys.argv[1]
build.ensure_finalized()
for package, module, path in build.find_all_modules():
    print(path)
for package, folder, target, names in build.data_files:
    print(*(f"{folder}/{name}" for name in names), sep="\\n")
"""


def test_lowest_versions_are_those_of_the_bounds() -> None:
    lowest = lowest_versions(tomllib.loads((ROOT / "pyproject.toml").read_text()))
    assert {"torch", "diffusers", "transformers", "timm", "pytest", "gradio", "setuptools"} <= set(lowest)
    assert tuple(map(int, lowest["diffusers"].split("."))) >= (0, 38)  # older ones run files beside a configuration
    table = {"name": "x", "dependencies": ["a>=1.2", "b[c] >= 3"], "optional-dependencies": {"d": ["x[e]", "f==4.0"]}}
    settings = {"build-system": {"requires": []}, "project": table}
    assert lowest_versions(settings) == {"a": "1.2", "b": "3", "f": "4.0"}
    for wrong in ("a", "a<2", "a>=1,<2"):
        table["dependencies"] = [wrong]
        with pytest.raises(ValueError, match="must have one lower bound"):
            lowest_versions(settings)


def test_wheel_would_hold_every_module_and_data_file(tmp_path: Path) -> None:
    """Ask setuptools what it would put into a wheel; nothing that is tracked may be missing."""
    pytest.importorskip("setuptools", minversion="77")  # older ones cannot read the licence
    command = [sys.executable, "-W", "ignore", "-c", BUILD_LIST, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    built = {os.path.normpath(name) for name in done.stdout.split()}
    links = {f"vargen/{room}" for room in ROOMS}
    expected = {name for name in tracked("vargen", *ROOMS) if name not in links and (ROOT / name).is_file()}
    assert expected - built == set()


def test_tracked_tree_is_small() -> None:
    size = sum((ROOT / name).stat().st_size for name in tracked(".") if (ROOT / name).is_file())
    assert size < 60 * 2**20, f"tracked files hold {size / 2**20:.1f} MiB; the ceiling is 60 MiB"


def test_shipped_models_name_no_folder_of_the_machine_they_were_made_on() -> None:
    files = [*(ROOT / "vargen" / "assets").rglob("*.json"), *(ROOT / "vargen" / "assets").rglob("*.md")]
    assert files
    for file in files:
        assert not re.search(r'"_name_or_path"|[" (]/(?:work|home|root|tmp|Users)/', file.read_text()), file
