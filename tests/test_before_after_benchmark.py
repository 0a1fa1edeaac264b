"""The benchmark of two trees: turns, ratios, and real processes on two copies of the library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import before_after

    return before_after


class Fake:
    """A side that takes given times."""

    def __init__(self, name: str, seconds: list[float], digest: str, log: list[str]) -> None:
        self.name, self.seconds, self.digest, self.log = name, iter(seconds), digest, log

    def decode(self, case: str, batch: int) -> tuple[float, str]:
        self.log.append(self.name)
        return next(self.seconds), self.digest


def test_sides_take_turns_and_the_first_decode_does_not_count(bench: Any) -> None:
    log: list[str] = []
    times = {"before": [100.0, 3.0, 1.0, 2.0], "after": [100.0, 1.0, 4.0, 1.0]}
    sides = {name: Fake(name, seconds, "x", log) for name, seconds in times.items()}
    row = bench.measure(sides, "nar", 8, 3)
    assert log == ["before", "after", "before", "after", "after", "before", "before", "after"]
    assert (row["case"], row["batch"], row["same_codes"]) == ("nar", 8, True)
    assert (row["seconds_before"], row["seconds_after"], row["ratio"]) == (2.0, 1.0, 2.0)
    assert row["ratio_low"] <= 2.0 <= row["ratio_high"]
    sides = {name: Fake(name, [1.0, 1.0], name, log) for name in times}
    assert not bench.measure(sides, "nar", 1, 1)["same_codes"]


def test_what_is_neither_folder_nor_revision_is_refused(bench: Any) -> None:
    with pytest.raises(SystemExit, match="neither a folder nor a revision"), bench.checkout("no-such-thing"):
        pass


@pytest.mark.cluster
def test_two_copies_of_one_tree_draw_the_same(bench: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "before_after.py"), "HEAD", "--rounds", "1", "--batches", "1"]
    name = "before_after_test"
    result = ROOT / "benchmarks" / "results" / f"{name}.json"
    try:
        subprocess.run([*command, "--cases", "var", "mar", "--name", name], cwd=tmp_path, check=True)
        found = json.loads(result.read_text())
    finally:
        result.unlink(missing_ok=True)
    assert [(row["case"], row["same_codes"]) for row in found["rows"]] == [("var", True), ("mar", True)]
    assert all(row["seconds_before"] > 0 < row["seconds_after"] for row in found["rows"])
