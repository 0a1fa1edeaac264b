"""Everything that needs a CUDA device, in at most 25 minutes: kernel tests, then every benchmark, each in a process of
its own. Writes `benchmarks/results/*.json` and a summary, `benchmarks/results/gpu.json`.

    make gpu
    python benchmarks/gpu.py --minutes 10      # less time: later steps are cut short or left out, and it is said so
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from _common import ROOT, report, table, write_json

KERNEL_TESTS = (
    "random", "warp", "draw", "verify", "verify_kernel", "verify_edges", "verify_distribution", "shift", "nearest", "tree_kernel", "graphs"
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One process: its command, and the most minutes it may take."""

    name: str
    command: tuple[str, ...]
    minutes: float


def parts() -> list[Part]:
    """In order of importance."""
    tests = tuple(f"tests/test_{name}.py" for name in KERNEL_TESTS)
    pytest = (sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=20", *tests)
    python = (sys.executable,)
    return [
        Part("kernel tests", pytest, 7),
        Part("acceptance kernel", (*python, "benchmarks/acceptance_kernel.py", "--limit", "420"), 9),
        Part("decoding", (*python, "benchmarks/decode_gpu.py", "--limit", "300"), 7),
    ]


def run(part: Part, seconds: float) -> dict[str, str | float]:
    """Run one part; its output goes where ours goes."""
    sys.stdout.write(f"== {part.name}: {' '.join(part.command[1:])}\n")
    sys.stdout.flush()
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "VARGEN_KERNELS")
    }
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started = time.monotonic()
    try:
        code = subprocess.run(part.command, cwd=ROOT, env=environment, timeout=seconds, check=False).returncode
        outcome = "passed" if code == 0 else f"failed with status {code}"
    except subprocess.TimeoutExpired:
        outcome = f"stopped after {seconds:.0f} s"
    return {"part": part.name, "outcome": outcome, "seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    """Run the parts inside the time given; 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25.0, help="for everything together")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write(
            "no CUDA device here, nothing was run; `make test` runs the kernels in Triton's interpreter\n"
        )
        return 1
    deadline = time.monotonic() + 60 * arguments.minutes
    rows = []
    for part in parts():
        left = deadline - time.monotonic()
        if left < 30:
            rows.append({"part": part.name, "outcome": "left out, no time", "seconds": 0.0})
        else:
            rows.append(run(part, min(left, 60 * part.minutes)))
    path = write_json("gpu", report(parts=rows))
    sys.stdout.write(f"\n{table(rows)}\nwritten to {path}\n")
    return 0 if all(row["outcome"] == "passed" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
