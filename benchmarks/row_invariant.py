"""What ``row_invariant=True`` costs, and what the controller of ``window="auto"`` takes of the time.

Turns of next-token sampling and of Jacobi windows with and without it, on one core; a ratio is the median over rounds of CPU seconds
over those of plain next-token sampling in the same round. ``same`` compares codes with next-token's of the same setting and dtype.
"share of the controller" is the time spent in its two methods and in what asks it, over the whole time of the run.

    python benchmarks/row_invariant.py --batches 1 8
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from _common import pin_to_core, report, table, write_json
from _models import load

from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler
from vargen.samplers.window.widths import Widths


def share_of_the_controller(backbone: Any, condition: Any, settings: dict[str, Any], seeds: list[int]) -> float:
    """Seconds inside ``Widths.next`` and ``Widths.count`` over those of a run."""
    spent = [0.0]

    def timed(method: Any) -> Any:
        def call(*args: Any) -> Any:
            start = time.process_time()
            try:
                return method(*args)
            finally:
                spent[0] += time.process_time() - start

        return call

    own = Widths.next, Widths.count
    Widths.next, Widths.count = timed(own[0]), timed(own[1])  # type: ignore[method-assign]
    try:
        start = time.process_time()
        SpeculativeJacobiSampler(window="auto", **settings).sample(backbone, condition, seeds=seeds)
        return spent[0] / (time.process_time() - start)
    finally:
        Widths.next, Widths.count = own  # type: ignore[method-assign]


def measure(name: str, dtype: torch.dtype, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one model, dtype and batch."""
    subject = load(name)
    backbone, settings, seeds = subject.backbone.to(dtype), subject.settings, list(range(batch))
    condition = subject.conditions[torch.arange(batch) % len(subject.conditions)]
    chosen = {
        (kind, fixed): make(row_invariant=fixed, **settings)
        for kind, make in {
            "next token": NextTokenSampler,
            "Jacobi W=32": lambda **rest: SpeculativeJacobiSampler(window=32, **rest),
            "Jacobi W=auto": lambda **rest: SpeculativeJacobiSampler(window="auto", **rest),
        }.items()
        for fixed in (False, True)
    }
    seconds: dict[Any, list[float]] = {key: [] for key in chosen}
    codes = {}
    for number in range(rounds):
        for key in list(chosen) if number % 2 == 0 else list(reversed(chosen)):
            start = time.process_time()
            codes[key] = chosen[key].sample(backbone, condition, seeds=seeds).codes
            seconds[key].append(time.process_time() - start)
    first = seconds["next token", False]
    share = share_of_the_controller(backbone, condition, settings, seeds)
    rows = []
    for (kind, fixed), values in seconds.items():
        wanted = codes["next token", fixed]
        rows.append(
            {
                "model": subject.title,
                "dtype": str(dtype).removeprefix("torch."),
                "batch": batch,
                "sampler": kind,
                "row_invariant": fixed,
                "same": bool(torch.equal(codes[kind, fixed], wanted)),
                "codes that differ": int((codes[kind, fixed] != wanted).sum()),
                "time ratio": round(median(a / b for a, b in zip(values, first, strict=True)), 3),
                "share of the controller": round(share, 4) if kind.endswith("auto") and not fixed else None,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="heroes32-llamagen")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    arguments = parser.parse_args()
    pin_to_core(arguments.core)
    rows: list[dict[str, Any]] = []
    for batch in arguments.batches:
        for dtype in (torch.float32, torch.bfloat16):
            rows += measure(arguments.model, dtype, batch, arguments.rounds)
            write_json("row-invariant", report(rows=rows))
    print(table(rows))


if __name__ == "__main__":
    main()
