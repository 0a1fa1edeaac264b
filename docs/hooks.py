"""What the site is made of beside its pages: sources for the reference, and tables of measured numbers.

The reference is read from a copy in which every folder is a package: documentation tools do not follow our links. A line
``<!-- table: NAME -->`` in a page becomes a table of the committed recordings (``benchmarks/results``, cards of the shipped
models), so that no number is typed twice.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the site is built by a program of its own

from docs import tables  # noqa: E402
from docs.tables import recording, told  # noqa: E402

ROOMS = ("tokenizers", "samplers", "kernels")
PLACE = re.compile(r"^<!-- table: ([\w-]+) -->$", flags=re.MULTILINE)

# name in the recording -> what a user types; speculative.py records them
SPECULATIVE = {
    "next token": "`NextTokenSampler()`",
    "Jacobi W=auto": "`SpeculativeJacobiSampler()`, sizes its window",
    "Jacobi W=8": "`SpeculativeJacobiSampler(window=8)`",
    "Jacobi W=16": "`SpeculativeJacobiSampler(window=16)`",
    "Jacobi W=32": "`SpeculativeJacobiSampler(window=32)`",
    "Jacobi W=64": "`SpeculativeJacobiSampler(window=64)`",
    "Jacobi maximal W=32": '`SpeculativeJacobiSampler(rule="maximal")`',
    "Jacobi independent W=32": '`SpeculativeJacobiSampler(rule="independent")`, as published',
    "draft model, 8 drafts": "`SpeculativeSampler(num_draft_tokens=8)`, a draft model",
    "drafted Jacobi W=32, 2 sweeps": "`DraftedJacobiSampler(num_sweeps=2)`",
    "grouped W=16": "`GroupedSpeculativeSampler()`",
}


def on_startup(command: str, dirty: bool) -> None:
    """Copy the sources to build/api, before anyone looks for them."""
    target = ROOT / "build" / "api" / "vargen"
    shutil.rmtree(target, ignore_errors=True)
    skip = shutil.ignore_patterns("assets", "__pycache__", *ROOMS)
    shutil.copytree(ROOT / "vargen", target, ignore=skip)
    for room in ROOMS:
        shutil.copytree(ROOT / room, target / room, ignore=shutil.ignore_patterns("__pycache__"))
        (target / room / "__init__.py").touch()
    for file in target.rglob("*.py"):
        text = file.read_text()
        file.write_text(text.replace(" Example:\n", " Examples:\n"))  # the section whose prompts are shown as code


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put tables where a page asks for them."""
    return PLACE.sub(lambda match: table(match[1]), markdown)


def table(name: str) -> str:
    """Return a table as Markdown, with where it comes from below it.

    Raises:
        ValueError: a name that no table has.
    """
    known = {
        "speculative": speculative,
        "lantern": lantern,
        "schedules": schedules,
        "next-scale": next_scale,
        "shipped": shipped,
        "families": families,
        "sizes": sizes,
        "notebooks": notebooks,
        "times": tables.times,
        "quality": tables.quality,
        "bench": tables.bench,
        "continuous": tables.continuous,
    }
    if name not in known:
        raise ValueError(f"unknown table {name!r}; known: {', '.join(known)}")
    rows, source = known[name]()
    header, *body = rows
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body)]
    return "\n".join(lines + (["", f"<small>{source}</small>"] if source else []))


def speculative() -> tuple[list[list[str]], str]:
    """Samplers of causal models: forwards at batch 1, seconds by batch beside next-token sampling."""
    records = [recording("speculative-synthetic"), recording("speculative-heroes32-llamagen")]
    flat, heroes = ({(row["sampler"], row["batch"]): row for row in record["rows"]} for record in records)
    batches = sorted({size for _, size in heroes})
    most = max(size for _, size in flat)
    header = ["sampler", "guarantee", "same codes", "flat: forwards", "heroes: forwards"]
    rows = [[*header, *(f"heroes: time, batch {size}" if size == 1 else f"batch {size}" for size in batches)]]
    for name, call in SPECULATIVE.items():
        many = heroes[name, batches[-1]]
        same = "yes" if all(heroes[name, size]["same"] for size in batches) else ""
        forwards = [f"{row['forwards']:.1f}".removesuffix(".0") for row in (flat[name, most], heroes[name, 1])]
        times = [f"{heroes[name, size]['time ratio']:.2f}" for size in batches]
        rows.append([call, many["guarantee"], same, *forwards, *times])
    commands = ("benchmarks/speculative.py", "benchmarks/speculative.py --model heroes32-llamagen")
    noise = [heroes["next token, again", size] for size in batches]
    low, high = min(row["ratio low"] for row in noise), max(row["ratio high"] for row in noise)
    note = f"Next-token sampling against itself: {low:.2f} to {high:.2f}, which is the noise of a round. "
    return rows, note + told(records[1], *commands)


def lantern() -> tuple[list[list[str]], str]:
    """What LANTERN's relaxation buys and costs, on flat distributions with two drafters and on heroes."""
    record = recording("lantern")
    good, fair = ({row["setting"]: row for row in record["flat"][f"{name} drafter"]} for name in ("good", "fair"))
    heroes = {row["setting"]: row for row in record["heroes"]}
    header = ["setting", "guarantee", "flat, good drafter: forwards", "flat, fair drafter"]
    rows = [[*header, "heroes: forwards", "heroes: FD", "parts"]]
    for setting in dict.fromkeys([*good, *heroes]):
        flat = [f"{drafted[setting]['forwards']:.1f}" if setting in drafted else "-" for drafted in (good, fair)]
        hero = heroes.get(setting)
        found = (
            ["-"] * 3
            if hero is None
            else [f"{hero['forwards']:.1f}", f"{hero['FD']:.1f}", f"{hero['attributes']:.1%}"]
        )
        name = {"exact": "exact tree"}.get(setting, setting)
        rows.append([name, (hero or good[setting])["guarantee"], *flat, *found])
    floor, num = record["heroes"][0]["floor"], record["protocol"]["num"]
    note = (
        "The flat drafters are the target with noise on its logits, less for the good one. "
        f"FD-Lite0-112 of {num} pictures, where real heroes score {floor:.1f}; single runs: differences around 1 are noise. "
    )
    return rows, note + told(record, "benchmarks/lantern.py")


def schedules() -> tuple[list[list[str]], str]:
    """Models trained for other orders, beside next-token sampling of a model of about their size."""
    record, published = recording("schedules_cpu"), recording("schedules_published_cpu")
    rows = [["models", "order", "batch", "forwards", "images/s", "speed-up"]]
    for models, group in (
        ("shipped", record["shipped"]),
        ("3 million parameters, random", record["equal"]),
        ("LlamaGen-B, NAR-B, random", published["published"]),
    ):
        for row in group:
            numbers = [str(row["batch"]), str(row["forwards"]), f"{row['images/s']:.2g}", f"{row['speed-up']:.2f}"]
            rows.append([models, row["schedule"], *numbers])
    return rows, told(record, "benchmarks/schedules.py")


def next_scale() -> tuple[list[list[str]], str]:
    """Next-scale beside next-token."""
    record = recording("next_scale")
    rows = [["models", "batch", "forwards", "images/s", "next-token: images/s", "speed-up"]]
    for row in record["beside_next_token"]:
        speeds = [f"{row[f'{kind} images/s']:.1f}" for kind in ("next-scale", "next-token")]
        rows.append(
            [row["models"], str(row["batch"]), str(row["next-scale forwards"]), *speeds, f"{row['ratio']:.1f}"]
        )
    return rows, told(record, "benchmarks/next_scale.py")


def shipped() -> tuple[list[list[str]], str]:
    """The models inside the package, from their folders and cards."""
    rows = [["name", "backbone", "size", "forwards an image", "FD-Lite0-112", "parts recognised"]]
    for index in sorted((ROOT / "vargen" / "assets" / "models").glob("*/model_index.json")):
        entry = json.loads(index.read_text()).get("backbone")
        if not entry or not entry[1]:
            continue
        size = sum(path.stat().st_size for path in index.parent.rglob("*") if path.is_file())
        card = index.parent / "README.md"
        numbers = [_found(card, pattern) for pattern in (r"decoding: ([\d.]+) forward", r"FD-Lite0-112 \| ([\d.]+)")]
        parts = _found(card, r"Attribute accuracy: ([\d.]+)%")
        row = [f"`{index.parent.name}`", f"`{entry[1]}`", f"{size / 1e6:.1f} MB", numbers[0].removesuffix(".0")]
        rows.append([*row, numbers[1], f"{parts} %" if parts != "-" else parts])
    note = (
        "From the cards of the models: 2,000 pictures each, where two sets of real heroes score 1.5. Those of the continuous "
        "models say what captions leave open and what that does to the distance."
    )
    return rows, note


def _found(file: Path, pattern: str) -> str:
    match = re.search(pattern, file.read_text()) if file.is_file() else None
    return match[1] if match else "-"


def families() -> tuple[list[list[str]], str]:
    """Checkpoints that `load_original`, `verify` and `convert` know, with the keywords that shapes cannot tell."""
    import vargen
    from vargen.checkpoints.families import known_families

    found = [family for family in known_families() if family.loader.split(".")[0] in vargen.__all__]
    return [["checkpoint", "loads as"], *([family.title, f"`{family.loader}`"] for family in found)], ""


def sizes() -> tuple[list[list[str]], str]:
    """Published sizes with the parameter counts that ``vargen verify`` expects."""
    from vargen.checkpoints.manifests.published import PARAMETERS as counts

    published: dict[str, dict[Any, int]] = {
        "LlamaGen, class to image": {size: n for size, n in counts["llamagen-c2i"].items() if size != "7B"},
        "LlamaGen, text to image": {"XL": counts["llamagen-t2i"]["XL"]},
        "LlamaGen tokenizers": counts["llamagen-vq"],
        "VAR": {size: n for size, n in counts["var"].items() if size != "d12"},
        "VAR tokenizer": counts["var-vqvae"],
        "NAR, class to image": counts["nar"],
        "NAR, text to image": {"XL": counts["nar-t2i"]["XL"]},
        "NAR video": counts["nar-video"],
        "PAR (size x codes of a group)": counts["par"],
        "RandAR": counts["randar"],
        "MAR": counts["mar"],
        "xAR": counts["xar"],
        "Janus (7B: Pro alone)": counts["janus-original"],
        "Emu3, and its vision tokenizer": counts["emu3-original"] | counts["emu3-vision-tokenizer"],
    }
    rows = [["model", "parameters in millions (GB in float32)"]]
    for model, sizes_of in published.items():
        listed = [f"{_plain(size)} {count / 1e6:,.0f} ({count * 4 / 1e9:.2g})" for size, count in sizes_of.items()]
        rows.append([model, ", ".join(listed)])
    return rows, ""


def _plain(size: Any) -> str:
    return " x ".join(map(str, size)) if isinstance(size, tuple) else str(size)


def notebooks() -> tuple[list[list[str]], str]:
    """The notebooks and the questions they answer."""
    rows = [["notebook", "question"]]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = "".join(json.loads(path.read_text())["cells"][0]["source"])
        found = re.search(r"\*\*Question\.\*\* (.+?)(?:\n\n|$)", text, flags=re.DOTALL)
        question = found[1] if found else text.splitlines()[0].lstrip("# ")
        rows.append([f"`{path.name}`", " ".join(question.split())])
    return rows, ""
