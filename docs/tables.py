"""Tables of measured numbers that README and pages show: recordings and cards in, rows of text out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "vargen" / "assets" / "models"
BENCHES = ("llamagen", "llamagen-more", "nar", "var", "mar", "mar-causal")
Rows = list[list[str]]

ORDERS = {  # shipped model -> how it draws
    "heroes32-llamagen, next-token": "256 codes in raster order",
    "heroes32-llamagen": "the same codes, guessed and checked",
    "heroes32-var": "five scales",
    "heroes32-nar": "31 diagonals of codes",
    "heroes32-mar": "64 continuous tokens, masked",
    "heroes32-mar-causal": "64 continuous tokens in raster order, guessed and checked",
}
CONTINUOUS = {  # name in the recording -> in the table
    "next-token": "causal, next-token",
    "exact, gamma 4": "causal, exact speculation, gamma 4",
    "next-token, early end": "next-token, chains end early",
    "exact, gamma 4, early end": "exact speculation, chains end early",
}


def recording(name: str) -> dict[str, Any]:
    """Read a file of benchmarks/results."""
    content: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return content


def told(record: dict[str, Any], *commands: str) -> str:
    """Where numbers come from: the commands that make them, machine and day."""
    machine = record["machine"]
    made = ", ".join(f"<code>python {command}</code>" for command in commands)
    return f"{made}; {machine['processor']}, {machine['threads']} thread, torch {record['versions']['torch']}, {record['date']}."


def times() -> tuple[Rows, str]:
    """What a picture of each shipped model costs, beside next-token sampling."""
    record = recording("shipped")
    rows = {(row["model"], row["batch"]): row for row in record["rows"]}
    found: Rows = [["model", "drawn as", "forwards", "time, batch 1", "time, batch 16"]]
    for name, order in ORDERS.items():
        one, many = rows[name, 1], rows[name, 16]
        forwards = f"{one['forwards']:.1f}".removesuffix(".0")
        label = name.replace("heroes32-llamagen, next-token", "`heroes32-llamagen`, next-token")
        label = f"`{label}`" if label.startswith("heroes32") else label
        found.append([label, order, forwards, *(_time(row, many=row is many) for row in (one, many))])
    return found, ""


def _time(row: dict[str, Any], *, many: bool) -> str:
    low, high = row["fastest round"], row["slowest round"]
    digits = 3 if many else 2
    return f"{row['time ratio']:.2f} ({low:.{digits}f} to {high:.{digits}f} s)"


def quality() -> tuple[Rows, str]:
    """The shipped models, from their cards: distance with captions and with full captions, parts, size."""
    found: Rows = [["model", "FD-Lite0-112, captions", "full captions", "parts recognised, captions", "full", "size"]]
    for name in ORDERS:
        folder = MODELS / name
        if not folder.is_dir():
            continue
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        card = f"[`{name}`](vargen/assets/models/{name}/README.md)"
        measured = generations((folder / "README.md").read_text(encoding="utf-8"))
        both = [measured.get(kind) for kind in ("captions", "full captions")]
        distances = [f"{m['distance']} (floor {m['floor']})" if m else "-" for m in both]
        shares = [f"{m['share']} %" if m else "-" for m in both]
        found.append([card, *distances, *shares, f"{size:.1f} MB"])
    return found, ""


def generations(card: str) -> dict[str, dict[str, str]]:
    """The sections "Generation" of a card: by captions, what they measured."""
    found = {}
    for section in card.split("### Generation\n")[1:]:
        kind = re.search(r"- conditions: (full )?captions", section)
        distance = re.search(
            r"\| FD-Lite0-112 \| ([\d.]+)(?: \(95 % interval ([\d.]+) to ([\d.]+)\))?[^|]*\| ([\d.]+)", section
        )
        share = re.search(r"Attribute accuracy: ([\d.]+)%", section)
        if kind and distance and share:
            value, low, high, floor = (text and f"{float(text):.1f}" for text in distance.groups())
            shown = f"{value} ({low} to {high})" if low else str(value)
            row = {"distance": shown, "floor": str(floor), "share": share[1]}
            found["full captions" if kind[1] else "captions"] = row
    return found


def bench() -> tuple[Rows, str]:
    """Every model with every sampler that fits it."""
    from vargen.evaluation.benchmark import bench_table, read_bench

    folder = ROOT / "benchmarks" / "results" / "bench"
    header, _, *rows = bench_table([read_bench(folder / name) for name in BENCHES])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)], ""


def continuous() -> tuple[Rows, str]:
    """Ways to draw continuous tokens."""
    record = recording("continuous")
    found: Rows = [
        ["method", "forwards", "head rows", "drafter's", "accepted", "ms an image", "guarantee", "FD-Lite0-112"]
    ]
    for row in record["rows"]:
        drafted, accepted = row["draft head rows an image"], row["accepted"]
        found.append(
            [
                CONTINUOUS.get(row["method"], row["method"]),
                f"{row['forwards an image']:.0f}",
                f"{row['head rows an image']:,.0f}",
                f"{drafted:,.0f}" if drafted else "",
                "" if accepted is None else f"{accepted:.0%}".replace("%", " %"),
                f"{row['ms an image']:.0f}",
                row["guarantee"],
                f"{row['FD-Lite0-112']:.1f}",
            ]
        )
    note = (
        f"Two independent sets of {record['images']} real heroes score {record['floor']:.1f}; rows can lie below it, because their "
        "pictures have the reference's own attributes. "
    )
    return found, note + told(
        record, f"benchmarks/continuous.py --images {record['images']} --temperature {record['temperature']}"
    )
