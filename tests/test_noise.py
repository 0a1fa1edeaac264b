"""Every noise number serves one purpose, whatever the sampler; the position's own may be read again, as its draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vargen
from tests.continuous_toys import ToyCausal, mixture
from tests.noise_recorder import Number, Reading, Recorder, follow
from tests.tiny import tiny_backbone, tiny_scale_pipeline
from tests.toys import SpatialBackbone, perturbed
from tests.tree_toys import TreeSpatial
from vargen.random import Stream, uniform

SEEDS = [*range(10), 2**63 + 5, 2**64 - 1]
GUMBEL, ACCEPT, FRESH, RESIDUAL, INIT, DRAFT, NORMAL, ORDER, MASK = Stream


@dataclass(frozen=True)
class Case:
    """A sampler on a toy, and the streams that it reads.

    ``shared``: guesses are made with the position's own noise and tested by equality, so the codes are next-token's. ``live``:
    which reading of a number counts where it is read again, the last (what lies behind a rejection is thrown away) or the
    first. ``padded``: the last position also stands for what lies behind the end.
    """

    sampler: str
    toy: Callable[[], Any]
    streams: set[Stream]
    settings: dict[str, Any] = field(default_factory=dict)
    drafter: Callable[[], Any] | None = None
    tokenizer: Callable[[], Any] | None = None
    shared: bool = False
    live: str = "last"
    padded: bool = False

    def __str__(self) -> str:
        return "-".join([self.sampler.removesuffix("Sampler"), *map(str, self.settings.values())])

    def run(self, recorder: Recorder) -> Tensor:
        """Draw all seeds."""
        parts = {"drafter": self.drafter, "tokenizer": self.tokenizer}
        options = {name: None if make is None else make() for name, make in parts.items()}
        sampler, labels = getattr(vargen, self.sampler)(**self.settings), torch.arange(len(SEEDS)) % 2
        with torch.no_grad():
            return follow(recorder, sampler, self.toy(), labels, seeds=SEEDS, **options)


@cache
def flat() -> SpatialBackbone:
    return SpatialBackbone(12, (3, 4), sharpness=0.5)


@cache
def worse() -> SpatialBackbone:
    return perturbed(flat(), 0.6)


@cache
def tree() -> TreeSpatial:
    return TreeSpatial(8, (2, 4), dim=4, sharpness=0.6)


@cache
def blurred() -> TreeSpatial:
    return TreeSpatial(8, (2, 4), dim=4, sharpness=0.6, blur=0.5)


def codebook() -> SimpleNamespace:
    return SimpleNamespace(codebook=tree().embedding)


def vectors() -> ToyCausal:
    return mixture()


def near() -> ToyCausal:
    """Other steps are as spread as the target's, so that residuals are drawn, not mirrored."""
    return mixture(move=0.1, values=0.3)


@cache
def scales() -> Any:
    return tiny_scale_pipeline()


def small(name: str, **config: Any) -> Callable[[], Any]:
    """A small transformer whose every weight matters."""

    @cache
    def make() -> Any:
        torch.manual_seed(1)
        shape = {"dim": 16, "num_heads": 2, "num_classes": 2}
        model = getattr(vargen, name)(**shape | config)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.4)
        return model.eval()

    return make


CODES = {"grid_size": (4, 4), "codebook_size": 12, "num_layers": 1}
CELLS = {"grid_size": (4, 4), "cells": (2, 2), "latent_channels": 3, "encoder_depth": 1, "decoder_depth": 1}
WINDOW = {"window": 5}
TESTED = {ACCEPT, FRESH, RESIDUAL, INIT}
JACOBI, LANTERN, PATHS = "SpeculativeJacobiSampler", "LanternSampler", "ContinuousSpeculativeSampler"
EXACT = {"relaxation": "none"}
TREES = {"drafter": blurred, "tokenizer": codebook}
CHAINS = {"drafter": near, "padded": True}
PROPOSED = {GUMBEL, ACCEPT, RESIDUAL}  # siblings, their tests, the code behind them


def _cases() -> list[Case]:
    cases = [
        Case("NextTokenSampler", flat, {GUMBEL}),
        Case(JACOBI, flat, {GUMBEL, INIT}, WINDOW | {"carry": "gumbel"}, shared=True),
        *(
            Case(JACOBI, flat, TESTED, WINDOW | {"carry": carry} | init)
            for carry in ("maximal", "independent")
            for init in ({}, {"init": "repeat_left"}, {"init": "repeat_above"})
        ),
        Case("DraftedJacobiSampler", flat, {GUMBEL, INIT}, WINDOW, worse, shared=True),
        Case("DraftModelSampler", flat, {GUMBEL}, {"num_drafts": 3}, worse, shared=True),
        Case("DraftModelSampler", flat, {DRAFT, *TESTED} - {INIT}, {"carry": "independent"}, worse),
        Case("GroupedSpeculativeSampler", flat, TESTED, WINDOW | {"carry": "independent"}),
        Case("GroupedSpeculativeSampler", flat, TESTED, WINDOW | {"carry": "maximal", "group_size": 4}),
        Case("ZipARSampler", tiny_backbone, {GUMBEL}, {"window": 2}, live="first"),  # the first code's fills up a pass
        Case("ZipARSampler", tiny_backbone, {GUMBEL, ACCEPT, RESIDUAL}, {"window": 1, "adaptive": True}, live="first"),
        Case("NeighboringSampler", small("NARTransformer", **CODES), {GUMBEL}),
        Case("NeighboringSampler", small("NARTransformer", **CODES), {GUMBEL}, {"top_p": 0.8, "guidance_scale": 2.0}),
        Case("ParallelGroupSampler", small("PARTransformer", group_size=4, **CODES), {GUMBEL}),
        Case("ParallelGroupSampler", small("AnyOrderTransformer", **CODES), {GUMBEL}, {"num_steps": 5}),
        Case("NextBlockSampler", small("NBPTransformer", condition_type="class", block=(1, 4), **CODES), {GUMBEL}),
        Case("MaskedSampler", small("MaskedTransformer", **CODES), {FRESH, MASK}, {"choice_temperature": 4.5}),
        Case("NextScaleSampler", lambda: scales().backbone, {GUMBEL}, tokenizer=lambda: scales().tokenizer),
        Case(
            "NextScaleSampler", lambda: scales().backbone, {GUMBEL, FRESH}, {"smooth": True},
            tokenizer=lambda: scales().tokenizer,
        ),
        Case("ContinuousMaskedSampler", vectors, {ORDER, NORMAL}, {"num_steps": 3}),
        Case("NextCellSampler", small("XARTransformer", **CELLS), {NORMAL}, {"num_steps": 3}),
        Case(PATHS, vectors, {NORMAL}, {"num_draft_tokens": 0}),
        Case("ContinuousJacobiSampler", vectors, {NORMAL}, {"window": 3, "tolerance": 0.0}, shared=True, padded=True),
        Case(PATHS, vectors, {NORMAL, ACCEPT, RESIDUAL, FRESH}, {"mode": "exact", "num_draft_tokens": 2}, **CHAINS),
        Case(PATHS, vectors, {NORMAL, ACCEPT, RESIDUAL, FRESH}, {"mode": "stepwise", "num_draft_tokens": 2}, **CHAINS),
        Case(LANTERN, tree, {GUMBEL}, EXACT | {"temperature": 0.0}, **TREES),
    ]  # fmt: skip
    bushy, row = {"tree": "reverse_balanced_25"}, {"tree": "siblings", "branching": 3}
    for settings in (bushy, row, row | {"proposal": "top"}, {"tree": "chain", "depth": 3}):
        cases.append(Case(LANTERN, tree, PROPOSED, EXACT | settings, **TREES))
    again = EXACT | {"proposal": "with_replacement"}
    dynamic = {"tree": "dynamic", "depth": 3, "branching": 2, "num_nodes": 7}
    cases += [
        Case("SpeculativeSampler", tree, {GUMBEL}, bushy, shared=True, **TREES),
        Case("SpeculativeSampler", tree, {GUMBEL}, {"tree": "dynamic", "num_draft_tokens": 6}, shared=True, **TREES),
        Case("SpeculativeSampler", tree, PROPOSED, {"rule": "recursive", "tree": "siblings"}, **TREES),
        Case(LANTERN, tree, PROPOSED | {DRAFT}, again | bushy, **TREES),
        Case(LANTERN, tree, PROPOSED | {DRAFT}, again | row | {"acceptance": "k-seq"}, **TREES),
        Case(LANTERN, tree, PROPOSED, EXACT | dynamic, **TREES),
        Case(LANTERN, tree, {GUMBEL, RESIDUAL}, EXACT | dynamic | {"acceptance": "typical"}, **TREES),
        Case(LANTERN, tree, PROPOSED, {"tree": "chain", "depth": 3, "k": 2, "lam": 3.0}, **TREES),
        Case(LANTERN, tree, PROPOSED, row | {"relaxation": "lantern", "k": 2, "residual": "upstream"}, **TREES),
    ]
    return cases


CASES = _cases()


def guilty(case: Case, recorder: Recorder, counted: dict[Number, Reading], codes: Tensor) -> str:
    """Who reads the numbers that matter twice, for the message of a failure."""
    lines = []
    for number in list(counted)[:60]:
        alone = Recorder(lambda n, reading, number=number: n == number and reading != counted[number])
        if not torch.equal(case.run(alone), codes):
            readers = ", ".join(dict.fromkeys(recorder.readers[number]))
            lines.append(f"{Stream(number.stream).name} of position {number.position}: {readers}")
        if len(lines) == 3:
            break
    return "\n".join(lines)


@pytest.mark.parametrize("case", [case for case in CASES if not case.shared], ids=str)
def test_a_number_serves_one_purpose(case: Case) -> None:
    """Dies here: the bonus code of a tree drawn with the noise of the siblings; residual noise shared by the steps of a chain; an
    acceptance uniform that comes back in the residual."""
    recorder = Recorder()
    codes = case.run(recorder)
    last = max(number.position for number in recorder.readings)
    counted = {number: found[-1 if case.live == "last" else 0] for number, found in recorder.repeated().items()}
    counted = {n: reading for n, reading in counted.items() if not (case.padded and n.position == last)}

    def thrown_away(number: Number, reading: Reading) -> bool:
        return number in counted and reading != counted[number]

    again = case.run(Recorder(thrown_away))
    if not torch.equal(again, codes):
        pytest.fail(f"read twice, and both matter:\n{guilty(case, recorder, counted, codes)}", pytrace=False)
    assert recorder.streams == case.streams


@pytest.mark.parametrize(
    "case", [case for case in CASES if ACCEPT in case.streams and "init" not in case.settings], ids=str
)
def test_what_is_read_decides_something(case: Case) -> None:
    """Dies here: an acceptance uniform that is kept for the residual, whose own goes unused."""
    codes = case.run(Recorder())
    for stream in case.streams:
        other = case.run(Recorder(lambda number, _, stream=stream: number.stream == stream))
        assert not torch.equal(other, codes), stream.name


@pytest.mark.parametrize("case", [case for case in CASES if case.shared], ids=str)
def test_a_position_is_drawn_with_its_own_noise_alone(case: Case) -> None:
    recorder = Recorder()
    codes = case.run(recorder)
    assert recorder.streams == case.streams
    next_token = Case("NextTokenSampler", case.toy, {GUMBEL})
    if NORMAL in case.streams:
        next_token = Case(PATHS, case.toy, {NORMAL}, {"num_draft_tokens": 0})
    assert torch.equal(codes, next_token.run(Recorder()))  # all readings of the position's noise were its draw
    other = case.run(Recorder(lambda number, _: number.stream not in next_token.streams))
    assert torch.equal(other, codes)


def test_every_sampler_is_listened_to() -> None:
    assert {case.sampler for case in CASES} == {name for name in dir(vargen) if name.endswith("Sampler")}


class Twice:
    """Two decisions a position; ``iterations`` numbers them, or both read the same number."""

    def __init__(self, iterations: bool) -> None:
        self.iterations = iterations

    def sample(self, backbone: Any, condition: Any, *, callback: Any) -> Any:
        keys, places = torch.arange(len(condition)), torch.arange(3).expand(len(condition), -1)
        parts = []
        for i in range(2):
            steps = torch.full_like(keys, i) if self.iterations else None
            parts.append(uniform(keys, places, 1, ACCEPT, steps)[..., 0])
            callback()
        return SimpleNamespace(codes=torch.cat(parts, dim=1))


@pytest.mark.parametrize("kept", [0, -1])
def test_the_recorder_finds_a_number_that_decides_twice(kept: int) -> None:
    recorder = Recorder()
    codes = follow(recorder, Twice(False), None, torch.zeros(4))
    assert {len(found) for found in recorder.readings.values()} == {2}
    answers = Recorder(lambda number, reading: reading != recorder.readings[number][kept])
    assert not torch.equal(follow(answers, Twice(False), None, torch.zeros(4)), codes)
    assert not follow(Recorder(), Twice(True), None, torch.zeros(4)).equal(codes)


def test_the_recorder_changes_nothing_by_itself() -> None:
    case = CASES[1]
    sampler = getattr(vargen, case.sampler)(**case.settings)
    expected = sampler.sample(case.toy(), torch.arange(len(SEEDS)) % 2, seeds=SEEDS).codes
    recorder = Recorder()
    assert torch.equal(case.run(recorder), expected)
    assert recorder.repeated()
