"""Whole images on a CUDA device: LlamaGen sizes with random weights, next-token and Jacobi, beside the memory's limit.

Random weights say nothing about how many drafts pass, so the Jacobi rows report seconds a forward pass; codes per
forward come from trained models (`benchmarks/speculative.py`). The limit is the time to read all weights but the
embedding tables and the mean filled cache once, at the bandwidth of a device copy measured in the same run.

    python benchmarks/decode_gpu.py

Every sampler runs iteration by iteration, as CUDA graphs of whole iterations, and so with the blocks through
torch.compile. The times of an image include what the graph costs: two plain iterations and one capture. Untested on a
GPU so far.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from itertools import product
from typing import Any

import torch
from _common import report, table, write_json
from acceptance_kernel import copy_bandwidth, graph_seconds
from next_token import compiled_copy

from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.outputs import DecodeStats
from vargen.samplers.window.decoder import WindowSampler
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler

GRID = (16, 16)
REPEATS = 3
SETTINGS = {"guidance_scale": 2.0, "top_k": 2000}


def samplers() -> dict[str, WindowSampler]:
    """What is timed."""
    return {
        "next token": NextTokenSampler(**SETTINGS),
        "Jacobi gumbel W=16": SpeculativeJacobiSampler(window=16, **SETTINGS),
        "Jacobi maximal W=32": SpeculativeJacobiSampler(window=32, carry="maximal", **SETTINGS),
    }


def seconds_of(
    sampler: WindowSampler, model: LlamaGenTransformer, batch: int, graph: bool
) -> tuple[float, DecodeStats]:
    """Median seconds of a batch of images, and the statistics of the last run."""
    labels, times = torch.full((batch,), 207, device="cuda"), []
    for index in range(REPEATS + 1):  # the first one compiles kernels
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = sampler.sample(model, labels, seeds=list(range(batch)), cuda_graph=None if graph else False)
        torch.cuda.synchronize()
        if index:
            times.append(time.perf_counter() - start)
    return statistics.median(times), out.stats


def bare_seconds(model: LlamaGenTransformer, batch: int, window: int) -> float:
    """Seconds of a forward pass alone, captured in a CUDA graph: what an iteration is compared with."""
    prepared = model.prepare(torch.full((batch,), 207, device="cuda"), guidance_scale=SETTINGS["guidance_scale"])
    session, _ = model.open(prepared, max_window=window, static=True)
    codes = torch.zeros(batch, window, dtype=torch.int64, device="cuda")
    with torch.no_grad():
        return graph_seconds([lambda: model.step(session, codes)])


def step_limit(model: LlamaGenTransformer, batch: int, bandwidth: float) -> float:
    """Seconds to read what a step must read."""
    tables = model.tok_embeddings.weight.numel() + model.cls_embedding.embedding_table.weight.numel()
    weights = sum(parameter.numel() for parameter in model.parameters()) - tables
    cache = 2 * len(model.layers) * 2 * batch * (GRID[0] * GRID[1] // 2) * model.config.dim
    return 2 * (weights + cache) / (bandwidth / 2)  # a copy moves every byte twice


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["B", "XL"], help="LlamaGen sizes")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which nothing new is started")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("no CUDA device here; benchmarks/next_token.py and speculative.py run on a CPU\n")
        return 1
    bandwidth, started, skipped = copy_bandwidth(), time.monotonic(), []
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes:
        torch.manual_seed(0)
        model = LlamaGenTransformer.from_size(size, grid_size=GRID).eval().requires_grad_(False)
        torch.nn.init.normal_(model.output.weight, std=0.02)
        model = model.to("cuda", torch.bfloat16)
        ways = {"eager": model, "CUDA graph": model, "CUDA graph, compiled blocks": compiled_copy(model)}
        for batch in arguments.batches:
            for (name, sampler), (way, run) in product(samplers().items(), ways.items()):
                if time.monotonic() - started > arguments.limit:
                    skipped.append([size, batch, name, way])
                    continue
                seconds, stats = seconds_of(sampler, run, batch, graph=way != "eager")
                step = seconds / stats.num_forwards
                rows.append(
                    {
                        "model": f"LlamaGen-{size}",
                        "batch": batch,
                        "sampler": name,
                        "way": way,
                        "images/s": batch / seconds,
                        "ms/forward": 1e3 * step,
                        "over the bare forward": step / bare_seconds(run, batch, sampler.num_rows),
                        "of the limit": step_limit(model, batch, bandwidth) / step,
                        "replays": stats.extra.get("graph_replays", 0),
                        "notes": "; ".join(stats.notes),
                    }
                )
                sys.stdout.write(table(rows[-1:]) + "\n")
                sys.stdout.flush()
    results = {"settings": {**SETTINGS, "grid": GRID, "dtype": "bfloat16"}, "rows": rows, "skipped_for_time": skipped}
    path = write_json("decode_gpu", report(copy_bytes_per_second=bandwidth, **results))
    sys.stdout.write(f"{table(rows)}\nwritten to {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
