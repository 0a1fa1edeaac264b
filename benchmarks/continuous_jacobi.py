"""Continuous tokens without a drafter: passes, distance to next-token's tokens, and seconds against next-token decoding.

Three questions of ``ContinuousJacobiSampler`` on a causal model of continuous tokens, float32, one thread: how many forward passes an
image needs by window and tolerance, how far its tokens are from those of next-token decoding with the same seeds (the largest
number over all tokens of all images), and the processor time by batch. Times are medians of paired turns: each turn runs all
candidates one after the other, next-token twice (its ratio to itself is the noise).

    python benchmarks/continuous_jacobi.py --images 64
    python benchmarks/continuous_jacobi.py --images 2 --turns 1 --batches 1     # shows that it runs
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from _common import RESULTS, pin_to_core, report, table, write_json

from vargen.metrics.heroes import draw_heroes
from vargen.samplers.window.continuous_jacobi import ContinuousJacobiSampler
from vargen.samplers.window.continuous_speculative import ContinuousSpeculativeSampler
from vargen.training.tasks.mar import load_continuous

GUIDANCE = {"guidance_scale": 1.5, "guidance_schedule": "constant"}
SETTINGS = [(32, 1e-4), (64, 1e-3), (64, 1e-4), (64, 1e-5)]


def accuracy(model: Any, attributes: torch.Tensor, temperature: float, batch: int) -> list[dict[str, Any]]:
    """Passes and distances of every setting, over batches of so many images."""
    starts = range(0, len(attributes), batch)

    def drawn(sampler: Any) -> list[Any]:
        parts = [(attributes[s : s + batch], range(s, min(s + batch, len(attributes)))) for s in starts]
        return [sampler.sample(model, part, seeds=seeds) for part, seeds in parts]

    plain = ContinuousSpeculativeSampler(num_draft_tokens=0, temperature=temperature, **GUIDANCE)
    expected = torch.cat([out.latents for out in drawn(plain)])
    rows = []
    for window, tolerance in SETTINGS:
        sampler = ContinuousJacobiSampler(window=window, tolerance=tolerance, temperature=temperature, **GUIDANCE)
        outs = drawn(sampler)
        distance = (torch.cat([out.latents for out in outs]) - expected).abs().flatten(1).amax(1)
        passes = torch.cat([out.stats.forwards_per_image for out in outs]).double()
        rows.append(
            {
                "temperature": temperature,
                "window": window,
                "tolerance": tolerance,
                "forwards": round(float(passes.mean()), 2),
                "most forwards": int(passes.max()),
                "largest change let pass": max(out.stats.extra["largest_change"] for out in outs),
                "largest distance": float(distance.max()),
                "median distance": float(distance.median()),
                "head rows": round(sum(out.stats.num_head_rows for out in outs) / len(attributes), 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


def seconds(model: Any, attributes: torch.Tensor, batch: int, turns: int) -> dict[str, Any]:
    """Processor seconds of next-token and ratios to it, medians over paired turns."""
    shared = {"temperature": 0.25, **GUIDANCE}
    plain = ContinuousSpeculativeSampler(num_draft_tokens=0, **shared)
    candidates: dict[str, Any] = {"next-token": plain, "again": plain}
    candidates |= {f"window {w}": ContinuousJacobiSampler(window=w, **shared) for w in ("auto", "by-batch")}
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    widths: list[int] = []
    for turn in range(turns + 1):
        for name, sampler in candidates.items():
            start = time.process_time()
            out = sampler.sample(model, attributes[:batch], seeds=range(turn * batch, (turn + 1) * batch))
            if turn:  # the first warms up
                taken[name].append(time.process_time() - start)
            widths = out.stats.widths if name == "window auto" else widths
    ratio = {name: [t / p for t, p in zip(taken[name], taken["next-token"], strict=True)] for name in candidates}
    row = {"batch": batch, "next-token s": round(statistics.median(taken["next-token"]), 4)}
    row |= {name: round(statistics.median(values), 3) for name, values in ratio.items() if name != "next-token"}
    print(row, widths, flush=True)
    return row | {"widths of auto": widths}


def main() -> None:
    """Run the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--causal", default="heroes32-mar-causal", help="run, pipeline folder or shipped model")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="images drawn together for the distances")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument(
        "--only", choices=("seconds", "accuracy"), help="measure one table, take the other from the recording"
    )
    parser.add_argument("--core", type=int, default=0)
    options = parser.parse_args()
    pin_to_core(options.core)
    model = load_continuous(options.causal)
    attributes = torch.as_tensor(np.asarray(draw_heroes(max(options.images, 8), "reference").attributes))
    file = RESULTS / "continuous_jacobi.json"
    known = json.loads(file.read_text()) if options.only else {}
    timed, near = known.get("seconds", []), known.get("accuracy", [])
    if options.only != "accuracy":
        timed = [seconds(model, attributes, batch, options.turns) for batch in options.batches]
    if options.only != "seconds":
        few = attributes[: options.images]
        near = [row for t in (0.25, 1.0) for row in accuracy(model, few, t, options.batch)]
    print(table([{k: v for k, v in row.items() if k != "widths of auto"} for row in timed]), table(near), sep="\n")
    path = write_json("continuous_jacobi", report(seconds=timed, accuracy=near, images=options.images))
    print(path)


if __name__ == "__main__":
    main()
