"""Every window sampler beside next-token sampling: forwards per image, codes per forward, nats per code, time.

All samplers draw the same images (same model, conditions, seeds) in one run. Times are CPU seconds of one thread, or
wall-clock on a GPU, divided by those of next-token sampling at the same batch size. The forward of the synthetic model
costs next to nothing, so that its times are those of the decoders themselves. ``same`` tells whether the codes are
those of next-token sampling: shared noise promises that, the other exact rules promise only the law.

    python benchmarks/speculative.py                              # the flat synthetic model
    python benchmarks/speculative.py --model heroes32-llamagen    # a shipped model, a folder, a name on the Hub
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from _common import RESULTS, ROOT, pin_to_core, report, table, write_json
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(ROOT))  # the synthetic model lives with the tests

from tests.toys import SpatialBackbone, perturbed
from vargen.kernels.warp import warp_logits
from vargen.samplers.base import Sampler
from vargen.samplers.window.draft_model import DraftModelSampler
from vargen.samplers.window.drafted_jacobi import DraftedJacobiSampler
from vargen.samplers.window.grouped import GroupedSpeculativeSampler
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler

PROMPTS = ("deep elf with a red cloak and a great sword", "minotaur", "wizard hat", "red cloak")


def samplers(settings: dict[str, Any], has_drafter: bool) -> dict[str, Sampler]:
    """What is compared, next-token first."""
    found: dict[str, Sampler] = {"next token": NextTokenSampler(**settings)}
    for window in (8, 16, 32, 64):
        found[f"Jacobi gumbel W={window}"] = SpeculativeJacobiSampler(window=window, **settings)
    found["Jacobi gumbel W=32 above"] = SpeculativeJacobiSampler(init="repeat_above", **settings)
    found["Jacobi maximal W=32"] = SpeculativeJacobiSampler(carry="maximal", **settings)
    found["Jacobi independent W=32"] = SpeculativeJacobiSampler(carry="independent", **settings)
    found["grouped W=16 (relaxed)"] = GroupedSpeculativeSampler(distance_threshold=None, **settings)
    if has_drafter:
        for drafts in (4, 8):
            found[f"draft model, {drafts} drafts"] = DraftModelSampler(num_drafts=drafts, **settings)
        found["draft model, 8 drafts, ratio"] = DraftModelSampler(num_drafts=8, carry="independent", **settings)
        for sweeps in (1, 2):
            found[f"drafted Jacobi W=32, {sweeps} sweeps"] = DraftedJacobiSampler(num_sweeps=sweeps, **settings)
    return found


def load(name: str | None) -> tuple[Any, Any, Any, dict[str, Any], str]:
    """Backbone, drafter or None, conditions ``[P, ...]``, settings, title."""
    if name is None:
        backbone = SpatialBackbone()
        title = "synthetic flat model, 16 x 16, V = 256, top-k 128"
        return backbone, perturbed(backbone, 0.3), torch.zeros(1, dtype=torch.int64), {"top_k": 128}, title
    from vargen.pipelines.image import ImagePipeline

    pipe = ImagePipeline.from_pretrained(name)
    settings = {key: pipe.sampler.config[key] for key in ("guidance_scale", "temperature", "top_k", "top_p")}
    return pipe.backbone, pipe.drafter, pipe.conditioner.encode(list(PROMPTS)), settings, name


def nats(backbone: Any, condition: Tensor, codes: Tensor, sampler: Sampler) -> float:
    """Mean of -log p of the codes under the law that was sampled, scored in one window."""
    total, warp = 0.0, {name: getattr(sampler, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    for one, image in zip(condition, codes, strict=True):
        prepared = backbone.prepare(one[None], guidance_scale=sampler.guidance_scale)
        session, first = backbone.open(prepared, max_window=len(image))
        rest = backbone.step(session, image[None, :-1])
        logits = torch.cat([first.logits, rest.logits], dim=2)
        law = warp_logits(logits, **warp).log_softmax(-1)[0]
        total -= float(law.gather(-1, image[:, None]).mean())
    return total / len(codes)


def clock(device: torch.device) -> float:
    """CPU seconds of this process, or wall-clock seconds behind all work of the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def measure(name: str | None, batches: list[int], repeats: int) -> tuple[list[dict[str, Any]], str]:
    """Run every sampler at every batch size."""
    backbone, drafter, conditions, settings, title = load(name)
    device, rows = torch.device(backbone.device), []
    for batch in batches:
        condition = conditions[torch.arange(batch) % len(conditions)]
        reference: Any = None
        for label, sampler in samplers(settings, drafter is not None).items():
            given = {"seeds": list(range(batch)), "drafter": drafter}
            seconds = []
            for _ in range(repeats):
                start = clock(device)
                out = sampler.sample(backbone, condition, **given)
                seconds.append(clock(device) - start)
            spent, stats, num_codes = min(seconds) / batch, out.stats, out.codes.shape[1]
            reference = reference or (out.codes, spent)
            rows.append(
                {
                    "batch": batch,
                    "sampler": label,
                    "guarantee": stats.guarantee,
                    "same": bool(torch.equal(out.codes, reference[0])),
                    "forwards": round(float(stats.forwards_per_image.double().mean()), 1),
                    "drafter forwards": stats.num_drafter_forwards,
                    "codes/forward": round(stats.tokens_per_forward(num_codes), 2),
                    # infinite where a relaxed rule let a code through that top-k had removed
                    "nats/code": str(round(nats(backbone, condition[:8], out.codes[:8], sampler), 3)),
                    "s/image": round(spent, 4),
                    "time ratio": round(spent / reference[1], 2),
                }
            )
            print(f"batch {batch}: {label}, {rows[-1]['codes/forward']} codes a forward", file=sys.stderr)
    return rows, title


def plot(rows: list[dict[str, Any]], title: str) -> Figure:
    """Bars of codes per forward at batch 1, and of the time ratio at every batch size."""
    labels = list(dict.fromkeys(row["sampler"] for row in rows))
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure = Figure(figsize=(10, 0.35 * len(labels) + 1.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    first = {row["sampler"]: row["codes/forward"] for row in rows if row["batch"] == batches[0]}
    left.barh(labels, [first[label] for label in labels], color="#2b83ba")
    left.set_xlabel(f"codes per forward, batch {batches[0]}")
    left.invert_yaxis()
    for number, batch in enumerate(batches):
        ratio = {row["sampler"]: row["time ratio"] for row in rows if row["batch"] == batch}
        places = [i + 0.8 * (number + 0.5) / len(batches) - 0.4 for i in range(len(labels))]
        right.barh(places, [ratio[label] for label in labels], height=0.8 / len(batches), label=f"batch {batch}")
    right.axvline(1.0, color="black", linewidth=0.8)
    right.set_xlabel(
        "time per image / next token" + ("; this model's forward is free" if "synthetic" in title else "")
    )
    right.legend(fontsize=8)
    figure.suptitle(title)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="pipeline folder or name; the synthetic model without it")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=1, help="the best of so many runs is reported")
    parser.add_argument("--core", type=int, default=0)
    arguments = parser.parse_args()
    pin_to_core(arguments.core)
    rows, title = measure(arguments.model, arguments.batches, arguments.repeats)
    stem = "speculative-" + ("synthetic" if arguments.model is None else arguments.model.rstrip("/").split("/")[-1])
    write_json(stem, report(model=title, rows=rows))
    plot(rows, title).savefig(RESULTS / f"{stem}.png", dpi=120)
    print(table(rows))


if __name__ == "__main__":
    main()
