"""Forwards an image on wrapped transformers models: next-token, speculative Jacobi (same codes), ZipAR (a heuristic).

The models are the tiny random ones of tests/golden/hf, so the figures say what the loops do, not what a trained model gains:
random laws are hard to guess. Forwards do not depend on the load of the machine.

    python benchmarks/adapters.py
"""

from __future__ import annotations

from typing import Any

import torch
from _common import report, table, write_json

from tests.adapter_cases import case
from vargen.samplers.base import Sampler
from vargen.samplers.schedule.zipar import ZipARSampler
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler

GRIDS = {"janus": (4, 4), "emu3": (8, 8), "chameleon": (8, 8), "lumina": (6, 6), "glm_image": (6, 6), "emu3_5": (8, 8)}
WINDOWS = (8, 16)
IMAGES = 4
TEMPERATURES = {"sampled": 0.5, "greedy": 0.0}


def main() -> None:
    """Print the table and write benchmarks/results/adapters.json."""
    torch.set_num_threads(1)
    rows = [measure(name, grid, kind) for name, grid in GRIDS.items() for kind in TEMPERATURES]
    print(table(rows))
    print(write_json("adapters", report(images=IMAGES, temperatures=TEMPERATURES, forwards_per_image=rows)))


def measure(name: str, grid: tuple[int, int], kind: str) -> dict[str, object]:
    """Mean forwards of one image, prefill included, for every sampler."""
    c = case(name)
    backbone = c.backbone if name == "janus" else c.backbone.with_grid(*grid)
    ids = [row[mask.bool()] for row, mask in zip(c.prompts["input_ids"], c.prompts["attention_mask"], strict=True)]
    if name == "lumina":  # its prompts name the grid
        ids = [torch.cat([row[:-3], torch.tensor(backbone.header)]) for row in ids]
    prompts = [ids[i % 2] for i in range(IMAGES)]
    guided = name not in ("glm_image", "emu3_5")  # the latter's template needs a tokenizer
    settings: dict[str, Any] = {"guidance_scale": c.scale if guided else 1.0, "temperature": TEMPERATURES[kind]}
    samplers: dict[str, Sampler] = {"next-token": NextTokenSampler(**settings)}
    samplers |= {f"Jacobi {window}": SpeculativeJacobiSampler(window=window, **settings) for window in WINDOWS}
    for adaptive in (False, True):
        label = "ZipAR adaptive" if adaptive else "ZipAR"
        samplers[label] = ZipARSampler(window=grid[1] // 2, adaptive=adaptive, **settings)
    row: dict[str, object] = {"model": name, "mode": kind, "codes": backbone.num_codes}
    drawn: dict[str, torch.Tensor] = {}
    for label, sampler in samplers.items():
        out = sampler.sample(backbone, prompts, seeds=range(IMAGES))
        row[label] = float(torch.as_tensor(out.stats.forwards_per_image).float().mean())
        drawn[label] = torch.as_tensor(out.codes)
        if label.startswith("Jacobi") and not torch.equal(drawn[label], drawn["next-token"]):
            raise RuntimeError(f"{name}: {label} must give the codes of next-token sampling")
    return row


if __name__ == "__main__":
    main()
