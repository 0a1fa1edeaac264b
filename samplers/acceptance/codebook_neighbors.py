"""The neighbours of every code in its codebook: what LANTERN may count together (Jang et al., 2025, arXiv:2410.03355).

Distances are Euclidean between rows of the codebook as the tokenizer uses it. The released code takes the raw rows even
where the tokenizer normalises them; pass ``tokenizer.quantize.embedding.weight`` to reproduce its tables.

Letters: V codes, d code width, K neighbours held.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from vargen.validation.printable import printable

CHUNK_BYTES = 1 << 22  # of the distances looked at together: they stay in a core's cache
KEPT_TABLES = 4  # tables kept in memory between calls

_recent: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
_lock = Lock()


def nearest_codes(codebook: Tensor, k: int) -> Tensor:
    """Return the ``k`` nearest other codes of every code, nearest first; the lower id first where distances are equal.

    Args:
        codebook: ``[V, d]`` of any floating type.
        k: in 1..V-1.

    Returns:
        ``[V, k]`` int32 on the codebook's device.

    Raises:
        ValueError: not a matrix of finite numbers, or ``k`` out of range.
    """
    if codebook.ndim != 2 or not codebook.is_floating_point():
        raise ValueError(f"codebook must be [V, d] floating point, got {list(codebook.shape)} {codebook.dtype}")
    num_codes = len(codebook)
    if not 1 <= k < num_codes:
        raise ValueError(f"k must be in 1..{num_codes - 1}, the codebook size without the code itself, got {k}")
    if not bool(codebook.isfinite().all()):
        raise ValueError("the codebook holds NaN or infinity; check the tokenizer")
    points = codebook.detach().double()
    ids = torch.arange(num_codes, device=points.device)
    rows = max(1, CHUNK_BYTES // (8 * num_codes))
    table = [_nearest(points, part, k) for part in ids.split(rows)]
    return torch.cat(table).int()


def _nearest(points: Tensor, part: Tensor, k: int) -> Tensor:
    # squared distances in double: the product form is exact enough there, and equal rows give equal numbers
    norms = points.square().sum(-1)
    distance = torch.addmm(norms, points[part], points.T, alpha=-2.0)  # less the norm of the row: no order changes
    distance[torch.arange(len(part), device=part.device), part] = float("inf")  # a code is not its own neighbour
    if 2 * k > points.shape[0]:
        return distance.argsort(dim=-1, stable=True)[:, :k]
    values, ids = distance.topk(k, largest=False)
    ids, order = ids.sort(-1)  # by id first, so that the stable sort by distance keeps the lower id first
    ids = ids.gather(-1, values.gather(-1, order).argsort(dim=-1, stable=True))
    tied = (distance <= values.amax(-1, keepdim=True)).sum(-1) > k  # equal distances in and out: take the lower ids
    ids[tied] = distance[tied].argsort(dim=-1, stable=True)[:, :k]
    return ids


def neighbor_table(codebook: Tensor, k: int, folder: str | Path | None = None) -> Tensor:
    """Return ``nearest_codes(codebook, k)``, computed once per codebook and kept in memory.

    Args:
        codebook: ``[V, d]``; for a tokenizer as used, ``tokenizer.codebook``.
        k: neighbours.
        folder: also keep the table in a file of this folder; tables of large codebooks take seconds to make.

    Returns:
        ``[V, k]`` int32 on the codebook's device.
    """
    key = (codebook_digest(codebook), k)
    with _lock:
        table = _recent.get(key)
    if table is None:
        path = None if folder is None else Path(folder) / f"neighbors-{key[0][:16]}-{k}.safetensors"
        table = _read(path, key) if path is not None and path.is_file() else None
        if table is None:
            table = nearest_codes(codebook, k)
            if path is not None:
                _write(path, table, key)
        with _lock:
            _recent[key] = table
            while len(_recent) > KEPT_TABLES:
                _recent.popitem(last=False)
    return table.to(codebook.device)


def codebook_digest(codebook: Tensor) -> str:
    """SHA-256 of a codebook's float32 values and shape, as 64 hexadecimal digits."""
    values = codebook.detach().float().cpu().contiguous()
    digest = hashlib.sha256(str(tuple(values.shape)).encode())
    digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, key: tuple[str, int]) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            stored = file.metadata() or {}
            return file.get_tensor("neighbors") if stored.get("codebook_sha256") == key[0] else None
    except (OSError, SafetensorError):
        return None  # half a file of a killed process: make it again


def _write(path: Path, table: Tensor, key: tuple[str, int]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    beside = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"neighbors": table.cpu()}, beside, metadata={"metric": "l2", "codebook_sha256": key[0]})
        beside.replace(path)
    except (OSError, SafetensorError) as error:  # a full disk, a limit on file sizes
        beside.unlink(missing_ok=True)
        raise ValueError(f"cannot write {printable(path)}: {printable(error)}") from error
