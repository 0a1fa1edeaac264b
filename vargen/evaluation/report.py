"""One JSON, one page and one sheet of samples for an evaluation."""

from __future__ import annotations

import datetime
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import vargen
from vargen.files import atomic_write, make_folder
from vargen.validation.printable import printable
from vargen.validation.reading import read_json

KINDS = ("fid", "compare", "reconstruction", "likelihood")


@dataclass(kw_only=True)
class Report:
    """An evaluation: what was measured, how, where and when; every entry is a plain JSON value."""

    kind: str  # one of KINDS
    subject: dict[str, Any]  # model and sampler, or image sets
    protocol: dict[str, Any]
    results: list[dict[str, Any]]  # of MetricResult.to_dict, ReconstructionResult.to_dict, ...
    environment: dict[str, Any]
    attributes: dict[str, Any] | None = None
    decode: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def write(self, folder: str | Path, *, grid: Tensor | None = None, captions: list[str] | None = None) -> None:
        """Write ``report.json``, ``report.md`` and, with images, ``grid.png``.

        Args:
            folder: created where it is missing; files of an earlier report are replaced.
            grid: uint8 ``[n, 3, H, W]`` samples for the sheet.
            captions: one text a sample, in the JSON.
        """
        path = Path(folder)
        make_folder(path)
        record = self.to_dict() | ({"sample_captions": captions[: len(grid)]} if captions and grid is not None else {})
        if grid is not None:
            with atomic_write(path / "grid.png", overwrite=True) as beside:
                sample_sheet(grid).save(beside)
        with atomic_write(path / "report.json", overwrite=True) as beside:
            beside.write_text(json.dumps(record, indent=1) + "\n")
        with atomic_write(path / "report.md", overwrite=True) as beside:
            beside.write_text(markdown(record, has_grid=grid is not None))


def read_report(path: str | Path) -> dict[str, Any]:
    """Read a ``report.json``, or the one in a folder.

    Raises:
        ValueError: no such file, or not a report.
    """
    file = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
    name = printable(file)
    try:
        record = read_json(file)
    except ValueError as error:
        raise ValueError(f"{name} is not a readable report: {error}; write one with vargen eval") from error
    if not isinstance(record, dict) or record.get("kind") not in KINDS or not isinstance(record.get("results"), list):
        raise ValueError(f"{name} is not a report of vargen eval: it has no kind and results")
    try:
        markdown(record, has_grid=False)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        missing = printable(f"{type(error).__name__}: {error}")
        raise ValueError(f"{name} is not a complete report of vargen eval ({missing}); write it again") from error
    return record


def environment(pipe: Any) -> dict[str, Any]:
    """Return date, versions and hardware; ``pipe`` tells the device."""
    device = torch.device(getattr(pipe, "device", None) or "cpu")
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"CPU ({_processor()}, {torch.get_num_threads()} threads)"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": hardware,
        "vargen": vargen.__version__,
        "torch": torch.__version__,
    }


def sample_sheet(images: Tensor, columns: int = 8) -> Image.Image:
    """Put uint8 ``[n, 3, H, W]`` images on one sheet."""
    from vargen.pipelines.grid import image_grid

    pictures = [Image.fromarray(x) for x in images.permute(0, 2, 3, 1).cpu().numpy()]
    side = max(images.shape[2:])
    return image_grid(pictures, columns=columns, scale=2 if side <= 64 else 1)


def markdown(record: dict[str, Any], *, has_grid: bool) -> str:
    """Write the page."""
    lines = [f"# Evaluation: {record['kind']}", ""]
    for title in ("subject", "protocol", "environment"):
        lines += [
            f"- **{name}**: {_plain(value)}" for name, value in record[title].items() if value not in (None, "", {})
        ]
    lines += ["", *metric_table(record["results"])]
    if record.get("attributes"):
        lines += ["", "## Attribute accuracy", "", *attribute_table(record["attributes"])]
    if record.get("decode"):
        lines += ["", "## Decoding", ""]
        lines += [
            f"- {name.replace('_', ' ')}: {_plain(v)}" for name, v in record["decode"].items() if v not in (None, [])
        ]
    if has_grid:
        lines += ["", "## Samples", "", "The first images by seed, not chosen.", "", "![samples](grid.png)"]
    return "\n".join(lines) + "\n"


def metric_table(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of results; the floor is what real images score against real images."""
    rows = [r for r in results if "metric" in r]
    lines = []
    if rows:
        lines = ["| metric | value | floor | real | generated | protocol |", "|---|---|---|---|---|---|"]
        for row in rows:
            protocol = f"{row['network']} {row['tap']}, {row['resize']}, pixels {row['rounding']}"
            lines.append(
                f"| {row['metric']} | {_value(row)} | {_floor(row)} | {row['num_reference']} "
                f"| {row['num_generated']} | {protocol} |"
            )
        sets = {row["floor_sets"] for row in rows if row.get("floor_sets")}
        lines += ["", *(f"Floor: {text}." for text in sorted(sets))]
    for row in results:
        if "metric" not in row:
            lines += [
                f"- {name.replace('_', ' ')}: {_plain(value)}" for name, value in row.items() if _is_number(value)
            ]
    return lines


def attribute_table(attributes: dict[str, Any]) -> list[str]:
    """Return the lines that describe an ``AttributeResult``."""
    lines = [
        f"{attributes['share']:.1%} of the classifier's own accuracy: {attributes['accuracy']:.1%} of "
        f"{attributes['num_slots']} visible parts, real heroes of the same captions {attributes['real_accuracy']:.1%}; "
        f"with the captions of other images {attributes['shuffled_accuracy']:.1%}.",
        "",
        "| slot | generated | real | share | parts |",
        "|---|---|---|---|---|",
    ]
    for slot, row in attributes["per_slot"].items():
        lines.append(
            f"| {slot} | {row['accuracy']:.1%} | {row['real_accuracy']:.1%} | {row['share']:.1%} | {row['count']:.0f} |"
        )
    return lines


def _value(row: dict[str, Any]) -> str:
    text = _plain(row["value"])
    if "recall" in row:
        return f"{text} (recall {_plain(row['recall'])})"
    if row.get("std") is not None:
        text += f" ± {_plain(row['std'])}"
    if row.get("error") is not None:
        low, high = row["value"] - 1.96 * row["error"], row["value"] + 1.96 * row["error"]
        text += f" (95 % interval {_plain(low)} to {_plain(high)})"
    if row.get("infinity") is not None:
        error = f" ± {_plain(row['infinity_error'])}" if row.get("infinity_error") is not None else ""
        text += f" (N to infinity: {_plain(row['infinity'])}{error})"
    return text


def _floor(row: dict[str, Any]) -> str:
    if row.get("floor") is None:
        return "-"
    text = _plain(row["floor"])
    if row.get("floor_recall") is not None:
        text += f" (recall {_plain(row['floor_recall'])})"
    counts = row.get("floor_counts")
    return f"{text} ({counts[0]} against {counts[1]})" if counts else text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(_plain(v) for v in value)
    return str(value)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
