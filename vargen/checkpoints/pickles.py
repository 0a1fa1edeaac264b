"""Look at the pickle of a checkpoint before it is unpickled: what it calls, how deep it nests, how much work it asks for.

``torch.load(weights_only=True)`` runs no foreign code, but a megabyte of nested tuples still crashes the process (their hash
recurses in C) and a few kilobytes can ask for gigabytes of copies. The scan below follows the same stack machine with sizes
instead of values.
"""

from __future__ import annotations

import io
import pickletools
import re
from dataclasses import dataclass
from typing import Any

from vargen.checkpoints.bounds import CheckpointError

MAX_PICKLE = 2**24  # bytes; names, shapes and settings, not the numbers
MAX_OPCODES = 2**20  # a tensor takes about thirty, and as much for each moment of its optimizer
MAX_NESTING = 32  # tuples in tuples
MAX_WORK = 2**24  # characters and entries that calls and dictionary keys read

INERT_NAMES = (  # classes of training frameworks, read as empty stand-ins
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
)
# what weights are made of: some names that torch allows beside these allocate whatever they are told to
_NAMES = {
    *INERT_NAMES,
    *("__builtin__.set", "builtins.set", "collections.OrderedDict", "collections.Counter", "_codecs.encode"),
    *("argparse.Namespace", "torch.Size", "torch.device", "torch.nn.parameter.Parameter"),
    *(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3")),
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
    "torch._tensor._rebuild_from_type_v2",
    "torch._utils._rebuild_meta_tensor_no_storage",  # allocates nothing, and is refused by name of the tensor
}
_TYPES = re.compile(r"torch\.((cuda\.|storage\.)?\w+Storage|(bool|u?int\d|b?float\d|complex\d)\w*)")

_ATOMS = {
    *("NONE", "NEWFALSE", "NEWTRUE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1"),
    *("BINUNICODE", "SHORT_BINSTRING"),
}
_CONTAINERS = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(eq=False, slots=True)
class _Item:
    """What is known of a value: entries or characters, tuples in tuples, and the parts of a tuple."""

    weight: int = 1
    depth: int = 0
    parts: tuple[_Item, ...] = ()


_ATOM = _Item()  # every number and name; nothing can be put into it


class PickleScan:
    """Bounds over all pickles of one file.

    Args:
        name: of the file, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.opcodes = self.work = 0

    def check(self, stream: io.BytesIO) -> bool:
        """Read one pickle; False where it ends in an instruction that ``torch.load`` refuses by itself.

        Raises:
            CheckpointError: a bound is broken or a name is not one that weights need.
        """
        self._stack: list[_Item] = []
        self._marks: list[list[_Item]] = []
        self._memo: dict[int, _Item] = {}
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                self.opcodes += 1
                if self.opcodes > MAX_OPCODES:
                    raise CheckpointError(f"{self.name} holds more than {MAX_OPCODES:,} objects beside its numbers")
                if opcode.name == "STOP":
                    return True
                if not self._step(opcode.name, argument):
                    return False
        except (IndexError, KeyError):  # an empty stack, nothing remembered, no container: torch stops here too
            return False
        return False

    def _step(self, opcode: str, argument: Any) -> bool:
        """Follow one instruction; False for those that the unpickler does not know."""
        stack = self._stack
        if opcode in _ATOMS:
            stack.append(_Item(len(argument)) if isinstance(argument, str) else _ATOM)
        elif opcode in _CONTAINERS:
            stack.append(_Item(0))
        elif opcode == "GLOBAL":
            self._check_name(argument.replace(" ", "."))
            stack.append(_ATOM)
        elif opcode == "MARK":
            self._marks.append(stack)
            self._stack = []
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif opcode != "PROTO":
            return self._reduce(opcode)
        return True

    def _reduce(self, opcode: str) -> bool:
        """Instructions that take values from the stack."""
        stack = self._stack
        if opcode in _TUPLES:
            self._tuple([stack.pop() for _ in range(_TUPLES[opcode])][::-1])
        elif opcode == "TUPLE":
            self._tuple(self._pop_mark())
        elif opcode in ("APPENDS", "SETITEMS"):
            items = self._pop_mark()
            self._grow(len(items), items[::2] if opcode == "SETITEMS" else [])
        elif opcode == "APPEND":
            stack.pop()
            self._grow(1, [])
        elif opcode == "SETITEM":
            stack.pop()
            self._grow(2, [stack.pop()])
        elif opcode == "BUILD":
            self._call(stack.pop())
        elif opcode in ("REDUCE", "NEWOBJ"):
            stack[-1] = _Item(self._call(stack.pop()))
        elif opcode == "BINPERSID":
            self._call(stack.pop())
            stack.append(_ATOM)
        else:
            return False
        return True

    def _check_name(self, found: str) -> None:
        if found not in _NAMES and not _TYPES.fullmatch(found):
            raise CheckpointError(
                f"checkpoint {self.name} contains pickled code ({found}), refused; convert it to safetensors"
            )

    def _pop_mark(self) -> list[_Item]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _tuple(self, parts: list[_Item]) -> None:
        depth = 1 + max((part.depth for part in parts), default=0)
        if depth > MAX_NESTING:
            raise CheckpointError(f"{self.name} nests tuples more than {MAX_NESTING} deep")
        self._stack.append(_Item(1 + sum(part.weight for part in parts), depth, tuple(parts)))

    def _grow(self, count: int, keys: list[_Item]) -> None:
        if self._stack[-1] is _ATOM:
            raise IndexError
        self._stack[-1].weight += count
        self._spend(sum(key.weight for key in keys))

    def _call(self, arguments: _Item) -> int:
        """Pay for a call; its result may be as large as what it reads."""
        # a list among the arguments may have grown since the tuple was made
        work = max(arguments.weight, sum(part.weight for part in arguments.parts))
        self._spend(work)
        return work

    def _spend(self, work: int) -> None:
        self.work += work
        if self.work > MAX_WORK:
            raise CheckpointError(f"{self.name} asks for copies of its own parts without end")
