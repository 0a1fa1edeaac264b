"""The documentation: its examples run, its reference is complete, its links lead somewhere."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vargen
from docs import hooks
from vargen.datasets.base import DATASETS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.mark.slow
def test_the_examples_of_extend_run_in_one_session(monkeypatch):
    module = ModuleType("docs")
    names = vars(module)
    found = re.findall(r"```python\n(.*?)```", (DOCS / "extend.md").read_text(), flags=re.DOTALL)
    assert len(found) == 8
    monkeypatch.setitem(sys.modules, "docs", module)  # where dataclasses and data sets are looked up
    monkeypatch.setitem(DATASETS, "stripes", ("docs", "Stripes"))  # leaves with the test
    for block in found:
        exec(compile(block, "docs/extend.md", "exec"), names)
    assert names["fast"].codes.shape == (6, 16)
    assert names["striped"].codes.shape == (2, 64)  # the last block was reached
    pipe = vargen.ImagePipeline.from_pretrained("heroes32-llamagen")
    expected = pipe("minotaur", seed=4)
    pipe.sampler = vargen.SpeculativeSampler.from_config(pipe.sampler.config)
    blank = names["CopyDrafter"](torch.zeros_like(expected.codes))
    assert torch.equal(pipe("minotaur", seed=4, drafter=blank).codes, expected.codes)  # a bad draft costs passes only


def test_the_reference_names_what_the_package_offers():
    listed = re.findall(r"^::: vargen\.([\w.]+)\.(\w+)$", (DOCS / "reference.md").read_text(), flags=re.MULTILINE)
    assert {name: module for module, name in listed} == vargen._names


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere():
    pages = {path.name for path in DOCS.glob("*.md")}
    assert set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)) == pages
    for page in [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_tables_hold_the_recorded_numbers():
    pages = "".join(page.read_text() for page in DOCS.glob("*.md"))
    names = hooks.PLACE.findall(pages)
    assert len(names) == pages.count("<!-- table")
    for name in names:
        header, rule, *rows = [line for line in hooks.table(name).splitlines() if line.startswith("|")]
        assert rows
        assert {line.count(" | ") for line in (header, *rows)} == {rule.count(" | ")}, name
    record = json.loads((ROOT / "benchmarks/results/speculative-synthetic.json").read_text())
    (row,) = [r for r in record["rows"] if r["sampler"] == "Jacobi W=32" and r["batch"] == 32]
    assert f"| `SpeculativeJacobiSampler(window=32)` | exact | yes | {row['forwards']:.1f} |" in hooks.table(
        "speculative"
    )
    with pytest.raises(ValueError, match="unknown table 'speculativ'"):
        hooks.on_page_markdown("<!-- table: speculativ -->")


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_environment())
    assert built.returncode == 0, built.stderr[-3000:]
    assert "<!-- table" not in "".join(page.read_text() for page in (tmp_path / "site").glob("*.html"))
    page = (tmp_path / "site" / "reference.html").read_text()
    for name in vargen._names:
        assert f"{name}</code>" in page or f">{name}<" in page, name


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}
