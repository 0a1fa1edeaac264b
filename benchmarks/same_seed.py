"""Same seed, same codes: speculative Jacobi decoding with shared noise beside next-token sampling, image by image.

Logits of another window shape differ by rounding and can flip a near-tie; every image that differs is listed with the
first position that does, and so is every near-tie (the two best candidates less than 1e-5 apart), whether it flipped or not.

    python benchmarks/same_seed.py --num 256
    python benchmarks/same_seed.py --model llamagen-b-hard --num 16 --batch 4
"""

from __future__ import annotations

import argparse

import torch
from _common import RESULTS, report, table, write_json
from _models import load

from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.near_ties import near_ties
from vargen.samplers.window.next_token import NextTokenSampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="heroes32-llamagen", help="a pipeline, llamagen-b-hard or -easy")
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--window", default="auto", type=lambda text: int(text) if text.isdigit() else text)
    arguments = parser.parse_args()
    subject = load(arguments.model)
    plain = NextTokenSampler(**subject.settings)
    fast = SpeculativeJacobiSampler(window=arguments.window, **subject.settings)
    rows, ties, forwards, stem = [], [], [], "same-seed"
    stem += "" if arguments.model == "heroes32-llamagen" else f"-{arguments.model}"
    stem += "" if arguments.window == 32 else f"-{arguments.window}"
    for start in range(0, arguments.num, arguments.batch):
        seeds = list(range(start, min(start + arguments.batch, arguments.num)))
        condition = subject.conditions[torch.tensor(seeds) % len(subject.conditions)]
        first = plain.sample(subject.backbone, condition, seeds=seeds)
        out = fast.sample(subject.backbone, condition, seeds=seeds)
        differs = first.codes != out.codes
        for seed, image in zip(seeds, differs, strict=True):
            if bool(image.any()):
                rows.append({"seed": seed, "first position": int(image.int().argmax())})
        ties += [vars(tie) for tie in near_ties(plain, subject.backbone, condition, first.codes, seeds=seeds)]
        forwards += out.stats.forwards_per_image.tolist()
        summary = {
            "images": len(forwards),
            "images that differ": len(rows),
            "near ties": len(ties),
            "forwards per image": round(sum(forwards) / len(forwards), 2),
        }
        found = {"model": subject.title, "window": arguments.window, **summary, "rows": rows, "ties": ties}
        write_json(stem, report(**found))
    print(RESULTS / f"{stem}.json")
    print(table([summary]))


if __name__ == "__main__":
    main()
