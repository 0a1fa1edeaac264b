"""Passes in fixed shapes: not one bit of a logit depends on what shares the forward pass, and so no code does."""

import pytest
import torch

import vargen
from tests.toys import SpatialBackbone
from vargen.backbones.decoding.row_invariant import RowInvariant
from vargen.samplers.base import Sampler

SETTINGS = {"guidance_scale": 2.0, "top_k": 60}


def model(dtype):
    torch.manual_seed(0)
    backbone = vargen.LlamaGenTransformer(
        dim=96, num_layers=1, num_heads=4, num_kv_heads=2, codebook_size=128, grid_size=(4, 7), condition_type="class",
        num_classes=4,
    )  # fmt: skip
    torch.nn.init.normal_(backbone.output.weight, std=0.4)
    return backbone.to(dtype).eval()


def logits(backbone, batch, width, row_invariant):
    """Scores of the same slots of image 0: behind 5 permanent codes, in a window of that width, among so many images."""
    codes = torch.arange(40).expand(batch, -1) * 3 % 128
    prepared = backbone.prepare(torch.arange(batch), guidance_scale=2.0)
    session, first = backbone.open(prepared, max_window=width, row_invariant=row_invariant)
    found = [first.logits[:, 0]]
    for start in range(0, 24, width):
        found.append(backbone.step(session, codes[:, start : start + width]).logits[:, 0])
        backbone.commit(session, width)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "width"), [(1, 8), (3, 1), (4, 24)])
def test_not_one_bit_depends_on_rows_or_images(dtype, batch, width):
    backbone = model(dtype)
    assert torch.equal(logits(backbone, 1, 1, True), logits(backbone, batch, width, True))


def test_without_it_bits_do_depend_on_them():
    backbone = model(torch.float32)
    alone = logits(backbone, 1, 1, False)
    assert any(not torch.equal(alone, logits(backbone, *shape, False)) for shape in [(1, 8), (4, 24), (4, 2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_equal_for_all_windows_and_batches(dtype):
    backbone, labels, seeds = model(dtype), torch.arange(3), [4, 5, 6]
    exact = {"row_invariant": True, **SETTINGS}
    expected = vargen.NextTokenSampler(**exact).sample(backbone, labels, seeds=seeds).codes
    for window in (1, 8, 32, "auto"):
        sampler = vargen.SpeculativeJacobiSampler(window=window, **exact)
        out = sampler.sample(backbone, labels, seeds=seeds)
        assert torch.equal(out.codes, expected), window
        assert not out.stats.notes
        alone = sampler.sample(backbone, labels[1:2], seeds=seeds[1:2])
        assert torch.equal(alone.codes, expected[1:2]), window


def test_the_numbers_are_those_of_plain_passes_but_for_rounding():
    backbone = model(torch.float32)
    torch.testing.assert_close(logits(backbone, 2, 8, True), logits(backbone, 2, 8, False), rtol=1e-4, atol=1e-4)


def test_trees_run_in_fixed_shapes_too():
    backbone, labels = model(torch.bfloat16), torch.arange(2)
    exact = {"row_invariant": True, **SETTINGS}
    expected = vargen.NextTokenSampler(**exact).sample(backbone, labels, seeds=[1, 2]).codes
    sampler = vargen.SpeculativeSampler(tree="mc_sim_7b_63", **exact)
    out = sampler.sample(backbone, labels, seeds=[1, 2], drafter=backbone)
    assert torch.equal(out.codes, expected)


def test_it_is_a_setting_that_saves():
    sampler = vargen.NextTokenSampler(row_invariant=True)
    assert Sampler.from_config(sampler.config) == sampler


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match="row_invariant must be"):
        vargen.NextTokenSampler(row_invariant="yes")
    with pytest.raises(ValueError, match="SpatialBackbone offers no row_invariant passes; leave row_invariant=False"):
        vargen.NextTokenSampler(row_invariant=True).sample(
            SpatialBackbone(8, (2, 2)), torch.zeros(1).long(), seeds=[1]
        )


def test_other_operations_are_left_alone():
    x = torch.randn(3, 5)
    with RowInvariant(8):
        assert torch.equal(x.softmax(-1), x.clone().softmax(-1))
        assert torch.nn.functional.linear(x, torch.ones(2, 5)).shape == (3, 2)
