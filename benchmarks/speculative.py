"""Every window sampler beside next-token sampling: forwards per image, codes per forward, nats per code, time.

All samplers draw the same images (same model, conditions, seeds) in one run. Times are CPU seconds of one thread, or
wall-clock on a GPU, divided by those of next-token sampling at the same batch size; wall-clock ratios stand beside them.
Next-token sampling is timed again at the end of every batch: what its ratio differs from 1 is noise. Every row is written when
it is done, and a run that was stopped goes on behind the last one (``--anew`` starts over). The forward of the synthetic model
costs next to nothing, so that its times are those of the decoders themselves. ``same`` tells whether the codes are
those of next-token sampling: shared noise promises that, the other exact rules promise only the distribution.

    python benchmarks/speculative.py                              # the flat synthetic model
    python benchmarks/speculative.py --model heroes32-llamagen    # a shipped model, a folder, a name on the Hub
    python benchmarks/speculative.py --model heroes32-llamagen --batches 1 8 --only "next token" gumbel auto
"""

from __future__ import annotations

import argparse
import json
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

AGAIN = "next token, again"
PROMPTS = ("deep elf with a red cloak and a great sword", "minotaur", "wizard hat", "red cloak")


def samplers(settings: dict[str, Any], has_drafter: bool) -> dict[str, Sampler]:
    """What is compared, next-token first."""
    found: dict[str, Sampler] = {"next token": NextTokenSampler(**settings)}
    for window in (8, 16, 32, 64):
        found[f"Jacobi gumbel W={window}"] = SpeculativeJacobiSampler(window=window, **settings)
    found["Jacobi gumbel W=auto"] = SpeculativeJacobiSampler(window="auto", **settings)
    found["Jacobi gumbel W=32 above"] = SpeculativeJacobiSampler(init="repeat_above", **settings)
    found["Jacobi maximal W=32"] = SpeculativeJacobiSampler(rule="maximal", **settings)
    found["Jacobi independent W=32"] = SpeculativeJacobiSampler(rule="independent", **settings)
    found["grouped W=16 (relaxed)"] = GroupedSpeculativeSampler(distance_threshold=None, **settings)
    if has_drafter:
        for drafts in (4, 8):
            found[f"draft model, {drafts} drafts"] = DraftModelSampler(num_draft_tokens=drafts, **settings)
        found["draft model, 8 drafts, ratio"] = DraftModelSampler(num_draft_tokens=8, rule="rejection", **settings)
        for sweeps in (1, 2):
            found[f"drafted Jacobi W=32, {sweeps} sweeps"] = DraftedJacobiSampler(num_sweeps=sweeps, **settings)
    found[AGAIN] = NextTokenSampler(**settings)
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


def timed(sampler: Sampler, repeats: int, *call: Any, **options: Any) -> tuple[Any, float, float]:
    """The output, and the fewest seconds by the clock and by the wall."""
    spent = []
    for _ in range(repeats):
        start, wall = clock(torch.device(call[0].device)), time.perf_counter()
        out = sampler.sample(*call, **options)
        spent.append((clock(torch.device(call[0].device)) - start, time.perf_counter() - wall))
    return out, *(min(column) for column in zip(*spent, strict=True))


def measure(name: str | None, batches: list[int], repeats: int, only: list[str], done: Done) -> str:
    """Run every sampler at every batch size that has no row yet; return the title."""
    backbone, drafter, conditions, settings, title = load(name)
    chosen = {
        label: sampler
        for label, sampler in samplers(settings, drafter is not None).items()
        if label in ("next token", AGAIN) or not only or any(word in label for word in only)
    }
    for batch in batches:
        missing = {label: sampler for label, sampler in chosen.items() if not done.has(batch, label)}
        if not missing:
            continue
        condition = conditions[torch.arange(batch) % len(conditions)]
        given = {"seeds": list(range(batch)), "drafter": drafter}
        first, *reference = timed(chosen["next token"], repeats, backbone, condition, **given)
        for label, sampler in missing.items():
            again = (first, *reference)
            out, spent, wall = (
                again if label == "next token" else timed(sampler, repeats, backbone, condition, **given)
            )
            stats, num_codes = out.stats, out.codes.shape[1]
            row = {
                "batch": batch,
                "sampler": label,
                "guarantee": stats.guarantee,
                "same": bool(torch.equal(out.codes, first.codes)),
                "forwards": round(float(stats.forwards_per_image.double().mean()), 1),
                "drafter forwards": stats.num_drafter_forwards,
                "codes/forward": round(stats.tokens_per_forward(num_codes), 2),
                # infinite where a relaxed rule let a code through that top-k had removed
                "nats/code": str(round(nats(backbone, condition[:8], out.codes[:8], sampler), 3)),
                "s/image": round(spent / batch, 4),
                "time ratio": round(spent / reference[0], 2),
                "wall ratio": round(wall / reference[1], 2),
            }
            done.add(row, title)
            print(f"batch {batch}: {label}, {row['codes/forward']} codes a forward", file=sys.stderr)
    return title


class Done:
    """The rows of a recording, written after each one."""

    def __init__(self, stem: str, anew: bool) -> None:
        self.stem, path = stem, RESULTS / f"{stem}.json"
        self.rows = [] if anew or not path.is_file() else json.loads(path.read_text())["rows"]

    def has(self, batch: int, label: str) -> bool:
        """Whether this row is there."""
        return any((row["batch"], row["sampler"]) == (batch, label) for row in self.rows)

    def add(self, row: dict[str, Any], title: str) -> None:
        """Write one more."""
        self.rows.append(row)
        write_json(self.stem, report(model=title, rows=self.rows))


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
    parser.add_argument(
        "--only", nargs="+", default=[], help="samplers whose names hold one of these words; all by default"
    )
    parser.add_argument("--anew", action="store_true", help="forget the rows that an earlier run has written")
    parser.add_argument("--name", help="of the recording; by default after the model")
    arguments = parser.parse_args()
    pin_to_core(arguments.core)
    model = "synthetic" if arguments.model is None else arguments.model.rstrip("/").split("/")[-1]
    stem = "speculative-" + (arguments.name or model)
    done = Done(stem, arguments.anew)
    title = measure(arguments.model, arguments.batches, arguments.repeats, arguments.only, done)
    plot(done.rows, title).savefig(RESULTS / f"{stem}.png", dpi=120)
    print(table(done.rows))


if __name__ == "__main__":
    main()
