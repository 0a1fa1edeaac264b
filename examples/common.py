"""What the example scripts share: arguments, a memory estimate before anything is loaded, one line where weights lack."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the Hugging Face Hub, and what it takes to run it."""

    repo: str
    licence: str
    parameters: float  # billions, all parts that are loaded
    layers: int
    kv_heads: int
    head_dim: int
    slots: int  # prompt and stream slots of one image, at the default size
    branches: int = 2  # 2 with guidance

    def weights_gb(self, bits: int = 16) -> float:
        """Size of the weights, on disk (16 bits) or quantised in memory."""
        return self.parameters * bits / 8

    def cache_gb(self, images: int) -> float:
        """Keys and values of a batch in 16 bits."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2 * self.slots * self.branches * images / 1e9

    def estimate(self, images: int, bits: int = 16) -> str:
        """One line: what a run needs."""
        total = self.weights_gb(bits) + self.cache_gb(images)
        return (
            f"{self.repo}: {self.weights_gb():.0f} GB to download, about {total:.0f} GB of memory for {images} image(s) "
            f"(weights {self.weights_gb(bits):.0f}, cache {self.cache_gb(images):.1f}); licence: {self.licence}"
        )


def arguments(description: str, **defaults: object) -> argparse.Namespace:
    """Read the command line; ``defaults`` become further options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("prompt", nargs="?", default="a red fox in a snowy forest")
    parser.add_argument("--model", help="folder or repository id; default: the checkpoint named in the script")
    parser.add_argument("--window", type=int, default=32, help="codes scored in one forward; 1 is next-token sampling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="image.png")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, type=type(value))
    return parser.parse_args()


def ready(checkpoint: Checkpoint, model: str | None, *, slots: int | None = None, images: int = 1) -> str:
    """Print the estimate for images of ``slots`` tokens; return what to load, or leave with one line if it is not there."""
    checkpoint = checkpoint if slots is None else replace(checkpoint, slots=slots)
    print(checkpoint.estimate(images))
    found = model or checkpoint.repo
    try:
        from pathlib import Path

        from huggingface_hub import snapshot_download

        if not Path(found).is_dir():
            snapshot_download(found, local_files_only=True, allow_patterns=["config.json"])
    except Exception:
        sys.exit(
            f"no weights of {found} on this machine: run `hf download {found}` ({checkpoint.weights_gb():.0f} GB), "
            "then this script again"
        )
    need = checkpoint.weights_gb() + checkpoint.cache_gb(images)
    if torch.cuda.is_available() and need > torch.cuda.get_device_properties(0).total_memory / 1e9:
        print(f"{need:.0f} GB is more than one GPU holds: weights will be spread by device_map, or quantise them")
    return found


def report(output: object, path: str) -> None:
    """Say how many forwards the image took and where it is."""
    stats = output.stats
    codes = output.codes.shape[1]
    print(f"{codes} codes in {stats.num_forwards} forwards ({stats.guarantee}), seed {output.seeds[0]}: {path}")
