"""What the commands share: one-line errors, output paths, settings from the command line. Imports neither torch nor diffusers."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

DEBUG_VARIABLE = "VARGEN_DEBUG"  # set to 1: errors come with their stack
USER_ERROR = 2  # exit code: what was asked for cannot be done
INTERNAL_ERROR = 1  # exit code: anything else
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
            return command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
                raise
            fail(_describe(error), USER_ERROR if isinstance(error, _USER_ERRORS) else INTERNAL_ERROR)

    return wrapped  # type: ignore[return-value]


def _describe(error: Exception) -> str:
    line = " ".join(str(error).split())
    if isinstance(error, _USER_ERRORS) or type(error).__name__ == "OutOfMemoryError":
        return line or type(error).__name__
    return f"internal error, {type(error).__name__}: {line} ({DEBUG_VARIABLE}=1 shows where)"


def fail(message: str, code: int = USER_ERROR) -> None:
    """Print one red line on stderr and leave with `code`."""
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(code)


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
            raise ValueError(f"settings are given as name=value, got {pair!r}")
        try:
            settings[name.strip()] = json.loads(text)
        except json.JSONDecodeError:
            settings[name.strip()] = text
    return settings


def read_size(text: str, what: str) -> tuple[int, int]:
    """Read ``16x16`` (rows x columns), or one number for a square."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{what} must look like 16x16 or 16, got {text!r}")
    return int(parts[0]), int(parts[-1])


def pick_device(device: str | None) -> str:
    """Return the device to use: the one asked for, checked, or a GPU where there is one."""
    import torch

    if device is None:
        # processes of one launch get a GPU each
        number = int(os.environ.get("LOCAL_RANK", "0") or 0) % max(torch.cuda.device_count(), 1)
        return f"cuda:{number}" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use cpu, cuda, cuda:1 or mps") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(kind, True):
        raise ValueError(f"device {device!r} is not available on this machine; use cpu")
    return device


def pick_dtype(name: str) -> Any:
    """Return the torch dtype of a name."""
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise ValueError(f"dtype must be one of {', '.join(names)}, got {name!r}")
    return names[name]


def is_terminal() -> bool:
    """Whether a person watches: of several processes, the first."""
    return sys.stderr.isatty() and os.environ.get("RANK", "0") in ("", "0")
