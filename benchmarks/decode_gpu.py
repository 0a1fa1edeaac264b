"""Whole images on a CUDA device: LlamaGen sizes with random weights, next-token and Jacobi, beside the memory's limit.

Random weights say nothing about how many drafts pass, so the Jacobi rows report seconds a forward pass; codes per
forward come from trained models (`benchmarks/speculative.py`). The limit is the time to read all weights but the
embedding tables and the mean filled cache once, at the bandwidth of a device copy measured in the same run.

    python benchmarks/decode_gpu.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from _common import report, table, write_json
from acceptance_kernel import copy_bandwidth

from vargen.backbones.llamagen import LlamaGenTransformer
from vargen.samplers.base import Sampler
from vargen.samplers.jacobi import SpeculativeJacobiSampler
from vargen.samplers.next_token import NextTokenSampler

GRID = (16, 16)
REPEATS = 3
SETTINGS = {"guidance_scale": 2.0, "top_k": 2000}


def samplers() -> dict[str, Sampler]:
    """What is timed."""
    return {
        "next token": NextTokenSampler(**SETTINGS),
        "Jacobi gumbel W=16": SpeculativeJacobiSampler(window=16, **SETTINGS),
        "Jacobi maximal W=32": SpeculativeJacobiSampler(window=32, carry="maximal", **SETTINGS),
    }


def seconds_of(sampler: Sampler, model: LlamaGenTransformer, batch: int) -> tuple[float, float]:
    """Median seconds of a batch of images, and forward passes of the slowest image."""
    labels, times, forwards = torch.full((batch,), 207, device="cuda"), [], 0.0
    for index in range(REPEATS + 1):  # the first one compiles kernels
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = sampler.sample(model, labels, seeds=list(range(batch)))
        torch.cuda.synchronize()
        if index:
            times.append(time.perf_counter() - start)
        forwards = float(out.stats.num_forwards)
    return statistics.median(times), forwards


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
        for batch in arguments.batches:
            for name, sampler in samplers().items():
                if time.monotonic() - started > arguments.limit:
                    skipped.append([size, batch, name])
                    continue
                seconds, forwards = seconds_of(sampler, model, batch)
                step = seconds / forwards
                rows.append(
                    {
                        "model": f"LlamaGen-{size}",
                        "batch": batch,
                        "sampler": name,
                        "images/s": batch / seconds,
                        "ms/forward": 1e3 * step,
                        "of the limit": step_limit(model, batch, bandwidth) / step,
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
