"""Decode schedules beside next-token decoding: forward passes and seconds of one batch of 16x16 codes, in turns, in one run.

Three parts. `shipped`: heroes32-nar and heroes32-llamagen with their stored samplers. `equal`: models of one width with
random weights, next-token, PAR, any-order, masked and NAR; NAR once with as many blocks as the others and once with about
as many parameters (its second head is a table of its own). `published`: LlamaGen-B and NAR-B, random weights. Codes only:
the pixel decoder is the same for all.

    python benchmarks/schedules.py                       # shipped and equal, about four minutes on one core
    python benchmarks/schedules.py --parts published     # about five minutes
    python benchmarks/schedules.py --device cuda         # everything on a GPU
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _common import interleaved_medians, pin_to_core, report, table, write_json

from vargen.backbones.llamagen.any_order import AnyOrderTransformer
from vargen.backbones.llamagen.masked import MaskedTransformer
from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.backbones.nar.model import NARTransformer
from vargen.backbones.par.model import PARTransformer
from vargen.samplers.schedule.masked import MaskedSampler
from vargen.samplers.schedule.neighboring import NeighboringSampler
from vargen.samplers.schedule.parallel_group import ParallelGroupSampler
from vargen.samplers.window.next_token import NextTokenSampler

PARTS = ("shipped", "equal", "published")
SMALL: dict[str, Any] = {
    "dim": 160,
    "num_heads": 5,
    "ffn_dim": 384,
    "codebook_size": 4096,
    "grid_size": (16, 16),
    "rope_base": 100.0,
    "condition_rope": "identity",
}
NUM_BLOCKS = 6
GUIDANCE = 1.5
BATCHES = (1, 16)
REPEATS = 5


def randomized(model: Any, device: str) -> Any:
    """Give the heads weights, so that no law is flat."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "output" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model.eval().requires_grad_(False).to(device)


def pair_of_size(size: str, device: str) -> dict[str, tuple[Any, Any]]:
    """A published size of LlamaGen and NAR."""
    config = {"num_classes": 1000, "grid_size": (16, 16)}
    return {
        "next-token": (
            randomized(LlamaGenTransformer.from_size(size, **config), device),
            NextTokenSampler(guidance_scale=GUIDANCE),
        ),
        "neighboring": (
            randomized(NARTransformer.from_size(size, **config), device),
            NeighboringSampler(guidance_scale=GUIDANCE),
        ),
    }


def equal_models(device: str) -> dict[str, tuple[Any, Any]]:
    """Models of one width, one for each schedule; NAR's last block is its second head's own."""
    g = GUIDANCE
    return {
        "next-token": (
            randomized(LlamaGenTransformer(**SMALL, num_layers=NUM_BLOCKS), device),
            NextTokenSampler(guidance_scale=g),
        ),
        "par, M = 4": (
            randomized(PARTransformer(**SMALL, num_layers=NUM_BLOCKS, group_size=4), device),
            ParallelGroupSampler(guidance_scale=g),
        ),
        "any order, 32 groups": (
            randomized(AnyOrderTransformer(**SMALL, num_layers=NUM_BLOCKS), device),
            ParallelGroupSampler(guidance_scale=g, num_steps=32),
        ),
        "masked, 12 passes": (
            randomized(MaskedTransformer(**SMALL, num_layers=NUM_BLOCKS), device),
            MaskedSampler(guidance_scale=g, num_steps=12),
        ),
        "neighboring, equal blocks": (
            randomized(NARTransformer(**SMALL, num_layers=NUM_BLOCKS - 1), device),
            NeighboringSampler(guidance_scale=g),
        ),
        "neighboring, equal parameters": (
            randomized(NARTransformer(**SMALL, num_layers=NUM_BLOCKS - 3), device),
            NeighboringSampler(guidance_scale=g),
        ),
    }


def shipped_models(device: str) -> dict[str, tuple[Any, Any]]:
    """The shipped models with their own settings."""
    from vargen import ImagePipeline

    found = {}
    for name, model in (("next-token", "heroes32-llamagen"), ("neighboring", "heroes32-nar")):
        pipe = ImagePipeline.from_pretrained(model)
        sampler = NextTokenSampler.from_config(pipe.sampler.config) if name == "next-token" else pipe.sampler
        found[name] = (pipe.backbone.eval().requires_grad_(False).to(device), sampler)
    return found


def conditions(backbone: Any, batch: int, device: str) -> torch.Tensor:
    """Class labels, or attributes of test heroes."""
    if backbone.config.condition_type == "attributes":
        from vargen.datasets.heroes.compose import HeroesDataset

        return HeroesDataset(1, split="test").examples(np.arange(batch))["attributes"].to(device)
    return torch.arange(batch, device=device)


def measure(models: dict[str, tuple[Any, Any]], batch: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """Seconds of one batch with every model, in turns; the first is the reference."""
    forwards: dict[str, int] = {}

    def runner(name: str) -> Callable[[], None]:
        backbone, sampler = models[name]
        condition = conditions(backbone, batch, device)

        def run() -> None:
            forwards[name] = sampler.sample(backbone, condition, seeds=range(batch)).stats.num_forwards
            if device != "cpu":
                torch.cuda.synchronize()

        return run

    clock = time.process_time if device == "cpu" else time.perf_counter  # one thread: other processes do not count
    seconds = interleaved_medians({name: runner(name) for name in models}, repeats, clock)
    first = next(iter(models))
    return [
        {
            "schedule": name,
            "parameters": sum(p.numel() for p in models[name][0].parameters()),
            "batch": batch,
            "forwards": forwards[name],
            "seconds": seconds[name],
            "images/s": batch / seconds[name],
            "speed-up": seconds[first] / seconds[name],
        }
        for name in models
    ]


def main() -> None:
    """Measure the parts that are asked for, print tables, write `results/schedules_<device>.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["shipped", "equal"])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--size", default="B", help="of the published part")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    options = parser.parse_args()
    if options.device == "cpu":
        pin_to_core(options.core)
    makers = {
        "shipped": lambda: shipped_models(options.device),
        "equal": lambda: equal_models(options.device),
        "published": lambda: pair_of_size(options.size, options.device),
    }
    results: dict[str, Any] = {}
    for part in options.parts:
        models = makers[part]()
        results[part] = [
            row for batch in options.batches for row in measure(models, batch, options.repeats, options.device)
        ]
        print(f"{part}\n{table(results[part])}\n")
    if not options.dry:
        name = "schedules" if options.parts == ["shipped", "equal"] else "schedules_" + "_".join(options.parts)
        print(write_json(f"{name}_{options.device}", report(guidance_scale=GUIDANCE, **results)))


if __name__ == "__main__":
    main()
