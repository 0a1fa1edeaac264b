"""Draws that were close, listed behind a run, and what runs say about when codes are next-token's."""

import pytest
import torch

import vargen
from tests.test_jacobi import tiny_llamagen, zeros
from tests.toys import SpatialBackbone
from vargen.samplers.window import near_ties as near_module
from vargen.samplers.window.near_ties import near_ties


@pytest.mark.parametrize(
    ("dtype", "row_invariant", "expected"),
    [
        (torch.float32, False, False),
        (torch.bfloat16, False, True),
        (torch.float16, False, True),
        (torch.bfloat16, True, False),
    ],
)
@pytest.mark.parametrize("make", [vargen.NextTokenSampler, vargen.SpeculativeJacobiSampler])
def test_runs_say_whether_codes_depend_on_rows(make, dtype, row_invariant, expected):
    model = tiny_llamagen().to(dtype)
    out = make(row_invariant=row_invariant).sample(model, torch.arange(1), seeds=[1])
    assert out.stats.depends_on_rows is expected


def test_near_ties_are_listed_with_what_came_second():
    model, sampler = tiny_llamagen(), vargen.NextTokenSampler(guidance_scale=2.0, top_k=30)
    labels, seeds = torch.arange(3), [7, 8, 9]
    codes = sampler.sample(model, labels, seeds=seeds).codes
    wide = near_ties(sampler, model, labels, codes, seeds=seeds, margin=1e9)
    assert [tie.code for tie in wide] == codes.flatten().tolist()  # the best sum is what was drawn
    assert all(tie.margin >= 0 and tie.other != tie.code for tie in wide)
    limit = sorted(tie.margin for tie in wide)[3]
    some = near_ties(sampler, model, labels, codes, seeds=seeds, margin=limit)
    assert len(some) == 3
    assert near_module.MARGIN == 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": vargen.NextTokenSampler(temperature=0)}, "temperature=0"),
        ({"codes": torch.zeros(1, 3, dtype=torch.int64)}, r"codes must be \[1, .*got \[1, 3\]"),
        ({"margin": float("nan")}, "margin must be"),
        ({"margin": -1.0}, "margin must be"),
    ],
    ids=["greedy", "shape", "nan", "negative"],
)
def test_bad_near_ties_are_one_line(changes, words):
    model = SpatialBackbone(16, (4, 4))
    given = {"sampler": vargen.NextTokenSampler(), "codes": torch.zeros(1, 16, dtype=torch.int64), "margin": 1e-5}
    given |= changes
    with pytest.raises(ValueError, match=words) as caught:
        near_ties(given["sampler"], model, zeros(1), given["codes"], seeds=[1], margin=given["margin"])
    assert "\n" not in str(caught.value)
