"""Model cards written from measurements: no number stands in a table that no report holds.

A section "What to know" that somebody wrote by hand stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vargen.datasets.heroes.atlas import ATLAS_FOLDER
from vargen.evaluation.report import attribute_table, metric_table, read_report
from vargen.files import atomic_write
from vargen.registry import resolve_model
from vargen.validation.printable import printable, shown
from vargen.validation.reading import read_json, read_text, read_toml

_KEPT = "## What to know"
_HERO_USE = [
    "## Intended use",
    "",
    "Showing and measuring samplers, trying recipes, tests: the distribution of its pictures is known, and fresh real ones cost "
    "nothing.",
    "",
    "## Limits",
    "",
    "It draws pixel heroes of 32 x 32 pixels from the named parts of one atlas and nothing else; words for other things are "
    "refused. What a token still has to decide is little here, which flatters speculation: what a sampler saves says little about "
    "models of photographs.",
    "",
]
TRAINING_RECORD = "training.json"  # written by `vargen train` beside the model, where it does


def write_card(
    model: str | Path, results: str | Path | Sequence[str | Path], *, recipe: str | Path | None = None
) -> Path:
    """Write ``README.md`` into a model folder; a section "What to know" of the old one is kept.

    Args:
        model: shipped name or folder.
        results: one or several ``report.json`` files (or folders that hold one) of ``vargen eval``. They must name
            this model.
        recipe: TOML of the training recipe; default: ``training.json`` or ``recipe.toml`` in the model folder.

    Returns:
        Path of the card.

    Raises:
        ValueError: no model folder, no report, a report of another model.
    """
    folder = Path(resolve_model(model))
    if not folder.is_dir():
        raise ValueError(f"{printable(model)} is not a folder on this machine: a card is written beside the weights")
    files = [results] if isinstance(results, str | Path) else list(results)
    if not files:
        raise ValueError(
            "a card needs at least one report; write one with vargen eval fid or vargen eval reconstruction"
        )
    reports = [read_report(file) for file in files]
    for file, report in zip(files, reports, strict=True):
        named = report["subject"].get("model", "")
        if named and Path(str(named)).name != folder.name:
            raise ValueError(
                f"{printable(file)} measured the model {shown(named)}, not {folder.name!r}; evaluate this one"
            )
        try:
            _measurement(report)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            missing = printable(f"{type(error).__name__}: {error}")
            raise ValueError(f"{printable(file)} lacks what a card shows ({missing}); evaluate again") from error
    text = _card(folder, reports, read_recipe(folder, recipe))
    path = folder / "README.md"
    with atomic_write(path, overwrite=True) as beside:
        beside.write_text(text)
    return path


def _card(folder: Path, reports: list[dict[str, Any]], recipe: dict[str, Any]) -> str:
    source = read_json(ATLAS_FOLDER / "atlas.json")["source"]
    lines = ["---", "library_name: vargen", "license: apache-2.0", "---", "", f"# {folder.name}", ""]
    heroes = any("heroes" in str(r["protocol"].get("reference", "")) for r in reports)
    lines += [_summary(folder), "", *(_HERO_USE if heroes else []), *_kept_section(folder / "README.md")]
    lines += ["## Components", "", *component_lines(folder), ""]
    if heroes:
        lines += ["## Data", "", f"Pixel heroes composed at random from {source['title']} ({source['licence']}).", ""]
        lines += [source["note"], ""]
    lines += ["## Licence", "", "The weights: Apache-2.0, as the library.", ""]
    if recipe:
        lines += ["## Training", "", *flat_lines(recipe), ""]
    lines += ["## Measurements", ""]
    for report in reports:
        lines += [*_measurement(report), *_command(folder.name, report)]
    return "\n".join(lines).rstrip() + "\n"


def _kept_section(card: Path) -> list[str]:
    """Lines of the old card's hand-written section."""
    lines = read_text(card).splitlines() if card.is_file() else []
    if _KEPT not in lines:
        return []
    start = lines.index(_KEPT)
    stop = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
    return lines[start:stop]


def _summary(folder: Path) -> str:
    index = folder / "model_index.json"
    if not index.is_file():
        return "A model of vargen."
    entries = read_json(index)
    entries = entries.items() if isinstance(entries, dict) else ()
    names = {k: v[1] for k, v in entries if isinstance(v, list) and len(v) == 2 and v[1]}
    backbone, tokenizer = names.get("backbone"), names.get("tokenizer")
    if not backbone or not tokenizer:
        return "A pipeline of vargen."
    return f"{backbone} over codes of {tokenizer}; load it with `ImagePipeline.from_pretrained({folder.name!r})`."


def component_lines(folder: Path) -> list[str]:
    """List every weights file with its parameters, counted from the file's own header."""
    from safetensors import safe_open

    lines = ["| file | parameters | dtype | bytes |", "|---|---|---|---|"]
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            slices = [tensors.get_slice(key) for key in tensors.keys()]  # noqa: SIM118 - not a dict
            count = sum(_product(s.get_shape()) for s in slices)
            dtypes = sorted({s.get_dtype() for s in slices})
        lines.append(f"| {file.relative_to(folder)} | {count:,} | {', '.join(dtypes)} | {file.stat().st_size:,} |")
    return lines if len(lines) > 2 else ["No safetensors file."]


def _measurement(report: dict[str, Any]) -> list[str]:
    titles = {
        "fid": "Generation",
        "compare": "Comparison",
        "reconstruction": "Reconstruction",
        "likelihood": "Likelihood",
    }
    lines = [f"### {titles[report['kind']]}", ""]
    where = report["environment"]
    lines += [
        f"Measured {where['date']} on {where['hardware']}, vargen {where['vargen']}, torch {where['torch']}.",
        "",
    ]
    lines += [f"- {k.replace('_', ' ')}: {v}" for k, v in report["protocol"].items()]
    sampler = report["subject"].get("sampler") or {}
    if sampler:
        settings = {**{k: v for k, v in sampler.items() if k != "name"}, **(report["subject"].get("settings") or {})}
        lines += [f"- sampler: {sampler['name']}, " + ", ".join(f"{k}={v}" for k, v in settings.items())]
    decode = report.get("decode") or {}
    if decode.get("forwards_per_image"):
        lines += [
            f"- decoding: {decode['forwards_per_image']:.1f} forward passes an image, "
            f"{decode['images_per_second']:.2f} images/s, guarantee {decode['guarantee']}"
        ]
    lines += ["", *metric_table(report["results"]), ""]
    if report.get("attributes"):
        lines += ["Attribute accuracy: " + attribute_table(report["attributes"])[0], ""]
        lines += [*attribute_table(report["attributes"])[2:], ""]
    return lines


def _command(name: str, report: dict[str, Any]) -> list[str]:
    """The command that makes a report again, where options of ``vargen eval`` are all that it takes."""
    kind, protocol = report["kind"], report["protocol"]
    if kind not in ("fid", "reconstruction", "likelihood"):
        return []
    words = [f"vargen eval {kind} -m {name} --num {protocol['num']}"]
    words += ["--full-captions"] if str(protocol.get("conditions", "")).startswith("full captions") else []
    words += [f"--seed {protocol['seed']}"] if protocol.get("seed") else []
    words += ["--interval"] if any(row.get("error") is not None for row in report["results"]) else []
    words += ["--out report/"]
    return ["Again:", "", "```bash", " ".join(words), "```", ""]


def read_recipe(folder: Path, recipe: str | Path | None) -> dict[str, Any]:
    """The recipe beside a model, or the one that is named; empty without one."""
    candidates = [Path(recipe)] if recipe is not None else [folder / TRAINING_RECORD, folder / "recipe.toml"]
    for path in candidates:
        if path.is_file():
            try:
                table = read_json(path) if path.suffix == ".json" else read_toml(path)
            except ValueError as error:
                raise ValueError(f"{printable(path)} is not a readable recipe: {error}") from error
            if not isinstance(table, dict):
                raise ValueError(f"{printable(path)} is not a readable recipe: it holds no table")
            return table
    if recipe is not None:
        raise ValueError(f"no recipe at {printable(recipe)}")
    return {}


def flat_lines(record: dict[str, Any], prefix: str = "") -> list[str]:
    """Return one line a section, and one line a value outside of sections."""
    values = {key: value for key, value in record.items() if not isinstance(value, dict)}
    if prefix and values:
        lines = [f"- {prefix}: " + ", ".join(f"{key}={value}" for key, value in values.items())]
    else:
        lines = [f"- {key}: {value}" for key, value in values.items()]
    for key, value in record.items():
        if isinstance(value, dict):
            lines += flat_lines(value, f"{prefix}.{key}" if prefix else key)
    return lines


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
