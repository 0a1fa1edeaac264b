"""Rebuild the hero atlas from Debian's source package of Dungeon Crawl Stone Soup; write folders of heroes.

The curated list (which layers, what they are called, which id they have) is the shipped `atlas.json`; rebuilding
reads the same layers again from the tarball and refuses every tile whose licence is not clear: `cleared.json` holds
the digests of the tiles in the game's CC0 export, and a short list of newer submissions with the reason for each.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vargen.datasets.heroes.atlas import ATLAS_FOLDER
from vargen.datasets.heroes.compose import caption, sample_heroes
from vargen.files import atomic_dir, writing
from vargen.validation.pictures import open_image
from vargen.validation.reading import read_json

_ALPHA_THRESHOLD = 128  # alpha is 0 or 255 almost everywhere; a binary mask makes composition exact
_HEROES_PER_CHUNK = 256


def rebuild_atlas(tarball: str | Path | None, out: str | Path, *, overwrite: bool = False) -> Path:
    """Build `atlas.png` and `atlas.json` again from the source package.

    Args:
        tarball: the upstream file (`crawl_0.28.0.orig.tar.xz`); None fetches it with `apt-get source`, which needs a
            `deb-src` line for Debian bookworm.
        out: folder to write.
        overwrite: allow replacing the files of an existing, non-empty folder.

    Returns:
        The folder.

    Raises:
        ValueError: apt or the source package is not available, the tarball is missing, damaged or another version, a
            tile is missing or not cleared, or `out` cannot be written.
    """
    record = read_json(ATLAS_FOLDER / "atlas.json")
    out = Path(out)
    with atomic_dir(out, overwrite=overwrite) as folder, tempfile.TemporaryDirectory() as downloads:
        path = Path(tarball) if tarball is not None else _fetch(record["source"], Path(downloads))
        _check_digest(path, record["source"])
        tiles = _read_tiles(path, record)
        _check_licences(tiles)
        with writing(folder / "atlas.png"):
            Image.fromarray(_pack(tiles, record)).save(folder / "atlas.png", optimize=True)
        for name in ("atlas.json", "cleared.json"):
            shutil.copyfile(ATLAS_FOLDER / name, folder / name)
    return out


def compose_folder(n: int, out: str | Path, seed: int = 0, *, held_out: bool = False, overwrite: bool = False) -> Path:
    """Write n heroes as PNG files with their captions.

    Hero i is `sample_hero(seed + i)` and is called `000000.png` upwards; `captions.jsonl` has one line a hero with
    "file", "caption", "attributes", "visible" and "seed". The files appear only when all are written.

    Args:
        n: number of heroes, >= 1.
        out: folder to write.
        seed: of the first hero, in [0, 2^63 - n].
        held_out: only (base, hand1) pairs that training never shows.
        overwrite: allow replacing files of an existing, non-empty folder; files of other names are kept.

    Returns:
        The folder.

    Raises:
        ValueError: n or seed out of range, or `out` cannot be written.
    """
    if n < 1:
        raise ValueError(f"the number of heroes must be >= 1, got {n}")
    if not 0 <= seed <= 2**63 - n:
        raise ValueError(f"seed must be in [0, 2^63 - n], got {seed}")
    out = Path(out)
    with atomic_dir(out, overwrite=overwrite) as folder, _captions(folder) as lines:
        for start in range(0, n, _HEROES_PER_CHUNK):
            seeds = np.arange(seed + start, seed + min(start + _HEROES_PER_CHUNK, n))
            heroes = sample_heroes(seeds, pairs="held_out" if held_out else "all")
            for i, hero_seed in enumerate(seeds):
                name = f"{start + i:06d}.png"
                with writing(folder / name):
                    Image.fromarray(heroes.images[i]).save(folder / name)
                line = {
                    "file": name,
                    "caption": caption(heroes.attributes[i]),
                    "attributes": heroes.attributes[i].tolist(),
                    "visible": heroes.visible[i].tolist(),
                    "seed": int(hero_seed),
                }
                lines.write(json.dumps(line) + "\n")
    return out


@contextmanager
def _captions(folder: Path) -> Iterator[TextIO]:
    file = folder / "captions.jsonl"
    with writing(file), file.open("w") as lines:
        yield lines


def _fetch(source: dict[str, Any], folder: Path) -> Path:
    manual = f"or download {source['tarball']} yourself and pass its path"
    if shutil.which("apt-get") is None:
        raise ValueError(f"apt-get is not available here; run this on Debian bookworm, {manual}")
    command = ["apt-get", "source", "--download-only", source["package"]]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    path = folder / source["tarball"]
    # the exit status says nothing: the archive lacks the Debian diff of this version, the tarball arrives anyway
    if path.is_file():
        return path
    other = ", ".join(sorted(p.name for p in folder.glob("*.orig.tar.*")))
    if other:
        raise ValueError(f"apt-get delivered {other} instead of {source['tarball']}; use bookworm's deb-src, {manual}")
    reason = next((line for line in run.stderr.splitlines() if line.startswith("E:")), "E: no reason given")[3:]
    raise ValueError(
        f"apt-get could not fetch the source package ({reason}); add the line 'deb-src http://deb.debian.org/debian "
        f"bookworm main' to a file in /etc/apt/sources.list.d and run apt-get update, {manual}"
    )


def _check_digest(path: Path, source: dict[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source["sha256"]:
        raise ValueError(f"{path} is not {source['tarball']}: SHA-256 {digest}, expected {source['sha256']}")


def _read_tiles(path: Path, record: dict[str, Any]) -> dict[str, NDArray[np.uint8]]:
    """Read the listed layers, name -> (32, 32, 4) with binary alpha, without unpacking anything to disk."""
    size = record["tile_size"]
    wanted = {f"{record['source']['folder']}/{part['file']}": part["file"] for part in record["parts"]}
    tiles: dict[str, NDArray[np.uint8]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name in wanted and (file := archive.extractfile(member)) is not None:
                tile = np.array(open_image(io.BytesIO(file.read())).convert("RGBA"))
                tile = tile[:size, :size]  # a few layers carry an empty margin
                drawn = tile[..., 3:] >= _ALPHA_THRESHOLD
                tile[..., 3] = 255
                tiles[wanted[member.name]] = np.where(drawn, tile, np.uint8(0))
    missing = sorted(set(wanted.values()) - set(tiles))
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of {len(wanted)} layers, first {missing[0]}")
    return tiles


def _check_licences(tiles: dict[str, NDArray[np.uint8]]) -> None:
    cleared = read_json(ATLAS_FOLDER / "cleared.json")
    newer = {name: entry["sha256"] for name, entry in cleared["newer"].items()}
    digests = cleared["export"] | cleared["export_other"] | newer
    refused = [n for n, tile in sorted(tiles.items()) if hashlib.sha256(tile.tobytes()).hexdigest() != digests.get(n)]
    if refused:
        raise ValueError(
            f"{len(refused)} of {len(tiles)} tiles are neither those of the CC0 export nor on the list of newer "
            f"submissions in cleared.json, first {refused[0]}; use tiles whose licence is clear"
        )


def _pack(tiles: dict[str, NDArray[np.uint8]], record: dict[str, Any]) -> NDArray[np.uint8]:
    size, columns = record["tile_size"], record["columns"]
    rows = -(-len(record["parts"]) // columns)
    sheet = np.zeros((rows * size, columns * size, 4), dtype=np.uint8)
    for part in record["parts"]:
        tile = tiles[part["file"]]
        row, column = divmod(part["tile"], columns)
        target = sheet[row * size : (row + 1) * size, column * size : (column + 1) * size]
        target[:] = _derive(tile, part["derived"]) if "derived" in part else tile
    return sheet


def _derive(tile: NDArray[np.uint8], recipe: dict[str, Any]) -> NDArray[np.uint8]:
    """Recolour a tile, or cut out the pixels of some colours.

    Args:
        tile: (32, 32, 4) with binary alpha.
        recipe: "colours" maps RRGGBB to RRGGBB; "rows" and "columns" (first, past the last) say where, default
            everywhere; pixels not recoloured stay if "keep_rest", else they become transparent.
    """
    rows, columns = (slice(*recipe.get(side, (None,))) for side in ("rows", "columns"))
    derived = tile.copy() if recipe["keep_rest"] else np.zeros_like(tile)
    source, target = tile[rows, columns], derived[rows, columns]
    for old, new in recipe["colours"].items():
        target[(source == [*bytes.fromhex(old), 255]).all(-1)] = [*bytes.fromhex(new), 255]
    return derived
