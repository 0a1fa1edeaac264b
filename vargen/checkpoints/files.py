"""Read checkpoint files without running code from them: size, directory and pickle are looked at before anything is loaded.

Numbers are mapped from the file, not copied.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import pickletools
import re
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vargen.checkpoints.bounds import MAX_BYTES, MAX_TENSORS, CheckpointError
from vargen.checkpoints.pickles import INERT_NAMES, MAX_PICKLE, PickleScan
from vargen.validation.folders import check_shards, read_settings

MAX_DIRECTORY = 2**23  # bytes of a zip's directory: 2^16 entries and more
_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
INDEX = ".index.json"  # ending of the index of a sharded checkpoint
_PICKLES = 5  # of a file from before torch 1.6: magic number, version, system, content, keys of the numbers
_CUT = re.compile(
    "central directory|not a zip file|unexpected EOF|truncat|file size|exhausted|only .* remain|incomplete"
)


class _Inert:
    """Stands in for a class that training frameworks leave in their files; holds nothing and does nothing."""


# classes that a checkpoint may contain: plain attribute bags, and names read as inert stand-ins
_ALLOWED: list[Any] = [argparse.Namespace, *((_Inert, name) for name in INERT_NAMES)]


def read_checkpoint_file(path: Path) -> tuple[Mapping[str, Any], int]:
    """Read a safetensors or torch file, or the only one of a folder; of a sharded one the index names the files.

    Returns:
        The content, and the bytes of the file.

    Raises:
        CheckpointError: missing, unreadable, too large, truncated, not a checkpoint, or holding pickled code.
    """
    try:
        path = _only_file(path)
        if path.name.endswith(INDEX):
            return _read_shards(path)
        with path.open("rb") as file:
            head, size = file.read(tarfile.BLOCKSIZE), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if size > MAX_BYTES:
        raise CheckpointError(f"{path} has {size:,} bytes; checkpoints of up to {MAX_BYTES:,} are read")
    if head[8:9] == b"{" and head[4:8] == bytes(4):
        return _read_safetensors(path, size, int.from_bytes(head[:8], "little")), size
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _read_torch(path, head), size
    raise CheckpointError(f"{path} is not a checkpoint: {_describe(head)}")


def _only_file(path: Path) -> Path:
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.name.endswith(INDEX)) or sorted(
            p for p in path.iterdir() if p.suffix in _SUFFIXES
        )
        if len(found) != 1:
            raise CheckpointError(f"{path} is a folder with {len(found)} checkpoint files; name one of them")
        path = found[0]
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file {path}")
    return path


def _read_shards(index: Path) -> tuple[dict[str, Any], int]:
    """The tensors of all files that an index names, and the bytes of these files."""
    try:
        listed = read_settings(index)
        check_shards(index, listed)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    content: dict[str, Any] = {}
    total = 0
    for shard in sorted(set(listed["weight_map"].values())):
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} names {shard}, which is not beside it; copy every file of the model")
        part, size = read_checkpoint_file(index.parent / shard)
        total += size
        if total > MAX_BYTES or len(content) + len(part) > MAX_TENSORS:
            raise CheckpointError(f"{index} holds more than {MAX_BYTES:,} bytes or {MAX_TENSORS:,} tensors")
        if twice := content.keys() & part.keys():
            raise CheckpointError(f"{index}: {min(twice)} is in several files")
        content |= part
    if missing := listed["weight_map"].keys() - content.keys():
        raise CheckpointError(f"{index} names {min(missing)}, which none of its files holds; copy them again")
    return content, total


def _describe(head: bytes) -> str:
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page; the download went wrong"
    return "neither safetensors nor a torch file"


def _read_safetensors(path: Path, size: int, header: int) -> Mapping[str, Any]:
    if size < 8 + header:
        raise _cut(path)
    if header > MAX_PICKLE:
        raise CheckpointError(f"{path} has a header of {header:,} bytes, at most {MAX_PICKLE:,} are read")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                raise CheckpointError(f"{path} holds {len(names):,} tensors, more than the {MAX_TENSORS:,} allowed")
            return {name: file.get_tensor(name) for name in names}
    except CheckpointError:
        raise
    except Exception as error:  # whatever the library says of bytes that are not its own
        raise _refusal(path, error, "is not a valid safetensors file") from error


def _read_torch(path: Path, head: bytes) -> Mapping[str, Any]:
    zipped = head.startswith(b"PK")
    try:
        if zipped:
            _check_zip(path)
        else:
            _check_old(path, head)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_ALLOWED):
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read is reported below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        name = _refused_name(path, str(error))
        if name is None:
            raise CheckpointError(f"{path} is damaged or not a checkpoint: {_first_line(error)}") from error
        raise CheckpointError(
            f"checkpoint {path} contains pickled code ({name}), refused; convert it to safetensors"
        ) from error
    except Exception as error:  # whatever torch says of bytes that are not its own
        raise _refusal(path, error, "is not a checkpoint that torch can read") from error
    if isinstance(content, Mapping):
        return content
    raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors")


class _Bounded(io.BufferedReader):
    """A file that refuses to hand out more than a zip's directory at once."""

    def read(self, size: int | None = -1) -> bytes:
        wanted = os.fstat(self.fileno()).st_size - self.tell() if size is None or size < 0 else size
        if wanted > MAX_DIRECTORY:
            raise CheckpointError(f"{self.raw.name} has a directory of {wanted:,} bytes")  # type: ignore[attr-defined]
        return super().read(size)


def _check_zip(path: Path) -> None:
    """The directory as ``torch.save`` writes it, so that every reader finds the same entries, then the pickle."""
    with _Bounded(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:  # type: ignore[type-var]
        entries = archive.infolist()
    if not entries or min(entry.header_offset for entry in entries) or any(entry.compress_type for entry in entries):
        raise CheckpointError(
            f"{path} is packed in another way than torch packs checkpoints; save it again with torch"
        )
    large = [e.filename for e in entries if "/data/" not in e.filename and e.file_size > MAX_PICKLE]
    if large:
        raise CheckpointError(f"{path}: {large[0]} has more than {MAX_PICKLE:,} bytes beside the numbers")
    content = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
    PickleScan(str(path)).check(io.BytesIO(content))


def _check_old(path: Path, head: bytes) -> None:
    """The pickles in front of the numbers of a file from before torch 1.6."""
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        pass
    else:  # torch would try it as a tar archive first, and read headers as long as they say they are
        raise CheckpointError(f"{path} is a tar archive, not a checkpoint")
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(MAX_PICKLE))
        whole = not file.read(1)
    scan = PickleScan(str(path))
    try:
        for _ in range(_PICKLES):
            if not scan.check(stream):
                break
    except CheckpointError:
        raise
    except ValueError as error:
        if not whole and _CUT.search(str(error)):
            raise CheckpointError(f"{path} holds more than {MAX_PICKLE:,} bytes beside its numbers") from error
        raise


def _refused_name(path: Path, message: str) -> str | None:
    """The object that the unpickler refused."""
    refused = re.search(r"(?:GLOBAL|class|function|global:?) `?([A-Za-z_][\w.]*\.[\w.]*\w)", message)
    return refused[1] if refused else _first_global(path)


def _first_global(path: Path) -> str | None:
    """Name the first object that a bare pickle refers to, without executing anything."""
    strings: list[str] = []
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in pickletools.genops(io.BytesIO(file.read(MAX_PICKLE))):
                if opcode.name == "GLOBAL":
                    return str(argument).replace(" ", ".")
                if opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                    return ".".join(strings[-2:])
                if isinstance(argument, str):
                    strings = [*strings[-1:], argument]
    except (ValueError, OSError):
        pass
    return None


def _refusal(path: Path, error: Exception, otherwise: str) -> CheckpointError:
    if isinstance(error, EOFError) or _CUT.search(str(error)):
        return _cut(path)
    return CheckpointError(f"{path} {otherwise}: {_first_line(error)}")


def _cut(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is truncated; download or copy it again")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
