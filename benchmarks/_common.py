"""What every benchmark shares: the machine and the versions it ran on, medians, JSON written beside and renamed."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a tree that is not installed; every benchmark imports this module first
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "diffusers", "transformers", "triton", "numpy")


def pin_to_core(core: int) -> None:
    """Keep this process on one core, with one thread, so that repeats are comparable. No effect outside Linux."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {core if core in allowed else allowed[-1]})
    torch.set_num_threads(1)


def machine() -> dict[str, Any]:
    """Describe the hardware: processor, cores, memory, and the accelerator where there is one."""
    found: dict[str, Any] = {
        "processor": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if hasattr(os, "sysconf"):
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if hasattr(os, "getloadavg"):
        found["load_average"] = round(os.getloadavg()[0], 2)  # above 1 on a pinned run: the numbers are noisy
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["accelerator"] = properties.name
        found["accelerator_memory_gib"] = round(properties.total_memory / 2**30, 1)
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Short hash of the commit, with `+changes` where tracked files differ from it; empty outside a clone."""
    run = {"cwd": ROOT, "capture_output": True, "text": True}
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=True, **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], check=True, **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{head}+changes" if changed else head


def report(**results: Any) -> dict[str, Any]:
    """Wrap results with the date, the commit, the machine and the versions."""
    stamp = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }
    return {**stamp, **results}


def write_json(name: str, content: dict[str, Any]) -> Path:
    """Write `benchmarks/results/<name>.json`; an interrupted write leaves the earlier file whole."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / f"{name}.json"
    beside = target.with_suffix(".json.part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(target)
    return target


def interleaved_medians(
    candidates: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each candidate; the candidates take turns, so drift of the machine hits all of them.

    One untimed round comes first. Every candidate must be safe to call again and again. `clock=time.process_time` leaves
    out the time in which other processes had the core; it is right for one thread only.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate()
    for _ in range(repeats):
        for name, candidate in candidates.items():
            start = clock()
            candidate()
            seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def read_bandwidth(num_bytes: int = 2**28, repeats: int = 7) -> float:
    """Bytes a second that one pass of a matrix-vector product over `num_bytes` of float32 weights reaches."""
    columns = 1024
    weights = torch.ones(num_bytes // (4 * columns), columns)
    vector = torch.ones(columns)
    seconds = interleaved_medians({"read": lambda: torch.mv(weights, vector)}, repeats, time.process_time)["read"]
    return weights.numel() * 4 / seconds


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Lay out rows as a plain text table; the columns are the keys of the first row."""
    rows = list(rows)
    names = list(rows[0])
    cells = [names, *[[_cell(row.get(name, "")) for name in names] for row in rows]]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
