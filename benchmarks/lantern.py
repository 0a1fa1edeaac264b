"""LANTERN against exact drafting and GSD: forwards, acceptance, time, and what the relaxation costs in pictures.

Every method scores nine codes a forward pass and image: chains of eight drafts, and windows of nine. Heroes: all settings
draw the same prompts with the same seeds; FD-Lite0-112 is measured against fresh real heroes, with the floor between two
sets of real ones beside it. FD falls with the number of images, so compare within one run only. Times are CPU seconds of
one thread, taken in turns, over those of next-token sampling.

The laws of heroes hold very few nats a code, which flatters every speculative method; the flat synthetic model (4.3 nats)
stands beside them. Pictures it has none: its cost is the change of the mean of -log p of the codes under the target,
below zero where the relaxation drifts to likelier codes and loses variety.

    python benchmarks/lantern.py                    # everything; heroes that are in the result file already are kept
    python benchmarks/lantern.py --parts timing     # only the times: wants a quiet machine, the other numbers do not
    python benchmarks/lantern.py --parts quality --drafter FOLDER --name mine   # another drafter
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, ROOT, interleaved_medians, pin_to_core, report, table, write_json
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(ROOT))  # the synthetic model lives with the tests

from _models import PROMPTS, Subject
from speculative import nats

from tests.toys import perturbed
from tests.tree_toys import TreeSpatial
from vargen.samplers.acceptance.codebook_neighbors import nearest_codes
from vargen.samplers.base import Sampler
from vargen.samplers.window.grouped import GroupedSpeculativeSampler
from vargen.samplers.window.lantern import LanternSampler
from vargen.samplers.window.next_token import NextTokenSampler

DELTAS = (0.1, 0.4, 0.2)  # the span of the paper's tables
LAMS = (5.0, 20.0)
GROUPS = (14, 4)
DEPTH = 8  # drafts of a chain
MODEL = "heroes32-llamagen"
FLAT = {"good drafter": 0.3, "fair drafter": 0.6}  # noise of the drafter: total variation 0.19 and 0.36
COLUMNS = ("codes/forward", "cost")


def samplers(settings: dict[str, Any], most_neighbors: int = 1000) -> dict[str, tuple[str, Sampler]]:
    """label -> (curve, sampler); the first of every curve come first, so that an early end leaves something of each."""
    chain: dict[str, Any] = {"tree": "chain", "depth": DEPTH, **settings}
    found: dict[str, tuple[str, Sampler]] = {
        "next token": ("next token", NextTokenSampler(**settings)),
        "exact": ("exact", LanternSampler(relaxation="none", **chain)),
    }
    for number in range(max(len(DELTAS), len(LAMS), len(GROUPS))):
        for lam in LAMS[number : number + 1]:
            found[f"LANTERN++ λ={lam:g}"] = ("LANTERN++", LanternSampler(relaxation="lantern++", lam=lam, **chain))
        for delta in DELTAS[number : number + 1]:
            sampler = LanternSampler(relaxation="lantern", delta=delta, k=most_neighbors, **chain)
            found[f"LANTERN δ={delta:g}"] = ("LANTERN", sampler)
        for size in GROUPS[number : number + 1]:
            grouped: dict[str, Any] = {"group_size": size, "window": DEPTH + 1, "distance_threshold": None}
            found[f"GSD G={size}"] = ("GSD", GroupedSpeculativeSampler(**grouped, **settings))
    return found


def row_of(label: str, curve: str, stats: list[Any], num_codes: int) -> dict[str, Any]:
    """The numbers that both models have, over calls of one size."""
    forwards = torch.cat([s.forwards_per_image for s in stats]).double().mean()
    kept = [s.extra for s in stats if "mean_accepted" in s.extra]

    def mean(name: str, digits: int) -> float | None:
        return round(sum(extra[name] for extra in kept) / len(kept), digits) if kept else None

    return {
        "setting": label,
        "curve": curve,
        "guarantee": stats[0].guarantee,
        "forwards": round(float(forwards), 2),
        "codes/forward": round(num_codes / float(forwards), 3),
        "accepted": mean("mean_accepted", 3),
        "relaxed share": mean("relaxed_share", 4),
        "drafter forwards": sum(s.num_drafter_forwards for s in stats),
    }


class Unlimited:
    """The flat model scored without its truncation: relaxed codes may lie outside it."""

    def __init__(self, target: TreeSpatial) -> None:
        self.prepare, self.open, self.step = target.prepare, target.open, target.step


def flat(num_images: int, noise: float) -> list[dict[str, Any]]:
    """The synthetic model, drafted for by a noisy copy of itself."""
    target = TreeSpatial()
    drafter, neighbors = perturbed(target, noise), nearest_codes(target.embedding, 100)
    labels, rows = torch.zeros(num_images, dtype=torch.int64), []
    for label, (curve, sampler) in samplers({"top_k": 128}, 100).items():
        options: dict[str, Any] = (
            {"drafter": drafter, "neighbors": neighbors} if isinstance(sampler, LanternSampler) else {}
        )
        out = sampler.sample(target, labels, seeds=list(range(num_images)), **options)
        row = row_of(label, curve, [out.stats], target.num_codes)
        everything = {
            "temperature": sampler.temperature,
            "top_p": sampler.top_p,
        }  # top-k would remove what was relaxed
        row["nats/code"] = round(nats(Subject(Unlimited(target), None, labels, everything, ""), labels, out.codes), 4)
        rows.append(row)
        print(f"flat, noise {noise}: {label}, {row['codes/forward']} codes a forward", file=sys.stderr)
    return with_cost(rows, "nats/code")


def quality(pipe: Any, num: int, chunk: int, kept: list[dict[str, Any]], save: Any) -> list[dict[str, Any]]:
    """Heroes of the shipped model; ``save`` is called with the rows so far."""
    from vargen.evaluation.evaluate import evaluate_fid
    from vargen.metrics.networks.registry import feature_network

    network, rows = feature_network("lite0"), {row["setting"]: row for row in kept}
    chosen = samplers(own_settings(pipe))
    chosen["next token"] = chosen.pop("next token")  # last: the exact chain has its law
    for label, (curve, sampler) in chosen.items():
        if label in rows:
            continue
        pipe.sampler = sampler
        watched, start = Watched(pipe), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            found = evaluate_fid(watched, Path(folder) / "out", num=num, chunk=chunk, network=network, model=MODEL)
        assert found is not None  # this process measures, it does not only draw
        row = row_of(label, curve, watched.stats, pipe.backbone.num_codes)
        distance = next(result for result in found.results if result["metric"].startswith("FD-"))
        row |= {"FD": round(distance["value"], 3), "floor": round(distance["floor"], 3)}
        row["attributes"] = round(found.attributes["share"], 4) if found.attributes else None
        rows[label] = row
        save(list(rows.values()))
        spent = time.process_time() - start
        print(
            f"heroes: {label}, {row['codes/forward']} codes a forward, FD {row['FD']}, {spent:.0f} s", file=sys.stderr
        )
    return list(rows.values())


class Watched:
    """A pipeline that keeps the statistics of its calls."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.stats = pipe, list[Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.pipe(*args, **kwargs)
        self.stats.append(output.stats)
        return output


def timing(pipe: Any, batches: list[int], repeats: int) -> list[dict[str, Any]]:
    """CPU seconds an image, the settings taking turns, over those of next-token sampling at the same batch size."""
    pipe, rows = quiet(pipe), []
    for batch in batches:
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]

        def draw(sampler: Sampler, prompts: list[str] = prompts) -> Tensor:
            pipe.sampler = sampler
            return pipe(prompts, seed=0, output_type="codes").codes

        chosen = {label: sampler for label, (_, sampler) in samplers(own_settings(pipe)).items()}
        work = {label: lambda s=sampler: draw(s) for label, sampler in chosen.items()}
        seconds = interleaved_medians(work, repeats, time.process_time)
        for label, spent in seconds.items():
            ratio = round(spent / seconds["next token"], 3)
            rows.append({"batch": batch, "setting": label, "s/image": round(spent / batch, 4), "time ratio": ratio})
    return rows


def own_settings(pipe: Any) -> dict[str, Any]:
    """Guidance and truncation that the model ships with."""
    return {key: pipe.sampler.config[key] for key in ("guidance_scale", "temperature", "top_k", "top_p")}


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder: str | None) -> Any:
    """The shipped pipeline; with a folder, its drafter in place of the shipped ones."""
    import vargen

    pipe = quiet(vargen.ImagePipeline.from_pretrained(MODEL))
    if folder is not None:
        name = json.loads((Path(folder) / "config.json").read_text())["_class_name"]
        pipe.drafter, pipe.eagle = getattr(vargen, name).from_pretrained(folder).float().eval(), None
    return pipe


def with_cost(rows: list[dict[str, Any]], of: str) -> list[dict[str, Any]]:
    """Add the change against the exact chain, and how many more codes a forward there are."""
    exact = next((row for row in rows if row["curve"] == "exact"), {})
    for row in rows if exact else []:
        row["cost"] = round(row[of] - exact[of], 3)
        row["gain"] = round(row["codes/forward"] / exact["codes/forward"], 3)
    return rows


def plot(panels: dict[str, tuple[list[dict[str, Any]], str]]) -> Figure:
    """Cost against codes per forward, one panel a model, one curve a method."""
    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, (rows, cost)) in zip(axes, panels.items(), strict=True):
        for curve, marker in (("LANTERN", "o"), ("LANTERN++", "s"), ("GSD", "^")):
            points = sorted((row for row in rows if row["curve"] == curve), key=lambda row: strength(row["setting"]))
            axis.plot(*([row[name] for row in points] for name in COLUMNS), marker=marker, label=curve)
            for number, row in enumerate(points):
                place, offset = [row[name] for name in COLUMNS], (3, -11 if number % 2 else 4)
                axis.annotate(row["setting"].split()[-1], place, offset, textcoords="offset points", fontsize=7)
        axis.margins(0.12)
        exact = next(row for row in rows if row["curve"] == "exact")
        axis.plot(*(exact[name] for name in COLUMNS), "k*", markersize=11, label=f"exact, {DEPTH} drafts")
        axis.axhline(0.0, color="black", linewidth=0.6)
        axis.set(xlabel="codes per forward", ylabel=cost, title=title)
        axis.legend(fontsize=8)
    return figure


def strength(label: str) -> float:
    return float(label.split("=")[1])


def panels_of(content: dict[str, Any]) -> dict[str, tuple[list[dict[str, Any]], str]]:
    """What of the results can be drawn."""
    found = {}
    for name, rows in content.get("flat", {}).items():
        found[f"flat synthetic model, {name}"] = (rows, "change of -log p, nats a code")
    if any("cost" in row for row in content.get("heroes", [])):
        num = content["protocol"]["num"]
        found[MODEL] = (content["heroes"], f"change of FD-Lite0-112, N = {num}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["flat", "quality", "timing"]
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts, help="none: only draw the plot again")
    parser.add_argument("--num", type=int, default=512, help="heroes a setting")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--flat", type=int, default=8, help="images of the synthetic model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="of the times")
    parser.add_argument("--repeats", type=int, default=3, help="of the times")
    parser.add_argument("--drafter", help="folder of a drafter; default: the shipped one")
    parser.add_argument("--name", default="lantern", help="of the result files")
    parser.add_argument("--core", type=int, default=0)
    arguments = parser.parse_args()
    pin_to_core(arguments.core)
    path = RESULTS / f"{arguments.name}.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def save(**found: Any) -> None:
        content.update(report(**found))
        write_json(arguments.name, content)

    if "flat" in arguments.parts:
        save(flat={name: flat(arguments.flat, noise) for name, noise in FLAT.items()})
    if "quality" in arguments.parts:
        protocol = {"num": arguments.num, "chunk": arguments.chunk, "drafter": arguments.drafter or "shipped"}
        kept = content.get("heroes", []) if content.get("protocol") == protocol else []
        pipe = load(arguments.drafter)
        quality(
            pipe, *(arguments.num, arguments.chunk, kept),
            lambda rows: save(heroes=with_cost(rows, "FD"), protocol=protocol),
        )  # fmt: skip
    if "timing" in arguments.parts:
        save(times=timing(load(arguments.drafter), arguments.batches, arguments.repeats))
    for rows in (*content.get("flat", {}).values(), content.get("heroes"), content.get("times")):
        print(table(rows) + "\n" if rows else "")
    if panels := panels_of(content):
        plot(panels).savefig(RESULTS / f"{arguments.name}.png", dpi=120)


if __name__ == "__main__":
    main()
