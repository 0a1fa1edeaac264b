"""What comes from outside as one printable line: no name and no value can steer the terminal that shows it.

File names, texts inside files and arguments may hold escape sequences, line breaks and marks that turn the direction of
writing. Errors and tables show them escaped, as Python writes them inside a string.
"""

from __future__ import annotations

import reprlib
import unicodedata

_LONG = 80  # characters shown of a value
_BITS = 256  # integers up to here are written out

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = _LONG
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 12


def printable(text: object, *, keep: str = "") -> str:
    """Escape every character that a terminal might obey instead of showing it.

    Escaped are control characters (C0 and C1), line and paragraph separators, format characters (among them those that
    override the direction of writing), lone surrogates (bytes of a file name that are no text) and what is unassigned:
    all that ``str.isprintable`` refuses, spaces aside.

    Args:
        text: anything; paths and numbers are turned into text first.
        keep: characters that stay as they are, such as ``"\\n"`` for a text of several lines.

    Example:
        >>> print(printable("cat\\x1b[31m.png"))
        cat\\x1b[31m.png
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() or c in keep or unicodedata.category(c) == "Zs" else _escaped(c) for c in line)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def shown(value: object) -> str:
    """A value for an error message: its ``repr`` in one printable line of bounded length, whatever it is.

    Integers beyond all use are described: Python refuses to write out the digits of the largest.
    """
    if isinstance(value, int) and value.bit_length() > _BITS:
        return f"an integer of about {round(value.bit_length() * 0.30103)} digits"
    try:
        line = printable(_short.repr(value))
    except (ValueError, RecursionError):  # a container of such integers, or one nested too deeply
        return f"a {type(value).__name__}"
    return line if len(line) <= _LONG else line[: _LONG - 3] + "..."
