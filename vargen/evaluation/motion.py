"""Measure a shipped video model: motion and parts against the prompt, reconstruction, likelihood, a Frechet distance.

Clips are generated from the full labels of fresh test clips, clip i from seed i, in chunks of a fixed size.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.datasets.heroes.atlas import ATLAS_FOLDER
from vargen.datasets.motion.compose import MOTIONS, PARTS
from vargen.datasets.motion.dataset import MotionDataset
from vargen.evaluation.card import component_lines, flat_lines, read_recipe
from vargen.evaluation.reconstruction import psnr
from vargen.files import atomic_write
from vargen.images import to_uint8
from vargen.metrics.fvd import FrechetVideoDistance
from vargen.metrics.networks.motion import MotionClassifier, measure_motion
from vargen.registry import resolve_model
from vargen.validation.reading import read_json

if TYPE_CHECKING:
    from vargen.pipelines.video import VideoPipeline

CHUNK = 50  # clips decoded together: part of the numbers through floating-point rounding only
REPORT = "motion.json"
_STREAM = 1001  # of the labels; training and its evaluation use others


@torch.no_grad()
def evaluate_motion(
    model: str | Path | VideoPipeline,
    num_clips: int = 500,
    *,
    network: str | None = "lite0",
    on_chunk: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Generate clips and measure them.

    Args:
        model: shipped name, pipeline folder, or a ``VideoPipeline``.
        num_clips: clips generated, and real ones beside them.
        network: of the Frechet distance, as in ``video_features``; None leaves it out.
        on_chunk: called with the number of clips done.

    Returns:
        Plain JSON values: ``motion``, ``reconstruction``, ``likelihood``, ``frechet``, ``decode``, ``protocol``.

    Raises:
        ValueError: fewer than two clips, or not a model of moving heroes.
    """
    if num_clips < 2:
        raise ValueError(f"num_clips must be at least 2, got {num_clips}")
    pipe = _pipeline(model)
    start = time.perf_counter()
    drawn, real, labels, forwards = [], [], [], 0
    error, nats, null = torch.zeros(2, 2, dtype=torch.float64), 0.0, 0.0
    codes_used: set[int] = set()
    seconds = 0.0
    data = MotionDataset(_STREAM, split="test", frames=pipe.num_frames)
    for first in range(0, num_clips, CHUNK):
        batch = data.examples(np.arange(first, min(first + CHUNK, num_clips)))
        seeds = list(range(first, first + len(batch["labels"])))
        began = time.perf_counter()
        output = pipe.sampler.sample(pipe.backbone, batch["labels"], seeds=seeds)
        drawn.append(to_uint8(pipe.tokenizer.decode(output.codes.view(-1, *pipe.backbone.grid_size))))
        seconds += time.perf_counter() - began
        forwards = output.stats.num_forwards
        clips = to_uint8(batch["clip"])
        real.append(clips)
        labels.append(batch["labels"])
        codes = torch.cat([pipe.tokenizer.encode(part).codes for part in batch["clip"].split(10)])
        codes_used.update(codes.flatten().tolist())
        squared = (to_uint8(pipe.tokenizer.decode(codes)).float() - clips.float()).square().double()
        for row, part in enumerate((squared[:, :, :1], squared[:, :, 1:])):
            error[row] += torch.tensor([part.sum().item(), part.numel()], dtype=torch.float64)
        for part, full in zip(codes.flatten(1).split(10), batch["labels"].split(10), strict=True):
            nats += _nats(pipe.backbone, part, full)
            null += _nats(pipe.backbone, part, torch.zeros_like(full))
        if on_chunk is not None:
            on_chunk(first + len(seeds))
    made, originals, wanted = torch.cat(drawn), torch.cat(real), torch.cat(labels)
    tokens = num_clips * math.prod(pipe.backbone.grid_size)
    classifier = MotionClassifier.from_pretrained()
    return {
        "motion": {
            **measure_motion(made, wanted, originals, classifier).to_dict(),
            "classifier_real_accuracy": classifier.real_accuracy,
        },
        "reconstruction": {
            "psnr": psnr(error.sum(0)[0] / error.sum(0)[1]),
            "psnr_first_frames": psnr(error[0, 0] / error[0, 1]),
            "psnr_later_frames": psnr(error[1, 0] / error[1, 1]),
            "codes_used": len(codes_used),
            "codebook_size": pipe.tokenizer.codebook_size,
        },
        "likelihood": {"nats_per_token": nats / tokens, "nats_per_token_without_prompt": null / tokens},
        "frechet": None if network is None else _frechet(network, made, originals, data),
        "decode": {"forwards": forwards, "clips_per_second": num_clips / seconds},
        "protocol": {
            "num_clips": num_clips,
            "frames": pipe.num_frames,
            "labels": "full labels of fresh test clips",
            "sampler": {k: v for k, v in pipe.sampler.config.items() if not k.startswith("_")},
            "date": date.today().isoformat(),
            "hardware": f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
            "seconds": round(time.perf_counter() - start),
        },
    }


def write_motion_card(model: str | Path, report: dict[str, Any]) -> Path:
    """Write ``README.md`` of a video model from a report of ``evaluate_motion``; the report goes beside it.

    Raises:
        ValueError: no such folder on this machine.
    """
    folder = Path(resolve_model(model))
    if not folder.is_dir():
        raise ValueError(f"{model} is not a folder on this machine: a card is written beside the weights")
    for name, text in ((REPORT, json.dumps(report, indent=1) + "\n"), ("README.md", _card(folder, report))):
        with atomic_write(folder / name, overwrite=True) as beside:
            beside.write_text(text, encoding="utf-8")
    return folder / "README.md"


def _card(folder: Path, report: dict[str, Any]) -> str:
    source = read_json(ATLAS_FOLDER / "atlas.json")["source"]
    m, r, p = report["motion"], report["reconstruction"], report["protocol"]
    parts = "; ".join(f"{slot}: {', '.join(names)}" for slot, names in PARTS.items())
    lines = ["---", "library_name: vargen", "license: apache-2.0", "---", "", f"# {folder.name}", ""]
    lines += [
        f"Clips of moving pixel heroes, {p['frames']} frames of 32x32 pixels at 8 a second, from free text: NBPTransformer over "
        f"codes of VideoFSQTokenizer. Load it with `VideoPipeline.from_pretrained({folder.name!r})`.",
        "",
        f"Motions: {', '.join(MOTIONS)}. Parts: {parts}.",
        "",
        "The tokenizer's encoder is a dictionary of patches (4x4 pixels, 4 frames) from k-means, its codes are numbered on the "
        "FSQ grid; it knows these heroes and nothing else.",
        "",
        "What a prompt leaves open (parts, motion) is drawn from the distribution of the data by the clip's seed before decoding: the "
        "codes of a row are drawn in parallel and do not agree on what nobody has decided (left open, robes come out half "
        "red and half blue).",
        "",
    ]
    lines += [
        "## Intended use",
        "",
        "Showing and measuring samplers of blocks, trying recipes, tests: what its clips should look like is known exactly.",
        "",
        "## Limits",
        "",
        "It draws these motions with these parts, clips of one length, and nothing else; words for other things are refused. Guidance and "
        "temperature were chosen on labels of the same set as those of the report.",
        "",
    ]
    training = read_recipe(folder, None)
    if training.get("tokenizer", {}).get("step") == 0:
        lines += ["Its decoder's correction is untrained and adds nothing: frames are the patches of the codes.", ""]
    lines += ["## Components", "", *component_lines(folder), ""]
    lines += ["## Data", "", f"Composed at random from {source['title']} ({source['licence']}). {source['note']}", ""]
    lines += ["## Licence", "", "The weights: Apache-2.0, as the library.", ""]
    lines += ["## Training", "", *flat_lines(training), "", "Again, from the root of the repository:", ""]
    lines += ["```bash", "vargen train heroes-video-fsq", "vargen train heroes-video-nbp", "```", ""]
    lines += [
        "## Measurements",
        "",
        f"Measured {p['date']} on {p['hardware']}, {p['num_clips']} clips, {p['labels']}.",
        "",
    ]
    lines += [f"- {k.replace('_', ' ')}: {v}" for k, v in p["sampler"].items()]
    lines += [f"- {report['decode']['forwards']} forward passes a clip", ""]
    lines += [
        "| | generated | real clips of the same labels | share | labels of other clips |",
        "|---|---|---|---|---|",
    ]
    for name in ("motion", "parts"):
        a, b, c = m[name], m[f"{name}_real"], m[f"{name}_shuffled"]
        lines.append(f"| {name} right | {a:.1%} | {b:.1%} | {m[f'{name}_share']:.1%} | {c:.1%} |")
    lines += ["", "Of each motion: " + ", ".join(f"{k} {v:.1%}" for k, v in m["by_motion"].items()) + ".", ""]
    lines += [
        f"- reconstruction: PSNR {r['psnr']:.2f} dB on all pixels (first frames {r['psnr_first_frames']:.2f}, later frames "
        f"{r['psnr_later_frames']:.2f}); {r['codes_used']} of {r['codebook_size']} codes used",
        f"- held-out nats per token: {report['likelihood']['nats_per_token']:.4f}, without the prompt "
        f"{report['likelihood']['nats_per_token_without_prompt']:.4f}",
    ]
    if report["frechet"]:
        f = report["frechet"]
        lines.append(
            f"- {f['metric']} (not FVD: EfficientNet-Lite0 features of frames and their change): {f['value']:.2f}, between two "
            f"sets of real clips {f['floor']:.2f} ({p['num_clips']} clips a set)"
        )
    lines += ["", "```python", "from vargen.evaluation.motion import evaluate_motion, write_motion_card", ""]
    lines += [f"write_motion_card({folder.name!r}, evaluate_motion({folder.name!r}, {p['num_clips']}))", "```"]
    return "\n".join(lines) + "\n"


def _pipeline(model: str | Path | VideoPipeline) -> VideoPipeline:
    from vargen.pipelines.video import VideoPipeline

    pipe = model if isinstance(model, VideoPipeline) else VideoPipeline.from_pretrained(model)
    if getattr(getattr(pipe.conditioner, "config", None), "vocabulary", None) != "motion":
        raise ValueError(
            "evaluate_motion measures models of moving heroes (a conditioner with the vocabulary 'motion')"
        )
    return pipe


def _frechet(network: str, made: Tensor, real: Tensor, data: MotionDataset) -> dict[str, Any]:
    """Distance to the real clips, and that of as many other real clips to them."""
    metric = FrechetVideoDistance(network, frames=min(16, made.shape[2]), reset_real_features=False)
    other = torch.cat(
        [
            to_uint8(data.examples(np.arange(i, min(i + CHUNK, 10**6 + len(real))))["clip"])
            for i in range(10**6, 10**6 + len(real), CHUNK)
        ]
    )
    values = []
    for part in real.split(10):
        metric.update(part, real=True)
    for clips in (made, other):
        for part in clips.split(10):
            metric.update(part, real=False)
        values.append(float(metric.compute()))
        metric.reset()
    return {"metric": metric.metric_name, "network": network, "value": values[0], "floor": values[1]}


def _nats(backbone: nn.Module, codes: Tensor, condition: Tensor) -> float:
    logits = backbone(codes, condition)
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="sum").item()
