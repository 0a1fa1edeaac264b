"""Every window sampler beside next-token sampling: forwards per image, codes per forward, nats per code, time.

All samplers draw the same images (same model, conditions, seeds) in one run, in turns: a round times each of them once, and a
ratio is the median over rounds of its seconds over those of next-token sampling in the same round. Times are CPU seconds of one
thread, or wall-clock on a GPU. Next-token sampling stands in every round a second time: what that ratio differs from 1 is noise
(its range over rounds is recorded for every row). Rows of a batch size are written when it is done, and a run that was stopped
goes on with the next (``--anew`` starts over). The forward of the synthetic model costs next to nothing, so that its times are
those of the decoders themselves. ``same`` tells whether the codes are those of next-token sampling: shared noise promises that in
float32; a code that differs where the two best differ by less than 1e-5 is counted in ``near ties``.

    python benchmarks/speculative.py                                  # the flat synthetic model
    python benchmarks/speculative.py --model heroes32-llamagen        # a shipped model, a folder, a name on the Hub
    python benchmarks/speculative.py --model llamagen-b-hard --batches 1 4 8 --rounds 3       # or llamagen-b-easy
    python benchmarks/speculative.py --model llamagen-b-hard --batches 1 --dtype bfloat16     # or --side 24: 576 codes
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from statistics import median
from typing import Any

import torch
from _common import RESULTS, pin_to_core, report, table, write_json
from _models import Subject, load
from matplotlib.figure import Figure
from torch import Tensor

from vargen.kernels.warp import warp_logits
from vargen.samplers.base import Sampler
from vargen.samplers.window.draft_model import DraftModelSampler
from vargen.samplers.window.drafted_jacobi import DraftedJacobiSampler
from vargen.samplers.window.grouped import GroupedSpeculativeSampler
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler

NEXT, AGAIN = "next token", "next token, again"
WINDOWS = (1, 8, 16, 32, 64, "auto")
WINDOWS_OF_LARGE = (1, 16, 32, "auto")


def samplers(subject: Subject, large: bool) -> dict[str, Sampler]:
    """What is compared, next-token first."""
    settings = subject.settings
    found: dict[str, Sampler] = {NEXT: NextTokenSampler(**settings)}
    for window in WINDOWS_OF_LARGE if large else WINDOWS:
        found[f"Jacobi W={window}"] = SpeculativeJacobiSampler(window=window, **settings)
    if not large:
        found["Jacobi W=32 above"] = SpeculativeJacobiSampler(window=32, init="repeat_above", **settings)
        found["Jacobi maximal W=32"] = SpeculativeJacobiSampler(window=32, rule="maximal", **settings)
        found["Jacobi independent W=32"] = SpeculativeJacobiSampler(window=32, rule="independent", **settings)
        found["grouped W=16"] = GroupedSpeculativeSampler(**settings)
    if subject.drafter is not None:
        for drafts in (4, 8):
            found[f"draft model, {drafts} drafts"] = DraftModelSampler(num_draft_tokens=drafts, **settings)
        found["draft model, auto"] = DraftModelSampler(num_draft_tokens="auto", **settings)
        found["draft model, 8 drafts, ratio"] = DraftModelSampler(num_draft_tokens=8, rule="rejection", **settings)
        for sweeps in (1, 2):
            found[f"drafted Jacobi W=32, {sweeps} sweeps"] = DraftedJacobiSampler(num_sweeps=sweeps, **settings)
    found[AGAIN] = NextTokenSampler(**settings)
    return found


def laws(subject: Subject, condition: Tensor, codes: Tensor) -> Tensor:
    """Log-probabilities ``[N, V]`` of one image's codes under the distribution that was sampled, scored in one window."""
    backbone, settings = subject.backbone, subject.settings
    prepared = backbone.prepare(condition[None], guidance_scale=settings.get("guidance_scale", 1.0))
    session, first = backbone.open(prepared, max_window=len(codes))
    rest = backbone.step(session, codes[None, :-1])
    logits = torch.cat([first.logits, rest.logits], dim=2)
    return warp_logits(logits, **settings).log_softmax(-1)[0]


def nats(subject: Subject, condition: Tensor, codes: Tensor) -> float:
    """Mean of -log p of the codes of some images."""
    found = [
        -float(laws(subject, one, image).gather(-1, image[:, None]).mean())
        for one, image in zip(condition, codes, strict=True)
    ]
    return sum(found) / len(found)


def clock(device: torch.device) -> float:
    """CPU seconds of this process, or wall-clock seconds behind all work of the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def rounds_of(chosen: dict[str, Sampler], subject: Subject, batch: int, rounds: int) -> tuple[Any, Any, Any]:
    """Conditions, outputs and seconds of every sampler, one entry a round; a short run of each comes before."""
    condition = subject.conditions[torch.arange(batch) % len(subject.conditions)]
    given = {"seeds": list(range(batch)), "drafter": subject.drafter}
    device = torch.device(subject.backbone.device)
    outputs: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for number in range(rounds):
        order = list(chosen) if number % 2 == 0 else list(reversed(chosen))
        for name in order:
            start = clock(device)
            outputs[name] = chosen[name].sample(subject.backbone, condition, **given)
            seconds[name].append(clock(device) - start)
            print(f"batch {batch}, round {number + 1}: {name}, {seconds[name][-1]:.2f} s", file=sys.stderr)
    return condition, outputs, seconds


def measure(subject: Subject, batches: list[int], rounds: int, chosen: dict[str, Sampler], done: Done) -> None:
    """Run every sampler at every batch size that has no rows yet."""
    for batch in batches:
        if done.has(batch):
            continue
        condition, outputs, seconds = rounds_of(chosen, subject, batch, rounds)
        first = outputs[NEXT]
        rows = []
        for label, out in outputs.items():
            stats, num_codes = out.stats, out.codes.shape[1]
            ratios = [mine / next_ for mine, next_ in zip(seconds[label], seconds[NEXT], strict=True)]
            rows.append(
                {
                    "batch": batch,
                    "sampler": label,
                    "guarantee": stats.guarantee,
                    "same": bool(torch.equal(out.codes, first.codes)),
                    "images that differ": int((out.codes != first.codes).any(-1).sum()),
                    "forwards": round(float(stats.forwards_per_image.double().mean()), 1),
                    "drafter forwards": stats.num_drafter_forwards,
                    "codes/forward": round(stats.tokens_per_forward(num_codes), 2),
                    # infinite where a relaxed rule let a code through that top-k had removed
                    "nats/code": str(round(nats(subject, condition[:4], out.codes[:4]), 3)),
                    "s/image": round(median(seconds[label]) / batch, 4),
                    "time ratio": round(median(ratios), 3),
                    "ratio low": round(min(ratios), 3),
                    "ratio high": round(max(ratios), 3),
                    "rounds": rounds,
                }
            )
        done.add(rows, subject.title)


class Done:
    """The rows of a recording, written after each batch size."""

    def __init__(self, stem: str, anew: bool) -> None:
        self.stem, path = stem, RESULTS / f"{stem}.json"
        self.rows = [] if anew or not path.is_file() else json.loads(path.read_text())["rows"]

    def has(self, batch: int) -> bool:
        """Whether this batch size is there."""
        return any(row["batch"] == batch for row in self.rows)

    def add(self, rows: list[dict[str, Any]], title: str) -> None:
        """Write some more."""
        self.rows += rows
        write_json(self.stem, report(model=title, rows=self.rows))


def plot(rows: list[dict[str, Any]], title: str) -> Figure:
    """Codes per forward at the first batch size, and time against batch size for fixed windows and for auto."""
    labels = [label for label in dict.fromkeys(row["sampler"] for row in rows) if label != AGAIN]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure = Figure(figsize=(11, max(3.6, 0.3 * len(labels) + 1.2)), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = {row["sampler"]: row["codes/forward"] for row in rows if row["batch"] == batches[0]}
    left.barh(labels, [first[label] for label in labels], color="#2b83ba")
    left.set_xlabel(f"codes per forward, batch {batches[0]}")
    left.invert_yaxis()
    ratio = {(row["sampler"], row["batch"]): row["time ratio"] for row in rows}
    fixed = [label for label in labels if label.removeprefix("Jacobi W=").isdigit()]
    for number, label in enumerate(fixed):
        shade = str(0.75 - 0.6 * number / max(len(fixed) - 1, 1))
        right.plot(batches, [ratio[label, b] for b in batches], "o-", color=shade, label=label.removeprefix("Jacobi "))
    if ("Jacobi W=auto", batches[0]) in ratio:
        style = {"color": "#d7191c", "linewidth": 2.5, "label": "W=auto"}
        right.plot(batches, [ratio["Jacobi W=auto", b] for b in batches], "o-", **style)
    right.axhline(1.0, color="black", linewidth=0.8)
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    right.set_xticks(batches, [str(b) for b in batches])
    ticks = [t for t in (0.25, 0.5, 1, 2, 4) if 0.5 * min(ratio.values()) < t < 2 * max(ratio.values())]
    right.set_yticks(ticks, [str(t) for t in ticks])
    right.minorticks_off()
    right.set_xlabel("batch")
    note = "; this model's forward is free" if "synthetic" in title else ""
    right.set_ylabel(f"time over next-token's (below 1 is faster{note})")
    right.legend(fontsize=8, title="Jacobi window")
    figure.suptitle(title)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="synthetic", help="pipeline folder or name, synthetic, llamagen-b-hard or -easy"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of LlamaGen-B")
    parser.add_argument("--side", type=int, default=16, help="codes a row of LlamaGen-B")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="samplers whose names hold one of these words")
    parser.add_argument("--anew", action="store_true", help="forget the rows that an earlier run has written")
    parser.add_argument("--name", help="of the recording; by default after the model")
    arguments = parser.parse_args()
    pin_to_core(arguments.core)
    large = arguments.model.startswith("llamagen-b-")
    stem = arguments.model.rstrip("/").split("/")[-1]
    if large:
        stem += "" if arguments.dtype == "float32" else f"-{arguments.dtype}"
        stem += "" if arguments.side == 16 else f"-{arguments.side**2}"
    stem = "speculative-" + (arguments.name or stem)
    done = Done(stem, arguments.anew)
    subject = load(arguments.model, getattr(torch, arguments.dtype), arguments.side)
    chosen = {
        label: sampler
        for label, sampler in samplers(subject, large).items()
        if label in (NEXT, AGAIN) or not arguments.only or any(word in label for word in arguments.only)
    }
    measure(subject, arguments.batches, arguments.rounds, chosen, done)
    plot(done.rows, subject.title).savefig(RESULTS / f"{stem}.png", dpi=120)
    shown = ("batch", "sampler", "same", "forwards", "codes/forward", "time ratio", "ratio low", "ratio high")
    print(table([{key: row[key] for key in shown} for row in done.rows]))


if __name__ == "__main__":
    main()
