"""Text, JSON and TOML from outside: bounded before they are parsed, and after it, so that nothing that walks over them hangs."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vargen.validation.printable import printable, shown

MAX_TEXT = 2**24  # bytes of a text file that is read whole
MAX_TOML = 2**16  # characters of a TOML file
MAX_DEPTH = 32  # containers inside one another
MAX_NODES = 2**20  # values in all
MAX_BITS = 128  # of an integer
_MAX_LINE = 1000  # characters of a line of TOML

StrPath = str | os.PathLike[str]


def local_path(path: StrPath) -> Path:
    """A path as a shell reads it: ``~`` is the home folder."""
    text = os.fspath(path)
    return Path(text).expanduser() if text == "~" or text.startswith(("~/", "~\\")) else Path(text)


def read_text(path: StrPath, *, limit: int = MAX_TEXT) -> str:
    """Read a UTF-8 text file.

    Args:
        path: a regular file; pipes and devices, which might never end, are refused.
        limit: bytes beyond which it is not read.

    Raises:
        ValueError: no such file, not a regular one, too large, not UTF-8, not readable.
    """
    file, name = local_path(path), printable(path)
    try:
        if not file.is_file():
            raise ValueError(f"{name} is not a file" if file.exists() else f"no file at {name}")
        with file.open("rb") as stream:
            data = stream.read(limit + 1)  # not more, whatever the size says
        if len(data) > limit:
            raise ValueError(f"{name} is larger than {limit:,} bytes; it is not the text file that is wanted here")
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror or error}") from None


def read_json(path: StrPath, *, limit: int = MAX_TEXT) -> Any:
    """Read a JSON file whose content is bounded as ``check_plain`` says.

    Raises:
        ValueError: as ``read_text``; not JSON, nested too deeply, too many values, integers beyond all use.
    """
    return parse_json(read_text(path, limit=limit), printable(path))


def parse_json(text: str, name: str) -> Any:
    """Parse JSON under the bounds of ``check_plain``; ``name`` says in errors where it comes from."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{name} nests its values too deeply: more than {MAX_DEPTH} levels") from None
    except ValueError as error:  # not JSON, or an integer of thousands of digits
        raise ValueError(f"{name} is not valid JSON: {printable(error)}") from error
    check_plain(value, name)
    return value


def read_value(text: str) -> Any:
    """Read the value of a ``name=value`` setting: JSON, or the text itself where it is none.

    Raises:
        ValueError: JSON beyond the bounds of ``check_plain``.
    """
    try:
        return parse_json(text, "a setting")
    except ValueError as error:
        if isinstance(error.__cause__, json.JSONDecodeError):
            return text.strip()
        raise


def read_toml(path: StrPath) -> dict[str, Any]:
    """Read a TOML file of at most 64 KiB whose content is bounded as ``check_plain`` says.

    Raises:
        ValueError: as ``read_text``; not TOML, a line of more than 1,000 characters, nested too deeply, too many values,
            integers beyond all use.
    """
    return parse_toml(read_text(path, limit=4 * MAX_TOML), printable(path))


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """Parse TOML under the bounds of ``read_toml``; ``name`` says in errors where it comes from."""
    if len(text) > MAX_TOML or any(len(line) > _MAX_LINE for line in text.splitlines()):
        # the time that tomllib takes for a dotted key, which is one line, grows with the square of its parts
        raise ValueError(f"{name} is too long: at most {MAX_TOML:,} characters in lines of at most {_MAX_LINE:,}")
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{name} nests its values too deeply: more than {MAX_DEPTH} levels") from None
    except ValueError as error:  # not TOML, or an integer of thousands of digits
        raise ValueError(f"{name} is not valid TOML: {printable(error)}") from error
    check_plain(table, name)
    return table


def check_plain(value: Any, name: str) -> None:
    """Refuse plain values (of JSON, TOML, ...) that would exhaust whatever walks over them.

    Args:
        value: dictionaries, lists, tuples and what they hold; other objects are not looked into.
        name: what it is, for the error.

    Raises:
        ValueError: more than 32 levels, more than a million values (shared ones count each time), or an integer beyond 128
            bits.
    """
    level, count = [value], 0
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, int) and item.bit_length() > MAX_BITS:
                raise ValueError(f"{name} holds {shown(item)}; integers have at most {MAX_BITS} bits")
            children = item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()
            below.extend(children)
            count += len(children)
            if count > MAX_NODES:
                raise ValueError(f"{name} holds more than {MAX_NODES:,} values")
        if not below:
            return
        level = below
    raise ValueError(f"{name} nests its values too deeply: more than {MAX_DEPTH} levels")
