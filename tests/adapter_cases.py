"""Tiny models of every family with reference numbers of the library's own ``generate`` (tests/golden/hf)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from vargen.adapters.wrap import wrap

HF = Path(__file__).parent / "golden" / "hf"


@dataclass
class Case:
    """One family (Chameleon: one layout) and what its adapter must reproduce."""

    backbone: Any
    prompts: dict[str, Tensor]
    greedy: dict[float, Tensor]  # guidance scale -> [B, N] codes
    logits4: dict[float, Tensor]  # guidance scale -> [G, B, 4, V], the first four codes
    forced: Tensor  # [B, N] codes
    forced_logits: Tensor  # [G, B, N, V]
    generate: Callable[[dict[str, Tensor], float], Tensor]  # the library's own greedy codes
    negative: Any = None
    pixels: dict[float, Tensor] | None = None  # [B, 3, H, W]

    @property
    def scale(self) -> float:
        return max(self.greedy)


def read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(HF / name / "io.safetensors"), json.loads((HF / name / "golden.json").read_text())


def load(name: str, class_name: str, **options: Any) -> Any:
    return getattr(transformers, class_name).from_pretrained(HF / name, **options).eval()


def janus(**options: Any) -> Case:
    io, meta = read("janus")
    model = load("janus", "JanusForConditionalGeneration", **options)
    backbone = wrap(model)
    scales = meta["guidance_scales"]

    def generate(prompts: dict[str, Tensor], scale: float) -> Tensor:
        inputs = {"inputs": prompts["input_ids"], "attention_mask": prompts["attention_mask"]}
        return model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=scale)

    return Case(
        backbone=backbone,
        prompts={"input_ids": io["prompt_ids"], "attention_mask": io["attention_mask"]},
        greedy={s: io[f"greedy.cfg{s:g}.tokens"] for s in scales},
        logits4={s: pair(io, f"greedy.cfg{s:g}", "logits4") for s in scales},
        forced=io["forced.tokens"],
        forced_logits=pair(io, "forced", "logits"),
        generate=generate,
        pixels={s: io[f"greedy.cfg{s:g}.pixels"].permute(0, 3, 1, 2) for s in scales},
    )


def pair(io: dict[str, Tensor], prefix: str, suffix: str) -> Tensor:
    return torch.stack([io[f"{prefix}.{branch}_{suffix}"] for branch in ("cond", "uncond")])


BUILDERS: dict[str, Callable[..., Case]] = {"janus": janus}


@cache
def case(name: str) -> Case:
    return BUILDERS[name]()
