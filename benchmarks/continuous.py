"""Continuous tokens on one CPU core: what a pass, a head row and a draft cost, and what they buy, in one table.

Next-token decoding of the causal model, exact speculation with its distilled drafter (also where chains end early, at a noise
that lets drafts pass), and masked decoding of the bidirectional model in 8, 16, 32 and as many passes as tokens, with and
without DiSA's shorter chains. All draw heroes for the same attributes with the same seeds; FD-Lite0-112 against fresh heroes stands beside its floor (fresh
heroes against others). Head rows are rows of the target's head, the drafter's beside them.

    python benchmarks/continuous.py --images 512
    python benchmarks/continuous.py --tiny          # random weights, seconds; shows that it runs
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import pin_to_core, report, table, write_json
from diffusers import AutoencoderKL
from torch import Tensor

from vargen.backbones.mar.causal import CausalMARTransformer
from vargen.backbones.mar.model import MARTransformer
from vargen.datasets.heroes.compose import HeroAtlas
from vargen.evaluation.features import extract, extract_cached
from vargen.images import TensorImages, to_uint8
from vargen.metrics.frechet import statistics_distance
from vargen.metrics.heroes import draw_heroes
from vargen.metrics.networks.registry import feature_network
from vargen.samplers.schedule.masked_continuous import ContinuousMaskedSampler
from vargen.samplers.window.continuous_speculative import ContinuousSpeculativeSampler
from vargen.training.tasks.kl import load_autoencoder
from vargen.training.tasks.mar import load_continuous

CHUNK = 64  # images at a time; fixed, so that rounding does not differ between runs
PASSES = (8, 16, 32, 64)
DISA = {"num_diffusion_steps": 25, "last_diffusion_steps": 5, "last_timestep": 950}  # 25 is the heroes' own
# chains without the training steps below 100: a token's last noise then has spread 0.14 and drafts can pass
EARLY = {"num_diffusion_steps": "0,3,3,3,3,3,3,2,2,2"}


def candidates(guidance_scale: float, temperature: float, num_tokens: int) -> dict[str, tuple[str, Any]]:
    """Row name to which model it runs and its sampler."""
    shared = {"guidance_scale": guidance_scale, "temperature": temperature, "guidance_schedule": "constant"}
    loose = {"guidance_scale": 1.0, "temperature": 1.0, **EARLY}  # the settings under which most drafts pass
    causal = {
        "next-token": ContinuousSpeculativeSampler(num_draft_tokens=0, **shared),
        "exact, gamma 4": ContinuousSpeculativeSampler(num_draft_tokens=4, **shared),
        "next-token, early end": ContinuousSpeculativeSampler(num_draft_tokens=0, **loose),
        "exact, gamma 4, early end": ContinuousSpeculativeSampler(num_draft_tokens=4, **loose),
    }
    masked = {}
    for count in sorted({min(count, num_tokens) for count in PASSES}):
        masked[f"masked, {count} passes"] = ContinuousMaskedSampler(num_steps=count, **shared)
    for count in sorted({min(count, num_tokens) for count in (16, 64)}):
        masked[f"masked, {count} passes, DiSA"] = ContinuousMaskedSampler(num_steps=count, **DISA, **shared)
    rows = {name: ("causal", sampler) for name, sampler in causal.items()}
    return rows | {name: ("masked", sampler) for name, sampler in masked.items()}


@torch.no_grad()
def run(sampler: Any, model: Any, drafter: Any, autoencoder: AutoencoderKL, attributes: Tensor) -> dict[str, Any]:
    """Draw all images, the chunks one after the other; pixels are not part of the seconds."""
    images, seconds, total = [], 0.0, {"forwards": 0, "head rows": 0, "draft forwards": 0}
    extra: dict[str, int] = {}
    for start in range(0, len(attributes), CHUNK):
        part = attributes[start : start + CHUNK]
        begin = time.perf_counter()
        output = sampler.sample(model, part, seeds=range(start, start + len(part)), drafter=drafter)
        seconds += time.perf_counter() - begin
        stats = output.stats
        total["forwards"] += int(stats.forwards_per_image.sum())
        total["head rows"] += stats.num_head_rows
        total["draft forwards"] += stats.num_drafter_forwards
        extra = {name: extra.get(name, 0) + value for name, value in stats.extra.items()}
        latents = model.to_latents(output.latents) / autoencoder.config.scaling_factor
        images.append(to_uint8(autoencoder.decode(latents).sample, "nearest"))
    count = len(attributes)
    tested = extra.get("num_tested", 0)
    return {
        "images": torch.cat(images),
        "forwards an image": round(total["forwards"] / count, 2),
        "head rows an image": round(total["head rows"] / count, 1),
        "draft head rows an image": round(extra.get("num_draft_head_rows", 0) / count, 1),
        "accepted": round(extra["num_accepted"] / tested, 3) if tested else None,
        "capped": extra.get("num_capped", 0),
        "ms an image": round(1000 * seconds / count, 2),
        "guarantee": output.stats.guarantee,
    }


def tiny() -> tuple[dict[str, Any], Any, AutoencoderKL]:
    """Random weights of a few thousand parameters."""
    torch.manual_seed(0)
    atlas = HeroAtlas.load()
    shared: dict[str, Any] = {
        "grid_size": (8, 8), "latent_channels": 2, "patch_size": 2, "condition_type": "attributes", "head_depth": 1,
        "head_width": 16, "num_attributes": atlas.num_attributes, "num_condition_tokens": len(atlas.slots),
        "num_sampling_steps": "5", "last_timestep": 900,
    }  # fmt: skip
    half = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
            (("dim", 16), ("depth", 1), ("num_heads", 2))}  # fmt: skip
    causal = {"dim": 16, "num_heads": 2}
    models = {
        "masked": MARTransformer(**shared, **half),
        "causal": CausalMARTransformer(**shared, **causal, num_layers=2),
    }
    drafter = CausalMARTransformer(**shared, **causal, num_layers=1)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=2, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip
    return {name: model.eval() for name, model in models.items()}, drafter.eval(), autoencoder.eval()


def main() -> None:
    """Run the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masked", default="heroes32-mar", help="run, pipeline folder or shipped model")
    parser.add_argument("--causal", default="heroes32-mar-causal")
    parser.add_argument("--drafter", default="", help="run of the drafter; default: the component of --causal")
    parser.add_argument("--tokenizer", default="", help="default: that of --masked")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--temperature", type=float, default=0.4)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    pin_to_core(options.core)
    if options.tiny:
        options.images = 4
        models, drafter, autoencoder = tiny()
    else:
        models = {
            "masked": load_continuous(options.masked, MARTransformer),
            "causal": load_continuous(options.causal),
        }
        component = "backbone" if options.drafter else "drafter"
        drafter = load_continuous(options.drafter or options.causal, component=component)
        autoencoder = load_autoencoder(options.tokenizer or options.masked)
    heroes = draw_heroes(options.images, "reference")
    attributes = torch.as_tensor(np.asarray(heroes.attributes))
    network = None if options.tiny else feature_network("lite0")
    real = network and extract_cached(heroes.image_set("reference heroes"), network)
    rows = []
    for name, (which, sampler) in candidates(
        options.guidance_scale, options.temperature, models["masked"].num_codes
    ).items():
        found = run(sampler, models[which], drafter if which == "causal" else None, autoencoder, attributes)
        images = found.pop("images")
        if network is not None and real is not None:
            drawn = extract(TensorImages(images, name), network)
            found["FD-Lite0-112"] = round(statistics_distance(real.statistics, drawn.statistics), 2)
        rows.append({"method": name, **found})
    result: dict[str, Any] = {
        "images": options.images,
        "guidance_scale": options.guidance_scale,
        "temperature": options.temperature,
    }
    result["rows"] = rows
    if network is not None and real is not None:
        fresh = extract_cached(draw_heroes(options.images, "floor").image_set("fresh heroes"), network)
        result["floor"] = statistics_distance(real.statistics, fresh.statistics)
    print(table(rows))
    if not options.tiny:
        print(Path(write_json("continuous", report(**result))))


if __name__ == "__main__":
    main()
