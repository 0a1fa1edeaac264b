"""Models that benchmarks of speculation draw from: the flat synthetic one, shipped ones, LlamaGen-B with random weights.

Random weights of the usual scale draw almost independent codes, which any guess fits. "hard" and "easy" stand for what trained
models do: both hold about six nats a code; in "hard" the distribution moves far with the neighbouring code (attention and
feed-forward weights doubled, class embedding times 20, code embedding times 100), in "easy" it does not (code embedding as drawn).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from _common import ROOT

from vargen.kernels.warp import warp_logits

sys.path.insert(0, str(ROOT))  # the synthetic model lives with the tests

PROMPTS = ("deep elf with a red cloak and a great sword", "minotaur", "wizard hat", "red cloak")
LLAMAGEN = {"guidance_scale": 4.0, "top_k": 2000}
NATS = {"hard": 6.0, "easy": 5.6}  # of the distribution behind guidance and top-k
CODES = {"hard": 100.0, "easy": 1.0}  # what the code embedding is multiplied by
SEED = 0


@dataclass
class Subject:
    """A model to draw from."""

    backbone: Any
    drafter: Any  # or None
    conditions: Any  # [P, ...]
    settings: dict[str, Any]
    title: str


def load(name: str, dtype: torch.dtype = torch.float32, side: int = 16) -> Subject:
    """The flat model ("synthetic"), "llamagen-b-hard", "llamagen-b-easy", or a pipeline by name or folder."""
    if name == "synthetic":
        from tests.toys import SpatialBackbone, perturbed

        backbone = SpatialBackbone()
        title = "synthetic flat model, 16 x 16, V = 256, top-k 128"
        return Subject(backbone, perturbed(backbone, 0.3), torch.zeros(1, dtype=torch.int64), {"top_k": 128}, title)
    if name.startswith("llamagen-b-"):
        kind = name.removeprefix("llamagen-b-")
        title = f"LlamaGen-B, random weights, {kind}, {side} x {side} codes, {str(dtype).removeprefix('torch.')}"
        return Subject(llamagen_b(kind, dtype, side), None, torch.arange(8) * 117, LLAMAGEN, title)
    from vargen.pipelines.image import ImagePipeline

    pipe = ImagePipeline.from_pretrained(name)
    settings = {key: pipe.sampler.config[key] for key in ("guidance_scale", "temperature", "top_k", "top_p")}
    return Subject(pipe.backbone, pipe.drafter, pipe.conditioner.encode(list(PROMPTS)), settings, name)


@torch.no_grad()
def llamagen_b(kind: str, dtype: torch.dtype, side: int) -> Any:
    """LlamaGen-B whose head is scaled until the distributions hold the nats of ``kind``."""
    from vargen.backbones.llamagen.model import LlamaGenTransformer

    torch.manual_seed(SEED)
    model = LlamaGenTransformer.from_size("B", grid_size=(side, side)).eval()
    torch.nn.init.normal_(model.output.weight, std=0.02)
    for layer in model.layers:
        for linear in (layer.attention.wqkv, layer.attention.wo, layer.feed_forward.w2):
            linear.weight.mul_(2.0)
    model.cls_embedding.embedding_table.weight.mul_(20.0)
    model.tok_embeddings.weight.mul_(CODES[kind])
    low, high = 0.01, 1000.0
    rows = _rows(model)
    for _ in range(30):
        middle = (low * high) ** 0.5
        law = warp_logits(middle * rows, **LLAMAGEN).softmax(-1)
        entropy = float(torch.special.entr(law).sum(-1).mean())
        low, high = (middle, high) if entropy > NATS[kind] else (low, middle)
    model.output.weight.mul_(low)
    return model.to(dtype)


def _rows(model: Any) -> torch.Tensor:
    """Logits ``[G, 1, 64, V]`` behind random codes."""
    prepared = model.prepare(torch.tensor([207]), guidance_scale=LLAMAGEN["guidance_scale"])
    session, _ = model.open(prepared, max_window=64)
    codes = torch.randint(model.codebook_size, (1, 64), generator=torch.Generator().manual_seed(SEED))
    rows: torch.Tensor = model.step(session, codes).logits
    return rows
