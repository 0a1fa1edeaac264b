"""What `vargen generate` and `vargen generate-video` share: options, loading, the table at the end."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from vargen.cli import _common
from vargen.validation.printable import shown

# Parameters below which one CPU thread is used: the layers are too small to share, and where another program has a core,
# threads that wait for one another took six times as long as one thread alone (measured with the shipped models).
SMALL_MODEL = 20_000_000
MAX_SCALE = 256
THREADS_EACH = 4  # threads that may be asked for, a processor

ClassLabels = Annotated[
    list[str] | None, typer.Option("-c", "--class-label", help="Class id or name instead of a prompt; repeatable.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Another sampler setting, such as window=16; repeatable."),
]
Guidance = Annotated[float | None, typer.Option("-g", "--guidance-scale", help="1 is off.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Keep so many codes; 0 is off.")]
TopP = Annotated[float | None, typer.Option(help="Keep so much probability; 1 is off.")]
Scale = Annotated[int | None, typer.Option(help="Whole-number enlargement, pixels stay sharp.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; default: 1 for models under 20M parameters, else torch's choice.")
]


def load_pipeline(kind: Any, model: str, device: str | None, dtype: str) -> Any:
    """Load a pipeline of this class; its progress bar counts codes, where a person watches."""
    from diffusers.utils import logging

    where, precision = _common.pick_device(device), _common.pick_dtype(dtype)
    logging.disable_progress_bar()  # "Loading pipeline components..." takes a tenth of a second
    pipe = kind.from_pretrained(model, dtype=precision).to(where)
    pipe.set_progress_bar_config(disable=not _common.is_terminal(), unit="code", leave=False)
    return pipe


def set_threads(pipe: Any, threads: int | None) -> None:
    """Use so many CPU threads; None: one for a small model, else torch's choice."""
    import torch

    if threads is None and pipe.backbone.num_parameters() < SMALL_MODEL:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)


def check_numbers(
    count: int, sets: int, batch_size: int | None, columns: int | None, scale: int | None, threads: int | None
) -> None:
    """Raise ``ValueError`` for numbers out of range, before a model is loaded.

    Args:
        count: images or clips of each prompt.
        sets: prompts.
        batch_size, columns, scale, threads: as the options of these names.
    """
    most = _common.MAX_IMAGES
    if not 1 <= count <= most or count * max(sets, 1) > most:
        times = f" of each of {sets} prompts" if sets > 1 else ""
        raise ValueError(
            f"-n must be in 1..{most // max(sets, 1)}{times}, got {shown(count)}; vargen eval fid draws more"
        )
    processors = os.cpu_count() or 1
    limits = {"batch-size": (batch_size, most), "columns": (columns, most), "scale": (scale, MAX_SCALE)}
    limits["threads"] = (threads, THREADS_EACH * processors)  # far more crash the process
    for name, (value, high) in limits.items():
        _common.check_number(f"--{name}", value, 1, high)


def merge_settings(pipe: Any, overrides: dict[str, Any], **options: float | None) -> dict[str, Any]:
    """Settings of ``--set`` and those with an option of their own, for the call of a pipeline.

    Raises:
        ValueError: one setting given both ways, or one that the sampler does not have.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in given.keys() & overrides.keys():
        option = name.replace("_", "-")
        raise ValueError(f"{name} is given twice, by --{option} and by --set {name}; leave one of them out")
    pipe.sampler.replace(**overrides)  # arguments of the pipeline are no settings: they have options of their own
    return overrides | given


def picture_size(pipe: Any) -> tuple[int, int] | None:
    """Width and height of what a pipeline draws; None where its components do not say."""
    tokenizer, backbone = pipe.tokenizer, pipe.backbone
    grid = (getattr(backbone, "scales", None) or [getattr(backbone, "grid_size", ())])[-1]
    side = getattr(tokenizer, "downsample", None)
    blocks = getattr(getattr(tokenizer, "config", None), "block_out_channels", None)
    if side is None and blocks is not None:  # diffusers' AutoencoderKL
        side = 2 ** (len(blocks) - 1) * getattr(backbone.config, "patch_size", 1)
    if side is None or len(grid) < 2:
        return None
    high, wide = side if isinstance(side, tuple) else (side, side)
    return int(grid[-1]) * wide, int(grid[-2]) * high


def read_label(text: str) -> int | str:
    """A class id, or the name of a class."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text


def print_table(result: Any, target: Path, sampler: Any, seconds: float, loading: float, what: str = "images") -> None:
    """Say what was drawn, with which seeds, at what cost, and where it lies."""
    from rich.console import Console
    from rich.table import Table

    stats, count = result.stats, len(result.seeds)
    codes = result.codes if isinstance(result.codes, list) else [result.codes]  # next-scale: one tensor a scale
    num_codes = sum(part.shape[1] for part in codes)
    consecutive = result.seeds == list(range(result.seeds[0], result.seeds[0] + count))
    seeds = (
        f"{result.seeds[0]}..{result.seeds[-1]}" if consecutive and count > 1 else ", ".join(map(str, result.seeds))
    )
    table = Table(show_header=False)
    rows: dict[str, object] = {
        what: f"{count}, {num_codes} codes each",
        "seeds": seeds,
        "sampler": f"{type(sampler).__name__} ({stats.guarantee})",
        "forward passes": f"{stats.num_forwards} ({stats.tokens_per_forward(num_codes):.2f} codes each)",
        "seconds": f"{seconds:.1f} (and {loading:.1f} to load)",
        "written to": target,
    }
    for name, value in rows.items():
        table.add_row(_common.cell(name), _common.cell(value))
    console = Console()
    console.print(table)
    for note in stats.notes:
        console.print(_common.cell(f"note: {note}"))
