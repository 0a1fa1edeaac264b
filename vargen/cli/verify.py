"""`vargen verify`: check a published checkpoint against its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vargen.cli import _common

_SHOWN = 3  # names listed of each kind of difference; the rest is counted


@_common.one_line_errors
def verify(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="Checkpoint file, or folder, in the official layout.")
    ],
    key: Annotated[str | None, typer.Option(help="Entry of a training container, such as ema.")] = None,
) -> None:
    """Check a checkpoint: family, size, every key and shape, parameter count, NaN. Never runs code from the file.

    Leaves with exit code 2 when the file is not what its family and size promise.

    \b
    Examples:
      vargen verify c2i_B_256.pt
      vargen verify Janus-Pro-1B
      vargen verify vq_ds16_c2i.pt --key ema
    """
    from rich.console import Console
    from rich.table import Table

    from vargen.checkpoints.verify import verify_checkpoint

    report = verify_checkpoint(checkpoint, key=key)
    table = Table(show_header=False)
    for name, value in _rows(report):
        table.add_row(_common.cell(name), _common.cell(value))
    Console().print(table)
    if not report.ok:
        _common.fail(f"{checkpoint} is not a complete {report.family or 'checkpoint of a known family'}")


def _rows(report: Any) -> list[tuple[str, str]]:
    expected = "" if report.expected_parameters is None else f" (published: {report.expected_parameters:,})"
    wrong = [f"{key} {got}, expected {want}" for key, (got, want) in report.wrong_shapes.items()]
    rows = [
        ("family", report.family or "unknown"),
        ("size", report.size or "not a published one"),
        ("entries", f"{report.num_entries:,}, {', '.join(f'{n} {name}' for name, n in report.dtypes.items())}"),
        ("parameters", f"{report.num_parameters:,}{expected}"),
        ("missing keys", _some(report.missing)),
        ("extra keys", _some(report.extra)),
        ("wrong shapes", _some(wrong)),
        ("wrong dtypes", _some(report.wrong_dtypes)),
        ("NaN or infinite", _some(report.not_finite)),
    ]
    if report.note:
        rows.append(("note", report.note))
    return [*rows, ("result", "as published" if report.ok else "different")]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) + more) if names else "none"
