"""Same seed, same codes: speculative Jacobi decoding with shared noise beside next-token sampling, image by image.

Logits of another window shape differ by rounding and can flip a near-tie; every image that differs is listed with the
first position that does.

    python benchmarks/same_seed.py --num 256
"""

from __future__ import annotations

import argparse

import torch
from _common import report, table, write_json

from vargen.pipelines.image import ImagePipeline
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler

PROMPTS = ("deep elf with a red cloak and a great sword", "minotaur", "wizard hat", "red cloak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="heroes32-llamagen")
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--window", type=int, default=32)
    arguments = parser.parse_args()
    pipe = ImagePipeline.from_pretrained(arguments.model)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(arguments.num)]
    options = {"seed": list(range(arguments.num)), "output_type": "codes", "batch_size": 32}
    plain = pipe(prompts, **options)
    pipe.sampler = SpeculativeJacobiSampler.from_config(pipe.sampler.config, window=arguments.window)
    fast = pipe(prompts, **options)
    differs = plain.codes != fast.codes
    rows = [
        {"seed": seed, "first position": int(differs[seed].int().argmax())}
        for seed in range(arguments.num)
        if bool(differs[seed].any())
    ]
    mean = float(torch.as_tensor(fast.stats.forwards_per_image).double().mean())
    summary = {"images": arguments.num, "images that differ": len(rows), "forwards per image": mean}
    write_json("same-seed", report(model=arguments.model, window=arguments.window, **summary, rows=rows))
    print(table([summary]))


if __name__ == "__main__":
    main()
