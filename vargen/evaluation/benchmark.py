"""Samplers on one model, side by side: quality against forwards and seconds.

Every sampler draws the same images (same prompts, same seeds). Quality and forwards come from an evaluation run a
sampler, which can be stopped and continued; times come from one process in which the samplers take turns, so that drift
of the machine hits all of them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from vargen.evaluation.conditions import Conditions, hero_conditions
from vargen.evaluation.evaluate import evaluate_fid, sampler_record
from vargen.evaluation.features import Progress
from vargen.evaluation.report import environment, read_report
from vargen.files import atomic_write, make_folder
from vargen.metrics.networks.registry import FeatureNetwork
from vargen.registry import fitting_samplers, swap_sampler
from vargen.validation.extras import extra
from vargen.validation.printable import printable, shown
from vargen.validation.reading import read_json, read_value

with extra("eval", "a benchmark"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

if TYPE_CHECKING:
    from vargen.pipelines.image import ImagePipeline
    from vargen.pipelines.outputs import ImagePipelineOutput
    from vargen.samplers.base import Sampler

REPORT = "bench.json"
MAX_BATCH, MAX_REPEATS = 4096, 1000
_COLUMNS = ("sampler", "guarantee", "forwards an image", "mean of", "fewer")


@dataclass(kw_only=True)
class BenchRow:
    """What one sampler did."""

    name: str  # as it was asked for: "jacobi:window=16"
    sampler: dict[str, Any]  # class and settings
    guarantee: str
    forwards: float  # of the backbone, an image, in the quality run or, without one, of the largest batch
    seconds: dict[int, float]  # batch size -> seconds an image, median over the repeats
    metric: str = ""  # name of the distance
    distance: float | None = None
    distance_error: float | None = None  # standard error
    attribute_share: float | None = None  # heroes: attribute accuracy over the classifier's own
    notes: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class BenchReport:
    """Rows of one model; the first is the baseline of every ratio."""

    model: str
    num_images: int  # of the quality runs
    repeats: int
    floor: float | None
    skipped: dict[str, str]  # sampler -> why it could not run
    environment: dict[str, Any]
    rows: list[BenchRow]

    def write(self, folder: str | Path) -> None:
        """Write ``bench.json``, ``bench.md`` and ``bench.png``."""
        path = Path(folder)
        make_folder(path)
        with atomic_write(path / "bench.png", overwrite=True) as beside:
            trade_off(self).savefig(beside, dpi=110)
        with atomic_write(path / REPORT, overwrite=True) as beside:
            beside.write_text(json.dumps(asdict(self), indent=1) + "\n")
        with atomic_write(path / "bench.md", overwrite=True) as beside:
            beside.write_text(bench_page(self))


def bench(
    pipe: ImagePipeline,
    out: str | Path,
    *,
    samplers: Sequence[str] | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    num: int = 512,
    repeats: int = 3,
    conditions: Conditions | None = None,
    reference: str | Path = "heroes",
    network: str | FeatureNetwork = "lite0",
    seed: int = 0,
    model: str = "",
    progress: Progress | None = None,
) -> BenchReport:
    """Measure samplers on the model of a pipeline.

    Args:
        pipe: an ``ImagePipeline``; its own sampler gives the settings that the others share.
        out: folder for the report and the evaluation runs; a stopped bench goes on there.
        samplers: names with settings, such as ``"jacobi"`` or ``"jacobi:window=16,carry=maximal"``; the first is the
            baseline. Default: every sampler that fits, in the registry's order.
        batch_sizes: images decoded together when time is taken.
        num: images of the quality runs; 0 leaves them out.
        repeats: timed rounds.
        conditions: what to draw; default: captions of fresh test heroes.
        reference, network: of the distance, see ``evaluate_fid``.
        seed: image i uses ``seed + i``.
        model: name for the report.
        progress: called as the work goes on.

    Raises:
        ValueError: unknown or unfit sampler, no batch size, or a setting that does not exist.
    """
    if not batch_sizes or min(batch_sizes) < 1 or repeats < 1:
        raise ValueError(f"batch sizes and repeats must be at least 1, got {list(batch_sizes)} and {repeats}")
    if max(batch_sizes) > MAX_BATCH or repeats > MAX_REPEATS:
        wrong = shown(max(batch_sizes)) if max(batch_sizes) > MAX_BATCH else shown(repeats)
        raise ValueError(f"at most {MAX_BATCH:,} images are timed together and {MAX_REPEATS:,} times, got {wrong}")
    if num == 1 or num < 0:
        raise ValueError(f"num must be 0 or at least 2, got {num}; distances need a covariance")
    largest = max(batch_sizes)
    conditions = conditions or hero_conditions(max(num, largest))
    own = pipe.sampler
    chosen = {name: read_sampler(name, pipe) for name in samplers or fitting_samplers(pipe.backbone)}
    usable, skipped = {}, {}
    for name, sampler in chosen.items():
        try:
            _call(pipe, sampler, conditions, 1, seed)
            usable[name] = sampler
        except ValueError as error:
            if samplers:
                raise
            skipped[name] = str(error)
    try:
        seconds, forwards = _times(pipe, usable, conditions, batch_sizes, repeats, seed, progress)
        rows = [_row(name, sampler, seconds[name], forwards[name]) for name, sampler in usable.items()]
        floor = None
        for row, sampler in zip(rows, usable.values(), strict=True):
            if num:
                pipe.sampler = sampler
                folder = Path(out) / "runs" / _file_name(row.name)
                evaluate_fid(
                    pipe, folder, num=num, reference=reference, conditions=conditions.first(num), network=network,
                    seed=seed, model=model, interval=num >= 40, progress=progress,
                )  # fmt: skip
                floor = _add_quality(row, read_report(folder))
    finally:
        pipe.sampler = own
    report = BenchReport(
        model=model, num_images=num, repeats=repeats, floor=floor, skipped=skipped,
        environment=environment(pipe), rows=rows,
    )  # fmt: skip
    report.write(out)
    return report


def read_sampler(text: str, pipe: ImagePipeline) -> Sampler:
    """Return the sampler of a text such as ``"jacobi:window=16,carry=maximal"`` for a pipeline.

    Settings that it shares with the pipeline's own sampler, such as guidance, are taken over.
    """
    name, _, settings = text.partition(":")
    sampler = swap_sampler(pipe.sampler, name, pipe.backbone)
    values: dict[str, Any] = {}
    for pair in filter(None, settings.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"settings of a sampler are given as name=value, got {pair!r} in {text!r}")
        values[key.strip()] = read_value(value)
    return sampler.replace(**values) if values else sampler


def read_bench(path: str | Path) -> BenchReport:
    """Read a ``bench.json``, or the one in a folder.

    Raises:
        ValueError: no such file, or not a bench report.
    """
    file = Path(path) / REPORT if Path(path).is_dir() else Path(path)
    try:
        record = read_json(file)
        rows = [
            BenchRow(**{**row, "seconds": {int(k): v for k, v in row["seconds"].items()}})
            for row in record.pop("rows")
        ]
        report = BenchReport(**record, rows=rows)
        bench_page(report)  # every entry that a page shows is there and of its type
        return report
    except (LookupError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        name, reason = printable(file), printable(error)
        raise ValueError(f"{name} is not a report of vargen bench: {reason}; write one with vargen bench") from error


def bench_page(report: BenchReport) -> str:
    """Return the Markdown page of a report."""
    where = report.environment
    lines = [f"# {report.model or 'model'}: samplers side by side", ""]
    lines += [
        f"Measured {where['date']} on {where['hardware']}, vargen {where['vargen']}, torch {where['torch']}.",
        "",
    ]
    lines += [f"Median of {report.repeats} interleaved rounds; ratios are to the first row."]
    if report.num_images:
        floor = f"; real images score {report.floor:.3g} against real images" if report.floor is not None else ""
        lines += [f"Quality of {report.num_images} images a sampler, the same prompts and seeds for all{floor}."]
    lines += ["", *bench_table([report], with_model=False), ""]
    for name, reason in report.skipped.items():
        lines += [f"- {name} was not run: {reason}"]
    return "\n".join([*lines, "", "![trade-off](bench.png)", ""])


def bench_table(reports: Sequence[BenchReport], *, with_model: bool = True) -> list[str]:
    """Return the lines of one Markdown table over the rows of several reports.

    Args:
        reports: of ``bench`` or ``read_bench``.
        with_model: whether the first column names the model.
    """
    batches = sorted({batch for report in reports for row in report.rows for batch in row.seconds})
    metric = next((row.metric for report in reports for row in report.rows if row.metric), "distance")
    names = [*(["model"] if with_model else []), *_COLUMNS]
    names += [f"s/image, batch {batch} (ratio)" for batch in batches] + [metric, "attributes"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for report in reports:
        base = report.rows[0]
        for row in report.rows:
            cells = [report.model] if with_model else []
            pictures = report.num_images or max(row.seconds)  # without quality runs: those of the largest batch
            cells += [row.name, row.guarantee, f"{row.forwards:.1f}", str(pictures)]
            cells.append(f"{base.forwards / row.forwards:.1f}x")
            for batch in batches:
                own, first = row.seconds.get(batch), base.seconds.get(batch)
                cells.append(f"{own:.3g} ({first / own:.2f}x)" if own and first else "-")
            error = f" ± {1.96 * row.distance_error:.2g}" if row.distance_error is not None else ""
            cells.append(f"{row.distance:.3g}{error}" if row.distance is not None else "-")
            cells.append(f"{row.attribute_share:.1%}" if row.attribute_share is not None else "-")
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def trade_off(report: BenchReport) -> Figure:
    """Draw distance (or, without one, seconds) against forwards, and seconds an image against the batch size."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    smallest = min(report.rows[0].seconds)
    measured = all(row.distance is not None for row in report.rows)
    for row in report.rows:
        height = row.distance if measured else row.seconds[smallest]
        error = 1.96 * row.distance_error if measured and row.distance_error is not None else None
        line = left.errorbar(row.forwards, height, yerr=error, fmt="o", capsize=3, label=row.name)
        batches = sorted(row.seconds)
        right.plot(batches, [row.seconds[b] for b in batches], "o-", color=line[0].get_color(), label=row.name)
    if measured and report.floor is not None:
        left.axhline(report.floor, color="0.6", linestyle=":", label="real images")
    left.set_xscale("log")
    left.set_xlabel("forward passes an image")
    left.set_ylabel(report.rows[0].metric if measured else f"seconds an image, batch {smallest}")
    right.set(xscale="log", yscale="log", xlabel="batch size", ylabel="seconds an image")
    right.set_xticks(sorted(report.rows[0].seconds), [str(b) for b in sorted(report.rows[0].seconds)])
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    for axis in (left.xaxis, right.xaxis):
        axis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter("{x:g}")  # plain numbers, not powers of ten
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    left.legend(fontsize=7, frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report.model or 'model'} on {report.environment['hardware']}", fontsize=10)
    return figure


def _times(
    pipe: ImagePipeline,
    samplers: dict[str, Sampler],
    conditions: Conditions,
    batch_sizes: Sequence[int],
    repeats: int,
    seed: int,
    progress: Progress | None,
) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Return seconds an image by sampler and batch size, and forwards an image, mean over the largest batch."""
    seconds: dict[str, dict[int, float]] = {name: {} for name in samplers}
    forwards: dict[str, float] = {}
    done, total = 0, len(batch_sizes) * repeats * len(samplers)
    for batch in sorted(batch_sizes):
        taken: dict[str, list[float]] = {name: [] for name in samplers}
        for _ in range(repeats):
            for name, sampler in samplers.items():
                begun = time.perf_counter()
                stats = _call(pipe, sampler, conditions, batch, seed).stats
                taken[name].append((time.perf_counter() - begun) / batch)
                each = stats.forwards_per_image
                forwards[name] = stats.num_forwards if each is None else float(each.double().mean())
                done += 1
                if progress is not None:
                    progress("timing", done, total)
        for name, values in taken.items():
            seconds[name][batch] = statistics.median(values)
    return seconds, forwards


def _call(pipe: ImagePipeline, sampler: Sampler, conditions: Conditions, batch: int, seed: int) -> ImagePipelineOutput:
    pipe.sampler = sampler
    arguments = conditions.arguments(0, batch)
    given = next(iter(arguments.values()))
    arguments = {name: [given[i % len(given)] for i in range(batch)] for name in arguments}
    seeds = [seed + i for i in range(batch)]
    output = cast("ImagePipelineOutput", pipe(**arguments, seed=seeds, output_type="codes"))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return output


def _row(name: str, sampler: Sampler, seconds: dict[int, float], forwards: float) -> BenchRow:
    record = sampler_record(sampler)
    return BenchRow(name=name, sampler=record, guarantee=str(sampler.guarantee), forwards=forwards, seconds=seconds)


def _add_quality(row: BenchRow, report: dict[str, Any]) -> float | None:
    """Fill a row from the report of its quality run; return the floor."""
    distance, decode = report["results"][0], report["decode"]
    row.metric, row.distance, row.distance_error = distance["metric"], distance["value"], distance.get("error")
    row.forwards = decode["forwards_per_image"] or row.forwards
    row.guarantee, row.notes = decode["guarantee"], decode["notes"]
    if report.get("attributes"):
        row.attribute_share = report["attributes"]["share"]
    return distance.get("floor")


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
