"""Speed of this tree against another checkout of it: the same decodes of the shipped models, in turns.

Each side runs in a process of its own with its own copy of the library; both keep to one core and to one thread, and only one
works at a time, in turns: before, after, after, before, and so on. A ratio is the median time before over the median time
after, so above 1 this tree is faster. CPU time is taken, which leaves out the time in which other programs had the core; they
still share its caches, so look at the load in the JSON. Codes must be the same.

    python benchmarks/before_after.py HEAD~20                    # a revision, about five minutes
    python benchmarks/before_after.py ../other --rounds 15       # a folder
    python benchmarks/before_after.py main --cases next-token nar --batches 1
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, machine, pin_to_core, report, table, write_json

GUIDED = {"guidance_scale": 1.5, "top_p": 0.9}
CONTINUOUS = {"guidance_scale": 1.5, "guidance_schedule": "constant", "temperature": 0.25}
# model, sampler, settings
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "next-token": ("heroes32-llamagen", "NextTokenSampler", GUIDED),
    "jacobi-32": ("heroes32-llamagen", "SpeculativeJacobiSampler", GUIDED | {"window": 32}),
    "var": ("heroes32-var", "NextScaleSampler", {"guidance_scale": 1.5, "temperature": 0.7, "top_p": 0.7}),
    "nar": ("heroes32-nar", "NeighboringSampler", {"guidance_scale": 1.5, "temperature": 0.7}),
    "mar": ("heroes32-mar", "ContinuousMaskedSampler", CONTINUOUS | {"num_iter": 8}),
}
BATCHES = (1, 8)
PROMPT = "deep elf with a red cloak, wizard hat and great sword"
ROUNDS = 9
SIDES = ("before", "after")
CODE = ("vargen", "samplers", "kernels", "tokenizers")


class Side:
    """A process that decodes with the library of one tree."""

    def __init__(self, root: Path, core: int) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), str(root), "--worker", "--core", str(core)]
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=root, env=environment, stdin=pipe, stdout=pipe, text=True)

    def decode(self, case: str, batch: int) -> tuple[float, str]:
        """Seconds of one decode and a digest of its codes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([case, batch]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the other process ended with status {self.process.wait()}, see above")
        seconds, digest = json.loads(answer)
        return seconds, digest

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work(root: Path, core: int) -> None:
    """Answer requests ``[case, batch]``, one a line, until there are none."""
    sys.path.insert(0, str(root))  # before the tree of this file, which `_common` put there
    import vargen

    if not Path(vargen.__file__).resolve().is_relative_to(root):
        raise SystemExit(f"vargen comes from {vargen.__file__}, not from {root}")
    pin_to_core(core)
    answers, sys.stdout = sys.stdout, sys.stderr
    pipes: dict[str, Any] = {}
    for line in sys.stdin:
        case, batch = json.loads(line)
        model, sampler, settings = CASES[case]
        if model not in pipes:
            pipes[model] = vargen.ImagePipeline.from_pretrained(model)
            pipes[model].set_progress_bar_config(disable=True)
        pipe = pipes[model]
        pipe.sampler = getattr(vargen, sampler)(**settings)
        start = time.process_time()
        out = pipe(PROMPT, num_images_per_prompt=batch, seed=0, output_type="codes")
        seconds = time.process_time() - start
        parts = out.codes if isinstance(out.codes, list) else [out.codes]
        tokens = torch.cat([part.flatten(1).double() for part in parts], dim=1)
        digest = hashlib.sha256((tokens * 1e5).round().numpy().tobytes()).hexdigest()
        print(json.dumps([seconds, digest]), file=answers, flush=True)


@contextmanager
def checkout(other: str) -> Iterator[Path]:
    """The folder of another tree: ``other`` itself, or a temporary copy of that revision's code."""
    if Path(other).is_dir():
        yield Path(other).resolve()
        return
    command = ["git", "archive", "--format=tar", other, *CODE]
    found = subprocess.run(command, cwd=ROOT, capture_output=True)
    if found.returncode:
        reason = found.stderr.decode().strip().splitlines()[-1]
        raise SystemExit(f"{other!r} is neither a folder nor a revision with {', '.join(CODE)}: {reason}")
    with tempfile.TemporaryDirectory(prefix="before-") as folder:
        with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder).resolve()


def summary(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians of both sides, their ratio, and the quartiles of the ratios of neighbouring runs."""
    medians = {side: statistics.median(seconds[side]) for side in SIDES}
    ratios = [before / after for before, after in zip(*(seconds[side] for side in SIDES), strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        **{f"seconds_{side}": round(medians[side], 4) for side in SIDES},
        "ratio": round(medians["before"] / medians["after"], 4),
        "ratio_low": round(low, 4),
        "ratio_high": round(high, 4),
    }


def measure(sides: dict[str, Side], case: str, batch: int, rounds: int) -> dict[str, Any]:
    """Time one case on both sides in turns, after one untimed decode each."""
    digests = [sides[side].decode(case, batch)[1] for side in SIDES]
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES[:: 1 if number % 2 == 0 else -1]:  # neither side always comes first
            seconds[side].append(sides[side].decode(case, batch)[0])
    return {"case": case, "batch": batch, **summary(seconds), "same_codes": digests[0] == digests[1]}


def revision(folder: Path, other: str) -> str:
    """Commit of the other tree, or the name that it was asked for by."""
    where, name = (folder, "HEAD") if Path(other).is_dir() else (ROOT, other)
    found = subprocess.run(["git", "rev-parse", "--short", name], cwd=where, capture_output=True, text=True)
    return found.stdout.strip() or other


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", help="folder or git revision of the tree to compare with")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--name", default="before_after", help="of the file in benchmarks/results")
    parser.add_argument("--core", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(Path(options.other).resolve(), options.core)
        return
    with checkout(options.other) as folder:
        before = revision(folder, options.other)
        sides = {"before": Side(folder, options.core), "after": Side(ROOT, options.core)}
        rows = []
        try:
            for case in options.cases:
                for batch in options.batches:
                    rows.append(measure(sides, case, batch, options.rounds))
                    print(table(rows[-1:]), flush=True)
        finally:
            for side in sides.values():
                side.close()
    print(table(rows))
    found = report(before=before, rounds=options.rounds, clock="CPU time, one thread", rows=rows)
    found["machine"] = machine() | {"threads": 1}
    print(write_json(options.name, found))
    worst = min(rows, key=lambda row: row["ratio"])
    print(f"smallest ratio {worst['ratio']} ({worst['case']}, batch {worst['batch']})")
    if not all(row["same_codes"] for row in rows):
        raise SystemExit("some codes differ: the two sides do not do the same work")


if __name__ == "__main__":
    main()
