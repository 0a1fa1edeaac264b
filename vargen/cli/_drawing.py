"""What `vargen generate` and `vargen generate-video` share: options, loading, the table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vargen.cli import _common

# Parameters below which one CPU thread is used: the layers are too small to share, and where another program has a core,
# threads that wait for one another took six times as long as one thread alone (measured with the shipped models).
SMALL_MODEL = 20_000_000

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


def read_label(text: str) -> int | str:
    """A class id, or the name of a class."""
    return int(text) if text.lstrip("-").isdigit() else text


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
    rows = {
        what: f"{count}, {num_codes} codes each",
        "seeds": seeds,
        "sampler": f"{type(sampler).__name__} ({stats.guarantee})",
        "forward passes": f"{stats.num_forwards} ({stats.tokens_per_forward(num_codes):.2f} codes each)",
        "seconds": f"{seconds:.1f} (and {loading:.1f} to load)",
        "written to": str(target),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    for note in stats.notes:
        console.print(f"note: {note}", markup=False)
