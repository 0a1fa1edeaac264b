"""What a checkpoint may hold, and how its sizes are read: every bound that stops a file before it costs time or memory.

Readers of all families count their layers and read shapes here, so that none believes a number that only a name claims.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vargen.validation.checks import MAX_BLOCKS, MAX_ROWS, check_names
from vargen.validation.printable import printable

MAX_BYTES = 2**37  # of a file; the largest published one, with the state of its optimizer, has about 80 GB
MAX_TENSORS = 10_000  # of a state dict
MAX_NAME = 512  # characters of a name
MAX_DEPTH = 16  # containers in containers
MAX_CONTAINERS = 1000  # opened in search of the weights
MAX_SHARED = 4  # times that the numbers of a state dict may be used on average, as tied tables are twice
_SMALL = 2**26  # bytes that may be shared as one likes, such as masks of equal rows
_END = 190  # characters shown of either end of a long message

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # what layers can hold


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit. The message is one printable line, whatever names it quotes."""

    def __init__(self, message: str) -> None:
        line = printable(message)
        super().__init__(line if len(line) <= 2 * _END else f"{line[:_END]} ... {line[-_END:]}")


def check_tensors(state_dict: Mapping[str, Tensor], name: str, file_size: int | None = None) -> None:
    """Refuse what no weights look like: views that repeat themselves, other layouts, more than the file holds.

    Args:
        state_dict: names to tensors.
        name: of the file, for messages.
        file_size: its bytes; None for a mapping from memory, which may also lie on the meta device.

    Raises:
        CheckpointError: a bound is broken.
    """
    claimed = 0
    held: dict[int, int] = {}  # address -> bytes
    for key, value in state_dict.items():
        if len(key) > MAX_NAME:
            raise CheckpointError(f"{name}: a name has {len(key):,} characters, at most {MAX_NAME} are allowed")
        if value.layout != torch.strided or value.is_quantized or value.is_nested:
            raise CheckpointError(f"{name}: {key} is sparse, quantized or nested; save plain tensors")
        if value.is_meta:
            if file_size is not None:
                raise CheckpointError(f"{name}: {key} has a shape but no numbers (it was saved from the meta device)")
            continue
        storage, size = value.untyped_storage(), value.numel() * value.element_size()
        claimed += size
        held[storage.data_ptr()] = max(held.get(storage.data_ptr(), 0), storage.nbytes())
    stored = sum(held.values())
    if file_size is not None and stored > file_size:
        raise CheckpointError(f"{name} claims {stored:,} bytes of numbers and has {file_size:,}")
    if claimed > MAX_SHARED * stored + _SMALL:
        raise CheckpointError(
            f"{name}: its tensors claim {claimed:,} bytes and store {stored:,}, views that repeat themselves or each other; "
            "save copies"
        )


def count_layers(names: Iterable[str], prefix: str, *, least: int = 1, most: int = MAX_BLOCKS) -> int:
    """How many layers the names have behind a prefix such as ``"layers."``: they are numbered from 0 without holes.

    Args:
        names: keys of a state dict.
        prefix: what stands before the number.
        least: fewest layers allowed; 0 accepts that there are none.
        most: most layers allowed.

    Raises:
        CheckpointError: a number is missing or no number, or there are more than allowed.

    Example:
        >>> count_layers(["layers.0.weight", "layers.0.bias", "layers.1.weight", "norm.weight"], "layers.")
        2
    """
    found = {name[len(prefix) :].split(".", 1)[0] for name in names if name.startswith(prefix)}
    if len(found) > most:
        raise CheckpointError(f"the checkpoint has {len(found)} {prefix}*, at most {most} are allowed")
    wanted = {str(number) for number in range(max(len(found), least))}
    if found != wanted:
        absent = min(wanted - found, key=int)
        also = f", yet {prefix}{min(found - wanted)}" if found - wanted else ""
        raise CheckpointError(
            f"the checkpoint has no {prefix}{absent}{also}; layers are numbered from 0 without holes"
        )
    return len(found)


def read_shape(state_dict: Mapping[str, Any], key: str, axes: int, *, least: int = 1) -> tuple[int, ...]:
    """The shape of an entry from which sizes are inferred.

    Args:
        state_dict: names to tensors.
        key: the entry.
        axes: how many it must have.
        least: smallest size of an axis allowed.

    Raises:
        CheckpointError: the entry is missing, has another number of axes or an axis out of range.
    """
    if key not in state_dict:
        raise CheckpointError(f"the checkpoint lacks {key}, which tells its sizes")
    shape = tuple(state_dict[key].shape)
    if len(shape) != axes or not all(least <= size <= MAX_ROWS for size in shape):
        raise CheckpointError(f"{key} must have {axes} axes of {least}..{MAX_ROWS} entries, got shape {shape}")
    return shape


def check_given(cls: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check settings that come with a checkpoint one by one, before the file is opened; None means not given.

    Args:
        cls: the class that is to be built, whose constructor has a table of checks (``vargen.validation.checks.checked``).
        given: names to values.

    Raises:
        ValueError: an unknown name or a value out of range.
    """
    checks, owner = cls.__init__.settings.checks, cls.__name__
    check_names(given, tuple(checks), owner)
    try:
        return {name: checks[name](name, value) for name, value in given.items() if value is not None}
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from None
