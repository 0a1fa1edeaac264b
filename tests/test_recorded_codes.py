"""The shipped models draw what was recorded, with every sampler that fits them.

Every run draws two of the sixteen recorded images a case, most of them the first passes only; ``make test-cluster`` draws all.
Codes must be identical, tokens of continuous models within 1e-6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

import vargen
from tests.recorded_codes import CASES, MODELS, NUM_SEEDS, SHARED_NOISE, STRIDE, Case, decode, digest, load, read

TOLERANCE = 1e-6
NUMBERS = {case: number for number, case in enumerate(CASES)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in the order in which they were recorded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compare(case: Case, rows: Sequence[int], forwards: int | None) -> None:
    """Decode the recorded images ``rows`` and compare what was drawn."""
    stored = read()
    seeds = [int(stored[f"{case.model}/seeds"][row]) for row in rows]
    codes, passes = decode(case, seeds, forwards)
    expected = torch.from_numpy(stored[case.key])[list(rows)]
    if codes.is_floating_point():
        codes = codes[:, ::STRIDE]
        drawn = ~codes.isnan()
        apart = (codes - expected).abs()[drawn].max()
        assert apart <= TOLERANCE, f"tokens of {case.key} are up to {apart:.2g} from the recorded ones"
    else:
        drawn = codes >= 0
        _same(case, codes, expected.long(), drawn, seeds)
    assert bool(drawn.flatten(1).any(1).all())
    if forwards is None:
        assert bool(drawn.all())
        assert passes.tolist() == stored[f"{case.key}/forwards"][list(rows)].tolist()


def _same(case: Case, codes: Tensor, expected: Tensor, drawn: Tensor, seeds: Sequence[int]) -> None:
    wrong = (codes != expected) & drawn
    for seed, row in zip(seeds, wrong, strict=True):
        if bool(row.any()):
            first = int(row.nonzero()[0])
            pytest.fail(f"{case.key}, seed {seed}: {int(row.sum())} codes differ, the first at {first}", pytrace=False)


@pytest.mark.parametrize("model", sorted({case.model for case in CASES}))
def test_the_weights_are_those_that_were_recorded(model: str) -> None:
    recorded = str(read()[f"{model}/digest"])
    assert digest(model) == recorded, f"{model} has other weights: run `python -m tests.recorded_codes {model}`"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_codes_are_those_that_were_recorded(case: Case) -> None:
    number = NUMBERS[case]
    compare(case, [2 * number % NUM_SEEDS, (2 * number + 1) % NUM_SEEDS], case.forwards)


@pytest.mark.cluster
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_all_codes_are_those_that_were_recorded(case: Case) -> None:
    compare(case, range(NUM_SEEDS), None)


def test_every_sampler_that_fits_a_shipped_model_is_recorded() -> None:
    shipped = sorted(index.parent.name for index in MODELS.glob("*/model_index.json"))
    assert shipped == sorted({case.model for case in CASES})
    recorded = {(case.model, case.sampler) for case in CASES}
    for model in shipped:
        backbone = load(model).backbone
        for name in (name for name in dir(vargen) if name.endswith("Sampler")):
            try:
                getattr(vargen, name)().check_backbone(backbone)
            except ValueError:
                continue
            assert (model, name) in recorded


def test_the_record_is_whole_and_samplers_that_share_noise_agree() -> None:
    stored = read()
    for case in CASES:
        assert len(stored[case.key]) == len(stored[f"{case.key}/forwards"]) == NUM_SEEDS
        assert len(set(stored[f"{case.model}/seeds"].tolist())) == NUM_SEEDS
        if case.name in SHARED_NOISE:
            assert (stored[case.key] == stored[f"{case.model}/next-token"]).all()
            assert (stored[f"{case.key}/forwards"] < stored[f"{case.model}/next-token/forwards"]).all()
    whole = {part for case in CASES for part in (case.key, f"{case.key}/forwards")}
    models = {f"{case.model}/{name}" for case in CASES for name in ("digest", "seeds")}
    assert set(stored) == whole | models
