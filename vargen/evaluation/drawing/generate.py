"""Draw many images with a pipeline: fixed chunks of seeds, any number of processes, runs that can be killed and go on.

Image i uses seed ``seed + i`` and condition i, and is always decoded in the same chunk: an image does not depend on
the others of its batch, but the last bit of a logit may depend on the shape of the batch, and a near-tie on that bit.
Processes share nothing but the folder (see ``vargen.evaluation.drawing.claims``): a slow one draws fewer chunks, and the
chunk of a dead one is drawn by another.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vargen.evaluation.conditions import Conditions
from vargen.evaluation.drawing.claims import Claims
from vargen.evaluation.drawing.run_folder import RunFolder, RunImages
from vargen.evaluation.features import Progress
from vargen.evaluation.images import write_npz
from vargen.files import WriteError, atomic_write
from vargen.images import Rounding, quantise
from vargen.validation.printable import printable, shown
from vargen.validation.reading import local_path

if TYPE_CHECKING:
    from vargen.pipelines.image import ImagePipeline

CHUNK = 64  # images decoded together, always; part of the protocol
TIMEOUT = 1800.0  # seconds without any finished chunk after which waiting for another process ends
MAX_TIMEOUT = 1e7
_POLL = 0.5  # seconds between looks at what other processes have finished

Measure = Callable[[Tensor, int], np.ndarray]  # (uint8 [n, 3, H, W], number of the first image) -> array of length n


@dataclass
class Generated:
    """A finished run, and what drawing it took over all processes and interruptions."""

    run: RunFolder
    seeds: list[int]
    num_drawn: int = 0  # images drawn by this process, not found or drawn by another
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        """N, how many there are."""
        return len(self.seeds)

    def measured(self, name: str) -> np.ndarray:
        """Return ``[N, ...]`` of what a function measured, as a memory map: large runs need no memory."""
        path = self._map(name)
        with atomic_write(path, overwrite=True) as beside, open(beside, "wb") as stream:
            for index, part in enumerate(self.run.measured(name)):
                if index == 0:
                    header = np.lib.format.header_data_from_array_1_0(part)
                    header["shape"] = (self.num_images, *part.shape[1:])
                    np.lib.format.write_array_header_1_0(stream, header)  # type: ignore[arg-type]
                stream.write(np.ascontiguousarray(part).data)
        return np.load(path, mmap_mode="c")

    def discard_maps(self) -> None:
        """Delete the files behind ``measured``; its arrays stay readable where the system allows it."""
        for path in self._map("*").parent.glob("*.npy"):
            path.unlink(missing_ok=True)

    def _map(self, name: str) -> Path:
        return self.run.path / "measured" / f"{name}.npy"

    def decode_record(self) -> dict[str, Any]:
        """Return speed and forward counts as plain JSON values; ``images_per_second`` is that of one process."""
        seconds = sum(r["seconds"] for r in self.records)
        each = [r["forwards_per_image"] for r in self.records if r["forwards_per_image"] is not None]
        guarantees = {r["guarantee"] for r in self.records}
        return {
            "images": self.num_images,
            "seconds": round(seconds, 3),
            "images_per_second": round(self.num_images / max(seconds, 1e-9), 3),
            "num_forwards": sum(r["num_forwards"] for r in self.records),
            "num_drafter_forwards": sum(r["num_drafter_forwards"] for r in self.records),
            "forwards_per_image": sum(each) / self.num_images if each else None,
            "guarantee": guarantees.pop() if len(guarantees) == 1 else "; ".join(sorted(map(str, guarantees))),
            "notes": list(dict.fromkeys(note for r in self.records for note in r["notes"])),
        }


def generate(
    pipe: ImagePipeline,
    conditions: Conditions,
    folder: str | Path,
    *,
    seed: int = 0,
    chunk: int = CHUNK,
    rounding: Rounding = "nearest",
    settings: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
    measures: Mapping[str, Measure] | None = None,
    keep_images: bool = True,
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
) -> Generated:
    """Draw one image a condition into a folder, together with every other process that does the same.

    Args:
        pipe: called as ``pipe(prompt=[...], seed=[...], output_type="pt", **settings)``.
        conditions: one an image.
        folder: output; finished chunks of an interrupted run with the same settings are used again, damaged ones are
            drawn anew.
        seed: image i uses ``seed + i``.
        chunk: images decoded together. The last chunk is filled up and the surplus dropped, so that image i does not
            depend on how many images were asked for.
        rounding: how pixels become 8 bits.
        settings: keywords of the pipeline call, such as ``guidance_scale``.
        record: what else must agree for chunks to be used again: model and sampler, in plain JSON values.
        measures: functions of the images whose results are kept, under their names.
        keep_images: False keeps only what is measured, the digests and the first chunk.
        timeout: seconds to wait for the other processes while nothing gets finished.
        progress: called after every chunk.

    Raises:
        ValueError: the folder holds the images of other settings, the disk is full, or another process hangs.
    """
    if chunk < 1 or len(conditions) < 1:
        raise ValueError(f"chunk and the number of images must be at least 1, got {chunk} and {len(conditions)}")
    if not 0 < timeout <= MAX_TIMEOUT:  # NaN would wait for ever
        raise ValueError(f"timeout must be greater than 0 and at most {MAX_TIMEOUT:.0f} seconds, got {shown(timeout)}")
    num, measures = len(conditions), measures or {}
    chunk = min(chunk, num)
    manifest: dict[str, Any] = {
        "num": num,
        "seed": seed,
        "chunk": chunk,
        "rounding": rounding,
        "conditions": conditions.digest(),
    }
    manifest |= {"settings": settings or {}, **(record or {}), **({} if keep_images else {"keep_images": False})}
    run = RunFolder(local_path(folder), manifest, num=num, chunk=chunk, keep_images=keep_images)
    artist = _Artist(pipe, conditions, [(seed + i) % 2**64 for i in range(num)], rounding, settings or {})
    generated = Generated(run, artist.seeds)
    try:
        _finish(run, artist, measures, generated, timeout, progress)
    except OSError as error:
        kept = sum(run.record(start) is not None for start in run.starts) * chunk
        where = error.filename if isinstance(error, WriteError) else f"into {folder}"
        raise ValueError(
            f"cannot write {printable(where)}: {error.strerror or error}; {min(kept, num)} of {num} images are kept: "
            "make room and run the same command again"
        ) from error
    generated.records = run.records()
    return generated


def process_rank() -> int:
    """Return this process's number under ``accelerate launch`` or torchrun, 0 without them."""
    return int(os.environ.get("RANK", "0") or 0)


def ordered_images(folder: str | Path, count: int | None = None) -> torch.Tensor:
    """Return the first ``count`` images of a run by seed, uint8 ``[n, 3, H, W]``."""
    images = RunImages(folder)
    return images.first(count or images.num_images)


def pack(generated: Generated, path: str | Path) -> None:
    """Write the images of a run as the shuffled npz that ADM's evaluator reads, see ``write_npz``."""
    seeds = np.array(generated.seeds, dtype=np.uint64)
    write_npz(path, RunImages(generated.run.path).pixels(), extra={"seeds": seeds})


def _finish(
    run: RunFolder,
    artist: _Artist,
    measures: Mapping[str, Measure],
    generated: Generated,
    timeout: float,
    progress: Progress | None,
) -> None:
    """Draw whatever no other process draws, until every chunk is there."""
    claims, names = Claims(run.path / "claims"), set(measures)
    pending, last_news = list(run.starts), time.monotonic()
    while pending:
        left: list[int] = []
        for index, start in enumerate(pending):
            if not run.has(start, names):
                with claims.hold(f"{start:08d}") as ours:
                    if not ours:
                        left.append(start)
                        continue
                    if not run.has(start, names):  # it may have been finished between the two looks
                        generated.num_drawn += _make(run, artist, start, measures)
            last_news = time.monotonic()
            if progress is not None:
                missing = len(left) + len(pending) - index - 1
                progress("drawing", min((len(run.starts) - missing) * run.chunk, run.num), run.num)
        if left and time.monotonic() - last_news > timeout:
            raise ValueError(
                f"nothing was finished for {timeout:.0f} s while {claims.holder(f'{left[0]:08d}')} draws the images from "
                f"{left[0]} on; stop it and run the same command again"
            )
        if left:
            time.sleep(_POLL)
        pending = left
    claims.sweep()


def _make(run: RunFolder, artist: _Artist, start: int, measures: Mapping[str, Measure]) -> int:
    """Draw and measure a chunk, or measure what is missing of a drawn one; return how many images were drawn."""
    stop, images = min(start + run.chunk, run.num), run.images(start)
    missing = {n: m for n, m in measures.items() if images is None or not run.has(start, {n})}
    if images is not None:
        run.add(start, {name: measure(images, start) for name, measure in missing.items()})
        return 0
    images, details = artist.draw(start, stop, run.chunk)
    run.write(start, images, {name: measure(images, start) for name, measure in missing.items()}, details)
    return stop - start


@dataclass(frozen=True)
class _Artist:
    """Draws chunks."""

    pipe: ImagePipeline
    conditions: Conditions
    seeds: list[int]
    rounding: Rounding
    settings: dict[str, Any]

    def draw(self, start: int, stop: int, chunk: int) -> tuple[Tensor, dict[str, Any]]:
        """Return uint8 ``[n, 3, H, W]`` and what drawing them took."""
        surplus = chunk - (stop - start)  # fills the batch; its images are dropped
        arguments = self.conditions.arguments(start, stop)
        arguments = {name: values + values[:1] * surplus for name, values in arguments.items()}
        seeds = self.seeds[start:stop] + [(self.seeds[-1] + 1 + i) % 2**64 for i in range(surplus)]
        begun = time.perf_counter()
        output: Any = self.pipe(**arguments, seed=seeds, output_type="pt", **self.settings)
        images = quantise(output.images[: stop - start], self.rounding).cpu()
        stats = output.stats
        each = stats.forwards_per_image
        return images, {
            "seconds": time.perf_counter() - begun,
            "num_forwards": stats.num_forwards,
            "num_drafter_forwards": stats.num_drafter_forwards,
            "forwards_per_image": None if each is None else float(each[: stop - start].sum()),
            "guarantee": stats.guarantee,
            "notes": list(stats.notes),
        }
