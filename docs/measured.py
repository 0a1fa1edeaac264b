"""Numbers in README and docs against the recordings that they come from.

Two ways to bring a measured number into a page, so that nobody types it twice:

- a table: ``<!-- table: NAME -->`` in docs becomes one when the site is built (``docs/hooks.py``); in the README, which is read as it
  is, the table stands between this line and ``<!-- end of table -->``, written by ``--write``;
- a sentence: an entry in ``docs/measured.toml`` with the words around the number, and where the number comes from.

A number of a README or a page that looks like a measurement (a decimal fraction, a percentage, a number with a unit) and is neither
in a table nor in an entry is an error: so is one that differs from its recording.

    python docs/measured.py            # check, one line a fault
    python docs/measured.py --write    # put what the recordings say into the pages, tables and sentences
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
LEDGER = ROOT / "docs" / "measured.toml"
RESULTS = ROOT / "benchmarks" / "results"
MODELS = ROOT / "vargen" / "assets" / "models"

TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.\-])\d[\d,]*(?:\.\d+)?(?!\w|\.\d|-[A-Za-z])(?:x\b)?|(?<![\w.\-])\d[\d,]*(?:\.\d+)?x\b")
UNIT = re.compile(
    r"\s?(?:%|x(?!\w| \d)|times\b|ms\b|s\b|seconds?\b|minutes?\b|hours?\b|[kMG]i?B\b|dB\b|nats?\b|passes\b|forwards?\b|images/s)"
)
MASKED = (  # what holds no measurement: code, addresses, comments
    re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL),
    re.compile(r"`[^`\n]*`"),
    re.compile(r"\]\([^)]*\)"),
    re.compile(r"https?://\S+"),
    re.compile(r"arXiv:\d{4}\.\d{4,5}"),
)


@dataclass(frozen=True)
class Entry:
    """A text of a page with the numbers that it holds."""

    page: str
    text: str  # ``{}`` where a number stands
    sources: tuple[str, ...]
    formats: tuple[str, ...]

    def pattern(self) -> re.Pattern[str]:
        """Find the text whatever its numbers and wherever its lines break."""
        words = r"\s+".join(re.escape(word) for word in self.text.split())
        return re.compile(words.replace(re.escape("{}"), r"(\d[\d,]*(?:\.\d+)?)"))

    def numbers(self) -> list[str]:
        """The numbers that the recordings say."""
        return [format(value(source), spec) for source, spec in zip(self.sources, self.formats, strict=True)]


@cache
def entries() -> tuple[list[Entry], dict[str, list[str]], dict[str, list[str]]]:
    """The ledger: measured texts, texts that are no measurements, and sections that are not looked at yet, by page."""
    ledger = tomllib.loads(LEDGER.read_text(encoding="utf-8"))
    found = []
    for item in ledger["measured"]:
        sources = item["from"] if isinstance(item["from"], list) else [item["from"]]
        formats = item["as"] if isinstance(item["as"], list) else [item["as"]] * len(sources)
        found.append(Entry(item["page"], item["text"], tuple(sources), tuple(formats)))
    return found, ledger["plain"], ledger.get("pending", {})


@cache
def value(source: str) -> float:
    """Number of a source.

    ``FILE: path`` reads JSON below benchmarks/results or models, its path made of keys and of ``[key=value;...]``, which picks
    the only row of a list; ``FILE.md ~ expression`` takes what the expression's group finds first; ``size: MODEL`` are the
    megabytes of a model folder. `` * N`` behind it multiplies, `` / SOURCE`` divides.

    Raises:
        ValueError: nothing of the kind is there.
    """
    if " / " in source:
        above, below = source.split(" / ", 1)
        return value(above) / value(below)
    if match := re.fullmatch(r"(.+) \* (\d+)", source):
        return value(match[1]) * int(match[2])
    if source.startswith("size: "):
        return sum(p.stat().st_size for p in (MODELS / source[6:]).rglob("*") if p.is_file()) / 1e6
    if " ~ " in source:
        file, expression = source.split(" ~ ", 1)
        found = re.search(expression, (MODELS / file).read_text(encoding="utf-8"))
        if not found:
            raise ValueError(f"measured.toml: {file} has no {expression!r}")
        return float(found[1].replace(",", ""))
    file, path = source.split(": ", 1)
    place = RESULTS / file if (RESULTS / file).is_file() else MODELS / file
    return float(_walk(json.loads(place.read_text(encoding="utf-8")), path, source))


def _walk(content: Any, path: str, source: str) -> Any:
    for name, condition in re.findall(r"([^.\[\]]+)|\[([^\]]*)\]", path):
        if name:
            content = content[name]
            continue
        wanted = dict(pair.split("=", 1) for pair in condition.split(";"))
        rows = [row for row in content if all(str(row.get(key)) == value for key, value in wanted.items())]
        if len(rows) != 1:
            raise ValueError(f"measured.toml: {source!r} picks {len(rows)} rows")
        content = rows[0]
    return content


def pages() -> dict[str, str]:
    """README and the pages of docs, by the name that the ledger gives them."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}


def faults(page: str, text: str) -> list[str]:
    """What is wrong with the numbers of a page, a line each."""
    measured, plain, pending = entries()
    found, covered = [], []
    for match in TABLE.finditer(text):
        covered.append(match.span())
        if match[3] != _block(match[2]):
            found.append(
                f"{page}: the table {match[2]} is not what the recordings say; run python docs/measured.py --write"
            )
    for entry in (entry for entry in measured if entry.page == page):
        matches = list(entry.pattern().finditer(text))
        if not matches:
            found.append(f"{page}: there is no {entry.text!r}; change docs/measured.toml with the page")
        for match in matches:
            covered.append(match.span())
            for stands, says, source in zip(match.groups(), entry.numbers(), entry.sources, strict=True):
                if stands.replace(",", "") != says:
                    found.append(f"{page}: {' '.join(match[0].split())!r} says {stands}, {source} says {says}")
    for words in plain.get(page, []):
        pattern = re.compile(r"\s+".join(re.escape(word) for word in words.split()))
        matches = list(pattern.finditer(text))
        if not matches:
            found.append(f"{page}: there is no {words!r}; take it out of docs/measured.toml")
        covered += [match.span() for match in matches]
    covered += [section(text, heading) for heading in pending.get(page, [])]
    for start, stop, number in looks_measured(text):
        if not any(first <= start and stop <= last for first, last in covered):
            around = " ".join(text[max(0, start - 40) : stop + 25].split())
            found.append(f"{page}: nothing says where {number} comes from ({around!r}); add it to docs/measured.toml")
    return found


def looks_measured(text: str) -> list[tuple[int, int, str]]:
    """Start, stop and words of numbers that a reader takes for measurements."""
    masked = text
    for pattern in MASKED:
        masked = pattern.sub(lambda match: re.sub(r"[^\n]", "\0", match[0]), masked)
    masked = re.sub(r"<!--.*?-->", lambda match: re.sub(r"[^\n]", "\0", match[0]), masked, flags=re.DOTALL)
    return [
        (match.start(), match.end(), match[0])
        for match in NUMBER.finditer(masked)
        if "." in match[0] or match[0].endswith("x") or UNIT.match(masked, match.end())
    ]


def corrected(page: str, text: str) -> str:
    """The page with the tables and numbers of the recordings."""
    text = TABLE.sub(lambda match: match[1] + _block(match[2]) + match[4], text)
    for entry in (entry for entry in entries()[0] if entry.page == page):
        for match in reversed(list(entry.pattern().finditer(text))):
            for i, number in reversed(list(enumerate(entry.numbers(), start=1))):
                if match[i].replace(",", "") != number:
                    text = text[: match.start(i)] + number + text[match.end(i) :]
    return text


@cache
def _block(name: str) -> str:
    from docs.hooks import table

    return table(name) + "\n"


def section(text: str, heading: str) -> tuple[int, int]:
    """Where the section below a heading begins and ends."""
    start = text.index(f"\n{heading}\n")
    stop = re.compile(r"^## ", re.MULTILINE).search(text, start + len(heading) + 2)
    return start, stop.start() if stop else len(text)


def main() -> None:
    """Check, or write."""
    if sys.argv[1:] == ["--write"]:
        for page, text in pages().items():
            new = corrected(page, text)
            if new != text:
                (ROOT / page).write_text(new, encoding="utf-8")
                print(f"{page} is written")
    found = [fault for page, text in pages().items() for fault in faults(page, text)]
    print("\n".join(found) or "every number stands in its recording")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
