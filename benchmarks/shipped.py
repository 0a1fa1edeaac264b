"""What a picture of each shipped model costs: several captions, several rounds, codes alone and pictures.

Every model draws the same captions with its stored settings, in turns, on one core with one thread; the clock is CPU time, which
leaves out other processes (they still take caches and memory: quiet machines give the better numbers). A round at batch 1 is the
mean over all captions, one call each; a round at batch 16 is one call. *Codes* end before the tokenizer's decoder, *pictures*
behind it: that is what a call costs. Rows hold the median round, the fastest and the slowest, and the time beside
``heroes32-llamagen`` with next-token sampling, pictures both.

    python benchmarks/shipped.py    # about four minutes on one core
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from _common import pin_to_core, report, table, write_json

from vargen.datasets.heroes.compose import HeroesDataset, caption
from vargen.pipelines.image import ImagePipeline
from vargen.samplers.window.next_token import NextTokenSampler

NUM_CAPTIONS = 8
BATCHES = (1, 16)
NEXT = "heroes32-llamagen, next-token"
MODELS = (NEXT, "heroes32-llamagen", "heroes32-var", "heroes32-nar", "heroes32-mar", "heroes32-mar-causal")


def load(name: str) -> ImagePipeline:
    """A shipped pipeline as it is stored, or with the sampler that its name says."""
    pipe = ImagePipeline.from_pretrained(name.split(",")[0])
    pipe.set_progress_bar_config(disable=True)
    if name == NEXT:
        pipe.sampler = NextTokenSampler.from_config(pipe.sampler.config)
    return pipe


def seconds_of(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and what it returned."""
    start = time.process_time()
    output = call()
    return time.process_time() - start, output


def round_of(pipe: ImagePipeline, prompts: list[str], batch: int, output_type: str) -> tuple[float, float]:
    """Seconds and forward passes a picture, mean over the prompts."""
    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    if batch > len(prompts):
        groups = [[prompts[i % len(prompts)] for i in range(batch)]]
    spent, passes, count = 0.0, 0.0, 0
    for first, group in enumerate(groups):
        seeds = [first * batch + i for i in range(len(group))]
        taken, output = seconds_of(lambda g=group, s=seeds: pipe(g, seed=s, output_type=output_type))
        spent += taken
        each = output.stats.forwards_per_image
        passes += output.stats.num_forwards * len(group) if each is None else float(each.double().sum())
        count += len(group)
    return spent / count, passes / count


def measure(pipes: dict[str, ImagePipeline], prompts: list[str], batch: int, rounds: int) -> list[dict[str, Any]]:
    """A row a model; the models take turns."""
    spent: dict[str, dict[str, list[float]]] = {name: {"latent": [], "pt": []} for name in pipes}
    passes: dict[str, float] = {}
    for done in range(rounds + 1):
        for name, pipe in pipes.items():
            for kind in ("latent", "pt"):
                seconds, passes[name] = round_of(pipe, prompts, batch, "codes" if kind == "latent" else "pt")
                if done:  # the first round warms up
                    spent[name][kind].append(seconds)
    first = statistics.median(spent[MODELS[0]]["pt"])
    return [
        {
            "model": name,
            "batch": batch,
            "forwards": round(passes[name], 2),
            "codes s": statistics.median(taken["latent"]),
            "pictures s": statistics.median(taken["pt"]),
            "fastest round": min(taken["pt"]),
            "slowest round": max(taken["pt"]),
            "time ratio": statistics.median(taken["pt"]) / first,
        }
        for name, taken in spent.items()
    ]


def main() -> None:
    """Measure, print a table, write `results/shipped.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    options = parser.parse_args()
    pin_to_core(options.core)
    attributes = HeroesDataset(1, split="test").examples(np.arange(NUM_CAPTIONS))["attributes"]
    prompts = [caption(row) for row in attributes.numpy()]
    pipes = {name: load(name) for name in MODELS}
    rows = [row for batch in BATCHES for row in measure(pipes, prompts, batch, options.rounds)]
    print(table(rows))
    content = report(clock="CPU time, one thread", captions=NUM_CAPTIONS, rounds=options.rounds, rows=rows)
    print("wrote", write_json("shipped", content))


if __name__ == "__main__":
    main()
