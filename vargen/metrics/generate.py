"""Draw many images with a pipeline: fixed chunks of seeds, files written beside and renamed, runs that can go on.

Image i uses seed ``seed + i`` and condition i, and is always decoded in the same chunk: an image does not depend on
its neighbours, but the last bit of a logit may depend on the shape of the batch, and a near-tie on that bit.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vargen.files import atomic_write
from vargen.images import Rounding
from vargen.metrics.conditions import Conditions
from vargen.metrics.features import Progress
from vargen.metrics.images import NpzImages, quantise, write_npz

CHUNK = 64  # images decoded together, always; part of the protocol
_MANIFEST, _SAMPLES = "manifest.json", "samples.npz"


@dataclass
class Generated:
    """Where the images are and what drawing them took; ``seconds`` and forwards cover the chunks drawn by this run."""

    folder: Path
    num_images: int
    seeds: list[int]
    seconds: float = 0.0
    num_drawn: int = 0  # images drawn by this run, not found from an earlier one
    num_forwards: int = 0
    num_drafter_forwards: int = 0
    forwards_per_image: list[float] = field(default_factory=list)
    guarantee: str | None = None
    notes: list[str] = field(default_factory=list)

    def decode_record(self) -> dict[str, Any]:
        """Return speed and forward counts as plain JSON values; empty where every image was found on disk."""
        if not self.num_drawn:
            return {}
        each = float(np.mean(self.forwards_per_image)) if self.forwards_per_image else None
        return {
            "images": self.num_drawn,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.num_drawn / max(self.seconds, 1e-9), 3),
            "num_forwards": self.num_forwards,
            "num_drafter_forwards": self.num_drafter_forwards,
            "forwards_per_image": each,
            "guarantee": self.guarantee,
            "notes": self.notes,
        }


def generate(
    pipe: Any,
    conditions: Conditions,
    folder: str | Path,
    *,
    seed: int = 0,
    chunk: int = CHUNK,
    rounding: Rounding = "nearest",
    settings: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Generated:
    """Draw one image a condition into ``folder/samples.npz`` (see ``vargen.metrics.images.write_npz``).

    Args:
        pipe: called as ``pipe(prompt=[...], seed=[...], output_type="pt", **settings)``.
        conditions: one an image.
        folder: output; finished chunks of an interrupted run with the same settings are used again.
        seed: image i uses ``seed + i``.
        chunk: images decoded together. The last chunk is filled up and the surplus dropped, so that image i does not
            depend on how many images were asked for.
        rounding: how pixels become 8 bits.
        settings: keywords of the pipeline call, such as ``guidance_scale``.
        record: what else must agree for chunks to be used again: model and sampler, in plain JSON values.
        progress: called after every chunk.

    Raises:
        ValueError: the folder holds the images of other settings.
    """
    if chunk < 1 or len(conditions) < 1:
        raise ValueError(f"chunk and the number of images must be at least 1, got {chunk} and {len(conditions)}")
    folder, num = Path(folder), len(conditions)
    chunk = min(chunk, num)
    seeds = [(seed + i) % 2**64 for i in range(num)]
    manifest = {"num": num, "seed": seed, "chunk": chunk, "rounding": rounding, "conditions": conditions.digest()}
    _open_folder(folder, {**manifest, "settings": settings or {}, **(record or {})})
    generated = Generated(folder, num, seeds)
    if not (folder / _SAMPLES).is_file():
        shards = []
        for start in range(0, num, chunk):
            shard = folder / "shards" / f"{start:08d}.npy"
            if not shard.is_file():
                _draw_chunk(pipe, conditions, seeds, start, chunk, shard, rounding, settings or {}, generated)
            shards.append(shard)
            if progress is not None:
                progress("drawing", min(start + chunk, num), num)
        _pack(folder, shards, seeds)
    return generated


def ordered_images(folder: str | Path, count: int | None = None) -> torch.Tensor:
    """Return the first ``count`` images of a run by seed, uint8 ``[n, 3, H, W]`` (the file itself is shuffled)."""
    source = NpzImages(Path(folder) / _SAMPLES)
    with np.load(source.path, allow_pickle=False) as file:
        rank = torch.from_numpy(np.argsort(np.argsort(file["seeds"], kind="stable")))
    count = min(count or source.num_images, source.num_images)
    images = torch.empty(count, 3, *source.shape, dtype=torch.uint8)
    for batch, place in zip(source.batches(256), rank.split(256), strict=True):
        wanted = place < count
        images[place[wanted]] = batch[wanted]
    return images


def samples_file(folder: str | Path) -> Path:
    """Return the npz of a finished run."""
    return Path(folder) / _SAMPLES


def _draw_chunk(
    pipe: Any,
    conditions: Conditions,
    seeds: list[int],
    start: int,
    chunk: int,
    shard: Path,
    rounding: Rounding,
    settings: dict[str, Any],
    generated: Generated,
) -> None:
    stop = min(start + chunk, len(seeds))
    arguments = conditions.arguments(start, stop)
    surplus = chunk - (stop - start)  # fills the batch; its images are dropped
    arguments = {name: values + values[:1] * surplus for name, values in arguments.items()}
    drawn_seeds = seeds[start:stop] + [(seeds[-1] + 1 + i) % 2**64 for i in range(surplus)]
    begun = time.perf_counter()
    output = pipe(**arguments, seed=drawn_seeds, output_type="pt", **settings)
    images = quantise(output.images[: stop - start], rounding).permute(0, 2, 3, 1).cpu().numpy()
    generated.seconds += time.perf_counter() - begun
    stats = output.stats
    generated.num_drawn += stop - start
    generated.num_forwards += stats.num_forwards
    generated.num_drafter_forwards += stats.num_drafter_forwards
    if stats.forwards_per_image is not None:
        generated.forwards_per_image += stats.forwards_per_image[: stop - start].tolist()
    generated.guarantee = stats.guarantee
    generated.notes += [note for note in stats.notes if note not in generated.notes]
    shard.parent.mkdir(exist_ok=True)
    with atomic_write(shard, overwrite=True) as beside:
        np.save(beside, images)


def _open_folder(folder: Path, manifest: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}; choose another output folder") from error
    path = folder / _MANIFEST
    manifest = json.loads(json.dumps(manifest))
    if path.is_file():
        stored = json.loads(path.read_text())
        different = sorted(k for k in manifest.keys() | stored.keys() if manifest.get(k) != stored.get(k))
        if different:
            raise ValueError(
                f"{folder} holds images of another run (different {', '.join(different)}); choose another folder"
            )
        return
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no evaluation; choose another folder")
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(manifest, indent=1) + "\n")


def _pack(folder: Path, shards: list[Path], seeds: list[int]) -> None:
    write_npz(folder / _SAMPLES, _Shards(shards), extra={"seeds": np.array(seeds, dtype=np.uint64)})
    for shard in shards:
        shard.unlink()
    (folder / "shards").rmdir()


class _Shards:
    """Arrays on disk, seen as one that can be indexed by a vector; nothing is read before it is asked for."""

    def __init__(self, paths: list[Path]):
        self.arrays = [np.load(path, mmap_mode="r") for path in paths]
        self.size = len(self.arrays[0])
        self.shape = (sum(map(len, self.arrays)), *self.arrays[0].shape[1:])
        self.dtype, self.ndim = self.arrays[0].dtype, self.arrays[0].ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return np.stack([self.arrays[i // self.size][i % self.size] for i in index])
