"""What every refusal of something from outside must be: one short printable line of the library's own kind."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unicodedata import category

import pytest

KIND: type[Exception] = ValueError
LONGEST = 400  # characters


def refusal(call: Callable[[], Any]) -> str:
    """Run a call that must be refused; return the line."""
    with pytest.raises(KIND) as caught:
        call()
    return checked(str(caught.value))


def read_or_refused(call: Callable[[], Any]) -> Any:
    """Run a call that may be refused, and in no other way fail; return what it returns, or None."""
    message = ""
    try:
        return call()
    except KIND as error:
        message = str(error)
    checked(message)
    return None


def cannot_steer(line: str) -> bool:
    """Whether a terminal shows every character of a line and obeys none: spaces of all kinds are shown."""
    return not any(category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for character in line)


def checked(message: str) -> str:
    """Return a message after a look at it."""
    assert cannot_steer(message), ascii(message)
    assert 0 < len(message) < LONGEST, message
    return message


@contextmanager
def at_most(megabytes: int) -> Iterator[None]:
    """Fail if Python and numpy ask for more memory than that at any moment of the block."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
    finally:
        tracemalloc.stop()
