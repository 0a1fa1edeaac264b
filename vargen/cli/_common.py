"""What the commands share: one-line errors, output paths, settings from the command line. Imports neither torch nor diffusers."""

from __future__ import annotations

import functools
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from vargen.validation.printable import printable, shown
from vargen.validation.reading import local_path, read_value

DEBUG_VARIABLE = "VARGEN_DEBUG"  # set to 1: errors come with their stack
USER_ERROR = 2  # exit code: what was asked for cannot be done
INTERNAL_ERROR = 1  # exit code: anything else
MAX_IMAGES = 10_000  # of one call of generate, which keeps them all; an evaluation draws more
MAX_SIDE = 4096  # of a grid given as 16x16
_LONGEST = 2000  # characters of an error
_USER_ERRORS = (ValueError, OSError, ImportError)  # an ImportError here names the extra to install

Command = TypeVar("Command", bound=Callable[..., Any])
Model = Annotated[str, typer.Option("-m", "--model", help="Shipped model, pipeline folder, or Hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


def one_line_errors(command: Command) -> Command:
    """Turn an exception of the command into one red line on stderr and an exit code; no stack unless asked for."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with _one_line_warnings():
                return command(*args, **{name: _expanded(value) for name, value in kwargs.items()})
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
                typer.echo(printable(traceback.format_exc(), keep="\n"), err=True)
                raise typer.Exit(INTERNAL_ERROR) from None
            fail(_describe(error), USER_ERROR if isinstance(error, _USER_ERRORS) else INTERNAL_ERROR)

    return wrapped  # type: ignore[return-value]


def _expanded(value: Any) -> Any:
    """Paths with ``~`` as the home folder, which a shell leaves alone behind ``--output=`` or in quotes."""
    return local_path(value) if isinstance(value, Path) else value


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Print warnings as "warning: ..." instead of with a file, a line and a piece of code; which are shown stays as it is."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _describe(error: Exception) -> str:
    line = " ".join(str(error).split())
    if isinstance(error, _USER_ERRORS) or type(error).__name__ == "OutOfMemoryError":
        return line or type(error).__name__
    return f"internal error, {type(error).__name__}: {line} ({DEBUG_VARIABLE}=1 shows where)"


def fail(message: str, code: int = USER_ERROR) -> None:
    """Print one red line on stderr and leave with `code`. What errors quote from files and names is escaped here, once."""
    line = printable(message)
    line = line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
    typer.secho(f"error: {line}", fg=typer.colors.RED, err=True)
    raise typer.Exit(code)


def say(text: object) -> None:
    """Print a text of one or several lines on stdout; control characters are escaped."""
    typer.echo(printable(text, keep="\n"))


def cell(value: object) -> Any:
    """Return what a table shows of a value: control characters escaped, brackets as they are and not as rich's markup."""
    from rich.text import Text

    return Text(printable(value))


def show_markdown(text: str) -> None:
    """Print a page of Markdown; control characters are escaped."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(printable(text, keep="\n")))


def check_number(name: str, value: float | None, low: float, high: float) -> None:
    """Raise ``ValueError`` for an option outside ``low`` to ``high``, before any work; None is an option not given."""
    if value is None or low <= value <= high:
        return
    if low <= value < math.inf:
        raise ValueError(f"{name} must be at most {high:,}, got {shown(value)}")
    raise ValueError(f"{name} must be at least {low:,}, got {shown(value)}")


def check_output(path: Path, *, overwrite: bool, folder: bool = False) -> None:
    """Raise ``ValueError`` for an output path that cannot be written, before any work.

    Args:
        path: file, or folder with ``folder=True``.
        overwrite: whether an existing file (or the files of a folder) may be replaced.
        folder: the output is a folder.
    """
    if folder and path.is_file():
        raise ValueError(f"cannot write into {path}: it is a file, not a folder")
    if not folder and path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; name a file such as {path / 'out.png'}")
    taken = path.is_file() or (folder and path.is_dir() and any(path.iterdir()))
    if taken and not overwrite:
        raise ValueError(
            f"{path} exists{' and is not empty' if folder else ''}; choose another name or add --overwrite"
        )
    parent = path if path.is_dir() else path.parent
    if not parent.is_dir():
        raise ValueError(f"cannot write {path}: the folder {parent} does not exist")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"cannot write {path}: no permission to write in {parent}")


def read_settings(pairs: list[str]) -> dict[str, Any]:
    """Read ``name=value`` pairs; values are JSON (``window=16``, ``carry=gumbel``, ``group=[3,5]``)."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"settings are given as name=value, got {shown(pair)}")
        settings[name.strip()] = read_value(text)
    return settings


def read_size(text: str, what: str) -> tuple[int, int]:
    """Read ``16x16`` (rows x columns), or one number for a square."""
    found = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:[xX]\s*([0-9]{1,9})\s*)?", text)
    sides = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if min(sides) < 1 or max(sides) > MAX_SIDE:
        raise ValueError(f"{what} must look like 16x16 or 16, with sides of at most {MAX_SIDE}, got {shown(text)}")
    return sides


def pick_device(device: str | None) -> str:
    """Return the device to use: the one asked for, checked, or a GPU where there is one."""
    import torch

    if device is None:
        # processes of one launch get a GPU each
        number = int(os.environ.get("LOCAL_RANK", "0") or 0) % max(torch.cuda.device_count(), 1)
        return f"cuda:{number}" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, ValueError):
        raise ValueError(f"unknown device {shown(device)}; use cpu, cuda, cuda:1 or mps") from None
    kinds = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    kinds["xpu"] = torch.xpu.device_count() if hasattr(torch, "xpu") else 0
    if found.type not in kinds:  # such as meta, on which nothing is computed
        raise ValueError(f"device {shown(device)} draws nothing; use cpu, cuda, cuda:1 or mps")
    if not 0 <= (found.index or 0) < kinds[found.type]:  # numbers that are too large come back negative
        raise ValueError(f"device {shown(device)} is not available on this machine; use cpu")
    return device


def pick_dtype(name: str) -> Any:
    """Return the torch dtype of a name."""
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise ValueError(f"dtype must be one of {', '.join(names)}, got {shown(name)}")
    return names[name]


def is_terminal() -> bool:
    """Whether a person watches: of several processes, the first."""
    return sys.stderr.isatty() and os.environ.get("RANK", "0") in ("", "0")


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that shows what is being done, how far it is and how long it will take, on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not is_terminal()) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            what = printable(what)
            name = "training" if what.startswith("loss") else what  # one bar for the whole training
            if name not in tasks:
                tasks[name] = bar.add_task(what, total=total)
            bar.update(tasks[name], completed=done, description=what)

        yield show
