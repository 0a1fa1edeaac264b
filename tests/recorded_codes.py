"""What every sampler draws from the shipped models: the cases, how one is decoded, and where the numbers lie.

``python -m tests.recorded_codes [MODEL...]`` records the models named, all without names; it is due when weights were trained
again or a sampler is meant to draw other codes. Only public names are used here, so that the record outlives moves of modules.

A code can hang on the last bits of a logit, which differ from one processor to the next. Recording therefore decodes twice,
once with weights moved by a millionth, and keeps seeds whose codes stay. Continuous models are decoded in float64, where
nothing hangs on them, and are kept as every third token in float32.
"""

from __future__ import annotations

import copy
import hashlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vargen

RECORD = Path(__file__).parent / "golden" / "shipped" / "codes.npz"
MODELS = Path(vargen.__file__).parent / "assets" / "models"
NUM_SEEDS = 16
NUM_CANDIDATES = 18  # seeds tried when recording
MOVED = 1e-6  # relative change of the weights under which codes must stay
STRIDE = 3  # of the continuous tokens kept
# they draw next-token's codes
SHARED_NOISE = ("jacobi-gumbel-8", "jacobi-gumbel-32", "drafted-jacobi", "draft-model-gumbel")
WEIGHTED = ("tokenizer", "backbone", "drafter", "eagle")
PROMPTS = (
    "deep elf with a red cloak, wizard hat and great sword",
    "minotaur",
    "dwarf with an axe",
    "human with a blue robe",
)
VIDEO_PROMPTS = ("deep elf with a red cloak walking left", "minotaur", "orc walking right", "human")


@dataclass(frozen=True, eq=False)
class Case:
    """One sampler with its settings on one model.

    ``drafter`` is "own" (the shipped ones as the pipeline chooses), "small" (the small backbone where the model has a drafter on
    hidden states as well), or "near" (the backbone itself with weights moved by 0.3 %). ``forwards`` is how many passes the
    quick comparison runs; ``None`` draws whole images.
    """

    model: str
    name: str
    sampler: str
    settings: dict[str, Any] = field(default_factory=dict)
    drafter: str = "own"
    forwards: int | None = None

    @property
    def key(self) -> str:
        """Where its codes lie in the record."""
        return f"{self.model}/{self.name}"


def _cases() -> list[Case]:
    cases: list[Case] = []

    def add(model: str, name: str, sampler: str, drafter: str = "own", forwards: int | None = None, **settings: Any):
        cases.append(Case(model, name, sampler, settings, drafter, forwards))

    model, base = "heroes32-llamagen", {"guidance_scale": 1.5, "top_p": 0.9}
    add(model, "next-token", "NextTokenSampler", forwards=64, **base)
    add(model, "next-token-unguided", "NextTokenSampler", forwards=24, top_k=100, temperature=0.9)
    add(model, "next-token-greedy", "NextTokenSampler", forwards=24, guidance_scale=1.5, temperature=0.0)
    jacobi = "SpeculativeJacobiSampler"
    for carry in ("gumbel", "maximal", "independent"):
        add(model, f"jacobi-{carry}-8", jacobi, forwards=14, window=8, carry=carry, **base)
        whole = None if carry == "gumbel" else 8  # to the end: next-token's codes
        add(model, f"jacobi-{carry}-32", jacobi, forwards=whole, window=32, carry=carry, **base)
    add(model, "jacobi-left", jacobi, forwards=8, window=16, carry="maximal", init="repeat_left", **base)
    add(model, "jacobi-above", jacobi, forwards=10, window=24, carry="independent", init="repeat_above", **base)
    add(model, "jacobi-greedy", jacobi, forwards=8, window=16, temperature=0.0, guidance_scale=1.5)
    add(model, "drafted-jacobi", "DraftedJacobiSampler", forwards=5, window=32, **base)
    for carry in ("gumbel", "independent"):
        add(model, f"draft-model-{carry}", "DraftModelSampler", forwards=8, num_drafts=4, carry=carry, **base)
    add(model, "grouped", "GroupedSpeculativeSampler", forwards=10, window=16, distance_threshold=0.5, **base)
    loose = {"carry": "maximal", "distance_threshold": None, "group_size": 20}
    add(model, "grouped-maximal", "GroupedSpeculativeSampler", forwards=8, window=16, **loose, **base)

    lantern, exact = "LanternSampler", {"relaxation": "none"}
    add(model, "lantern-chain", lantern, forwards=5, lam=20.0, k=100, **base)
    add(model, "lantern-delta", lantern, forwards=5, relaxation="lantern", delta=0.4, k=300, depth=5, **base)
    add(model, "lantern-upstream", lantern, forwards=5, relaxation="lantern", residual="upstream", delta=0.3, **base)
    add(model, "lantern-optimal", lantern, forwards=4, residual="optimal", lam=20.0, k=16, depth=5, **base)
    add(model, "lantern-tree", lantern, forwards=3, tree="naive_extend_57", lam=10.0, k=100, **base)
    add(model, "exact-chain", lantern, forwards=5, **exact, **base)
    add(model, "exact-chain-small", lantern, drafter="small", forwards=5, depth=4, **exact, **base)
    speculative, rule = "SpeculativeSampler", {"rule": "recursive"}  # recorded as LanternSampler(relaxation="none")
    add(model, "exact-naive", speculative, forwards=3, tree="naive_extend_57", **rule, **base)
    add(model, "exact-mc", lantern, forwards=3, tree="mc_sim_7b_63", **exact, **base)
    add(model, "exact-medusa-top", lantern, forwards=3, tree="medusa_2_7b_63", proposal="top", **exact, **base)
    add(model, "exact-siblings", speculative, forwards=6, tree="siblings", num_draft_tokens=6, **rule, **base)
    dynamic = {"tree": "dynamic", "depth": 5, "branching": 4, "num_nodes": 24}
    grown = {"tree": "dynamic", "depth": 5, "branching": 4, "num_draft_tokens": 23}
    add(model, "exact-dynamic", speculative, forwards=4, **grown, **rule, **base)
    add(model, "exact-dynamic-small", lantern, drafter="small", forwards=3, **dynamic, **exact, **base)
    again = {"proposal": "with_replacement", "tree": "reverse_balanced_25"}
    add(model, "exact-replacement", lantern, forwards=4, **again, **exact, **base)
    add(model, "exact-k-seq", lantern, forwards=4, acceptance="k-seq", **again, **exact, **base)
    add(model, "typical", lantern, forwards=5, acceptance="typical", tree="reverse_balanced_25", **exact, **base)
    cold = {"temperature": 0.0, "guidance_scale": 1.5, "tree": "mc_sim_7b_63"}
    add(model, "exact-greedy", lantern, forwards=3, **cold, **exact)
    add(model, "lantern-greedy", lantern, forwards=3, lam=5.0, k=50, **cold)
    add(model, "zipar", "ZipARSampler", forwards=30, window=4, **base)
    add(model, "zipar-adaptive", "ZipARSampler", forwards=24, window=4, adaptive=True, **base)

    model, shipped = "heroes32-var", {"guidance_scale": 1.5, "temperature": 0.7, "top_p": 0.7}
    shipped["final_temperature"] = 0.0
    add(model, "next-scale", "NextScaleSampler", **shipped)
    add(model, "next-scale-constant", "NextScaleSampler", guidance_scale=2.0, guidance_schedule="constant", top_k=200)
    add(model, "next-scale-smooth", "NextScaleSampler", smooth=True, guidance_stop_scale=3, **shipped)
    add(model, "next-scale-two-models", "NextScaleSampler", drafter="near", refine_scale=3, guidance_scale=1.5)

    model, near = "heroes32-nar", "NeighboringSampler"
    add(model, "neighboring", near, guidance_scale=1.5, temperature=0.7)
    ramp = {"guidance_schedule": "linear", "top_k": 500, "top_p": 0.8}
    add(model, "neighboring-ramp", near, forwards=20, guidance_scale=2.0, **ramp)
    add(model, "neighboring-interval", near, forwards=16, guidance_scale=2.0, guidance_interval=30, top_p=0.6)

    model = "heroes-video-nbp"
    add(model, "next-block", "NextBlockSampler", guidance_scale=1.5, temperature=0.7)
    add(model, "next-block-top", "NextBlockSampler", forwards=36, top_k=500, top_p=0.9)

    model, masked = "heroes32-mar", "ContinuousMaskedSampler"
    constant = {"guidance_scale": 1.5, "guidance_schedule": "constant", "temperature": 0.25}
    add(model, "masked", masked, num_steps=8, **constant)
    add(model, "masked-unguided", masked, forwards=8, num_steps=64, num_diffusion_steps=10)
    add(model, "masked-disa", masked, num_steps=8, num_diffusion_steps=12, last_diffusion_steps=3, guidance_scale=2.0)

    model, causal, quick = "heroes32-mar-causal", "ContinuousSpeculativeSampler", {"num_diffusion_steps": 5}
    add(model, "next-token", causal, forwards=6, num_draft_tokens=0, **constant)
    add(model, "jacobi", "ContinuousJacobiSampler", forwards=6, window=32, **constant)
    add(model, "paths", causal, forwards=5, num_draft_tokens=2, **quick)
    for mode in ("exact", "stepwise"):
        add(model, f"near-{mode}", causal, drafter="near", forwards=8, mode=mode, num_draft_tokens=3, **quick)
        guided = {"guidance_scale": 1.5, "temperature": 0.8}
        add(
            model,
            f"near-{mode}-guided",
            causal,
            drafter="near",
            forwards=4,
            mode=mode,
            num_draft_tokens=2,
            **guided,
            **quick,
        )
    return cases


CASES = _cases()


@cache
def load(model: str, moved: float = 0.0) -> Any:
    """The pipeline of a shipped model, its weights moved by so much."""
    continuous = "-mar" in model
    kind = vargen.VideoPipeline if "video" in model else vargen.ImagePipeline
    pipe = kind.from_pretrained(model, **({"dtype": torch.float64} if continuous else {}))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    for name in WEIGHTED[1:]:
        for weight in getattr(pipe, name).parameters() if moved and getattr(pipe, name) is not None else ():
            weight.data.mul_(1 + moved * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return pipe


def digest(model: str) -> str:
    """SHA-256 of all weights."""
    found = hashlib.sha256()
    for part in WEIGHTED:
        module = getattr(load(model), part, None)
        for name, value in ({} if module is None else module.state_dict()).items():
            found.update(name.encode())
            found.update(value.float().contiguous().numpy().tobytes())
    return found.hexdigest()


def decode(case: Case, seeds: Sequence[int], forwards: int | None = None, moved: float = 0.0) -> tuple[Any, Any]:
    """Draw one image a seed; stop after ``forwards`` passes.

    Returns:
        Codes ``[B, N]`` int64, -1 where not drawn, or tokens ``[B, N, D]``, NaN where not drawn; and the passes that each image
        took ``[B]``, None for images that were not finished.
    """
    pipe = load(case.model, moved)
    drafters = {name: getattr(pipe, name) for name in ("drafter", "eagle")}
    pipe.sampler = getattr(vargen, case.sampler)(**case.settings)
    if case.drafter == "small":
        pipe.eagle = None
    if case.drafter == "near":
        pipe.drafter = _near(case.model, moved)

    def stop(pipe: Any, step: int, num_forwards: int, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = forwards is not None and step + 1 >= forwards
        return {}

    texts = VIDEO_PROMPTS if "video" in case.model else PROMPTS
    prompts = [texts[seed % len(texts)] for seed in seeds]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = pipe(prompts, seed=list(seeds), output_type="codes", callback_on_step_end=stop)
    finally:
        if "video" not in case.model:
            pipe.drafter, pipe.eagle = drafters["drafter"], drafters["eagle"]
    codes = torch.cat([part.flatten(1) for part in out.codes], dim=1) if isinstance(out.codes, list) else out.codes
    codes = codes if codes.is_floating_point() else codes.flatten(1)
    unfinished = (codes.isnan() if codes.is_floating_point() else codes < 0).any()
    return codes, None if unfinished else out.stats.forwards_per_image


@cache
def _near(model: str, moved: float) -> Any:
    near = copy.deepcopy(load(model, moved).backbone)
    for weight in near.parameters():
        weight.data.mul_(1.003)
    return near


@cache
def read() -> dict[str, np.ndarray]:
    """The record: per model "digest" and "seeds", per case the codes and "<case>/forwards"."""
    return _stored()


def _stored() -> dict[str, np.ndarray]:
    if not RECORD.is_file():
        return {}
    with np.load(RECORD) as stored:
        return dict(stored)


def record(model: str) -> dict[str, np.ndarray]:
    """Decode all cases of a model twice and keep what does not hang on the last bits."""
    drawn, steady = {}, torch.ones(NUM_CANDIDATES, dtype=torch.bool)
    for case in [case for case in CASES if case.model == model]:
        codes, passes = drawn[case] = decode(case, range(NUM_CANDIDATES))
        if not codes.is_floating_point():
            again, passes_again = decode(case, range(NUM_CANDIDATES), moved=MOVED)
            steady &= (again == codes).all(1) & (passes_again == passes)
        if case.name in SHARED_NOISE:
            steady &= (codes == next(iter(drawn.values()))[0]).all(1)  # the window's shape moves the last bits as well
        print(f"{case.key}: seeds {steady.nonzero().flatten().tolist()}", flush=True)
    seeds = steady.nonzero().flatten()[:NUM_SEEDS]
    if len(seeds) < NUM_SEEDS:
        raise SystemExit(f"only {len(seeds)} steady seeds of {NUM_CANDIDATES}; raise NUM_CANDIDATES")
    found = {f"{model}/digest": np.array(digest(model)), f"{model}/seeds": seeds.numpy().astype(np.int16)}
    for case, (codes, passes) in drawn.items():
        kept = codes[seeds]
        kept = kept[:, ::STRIDE].float() if codes.is_floating_point() else kept.short()
        found[case.key] = kept.numpy()
        found[f"{case.key}/forwards"] = passes[seeds].numpy().astype(np.int16)
    return found


def main(models: Sequence[str]) -> None:
    """Record the models, one after the other; what is stored of others stays."""
    torch.set_num_threads(1)
    known = list(dict.fromkeys(case.model for case in CASES))
    chosen = list(models) or known
    if unknown := set(chosen) - set(known):
        raise SystemExit(f"no cases of {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for model in chosen:
        found = record(model)
        stored = _stored()  # now: another process may have recorded other models meanwhile
        kept = {name: value for name, value in stored.items() if name.split("/")[0] in set(known) - {model}}
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(RECORD, **dict(sorted((kept | found).items())))
        print(f"{RECORD}: {RECORD.stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
