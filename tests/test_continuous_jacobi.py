"""Jacobi decoding of continuous tokens: next-token's tokens, in fewer passes, without a drafter."""

import math

import pytest
import torch

import vargen
from tests.continuous_toys import linear_gaussian
from tests.test_auto_window import Cycle
from tests.test_continuous_pipeline import causal, pipeline

SEEDS = [3, 4, 2**64 - 1]


def next_token(**settings):
    return vargen.ContinuousSpeculativeSampler(num_draft_tokens=0, **settings)


def jacobi(**settings):
    return vargen.ContinuousJacobiSampler(**settings)


def model():
    """A small one whose tokens depend on those before them, which a head as built forgets."""
    backbone = causal().double()
    torch.manual_seed(0)
    for weight in backbone.diffloss.parameters():
        torch.nn.init.normal_(weight, std=0.12)
    return backbone


def draw(sampler, backbone=None, seeds=SEEDS):
    return sampler.sample(model() if backbone is None else backbone, torch.arange(len(seeds)) % 2, seeds=seeds)


SETTINGS = [
    {},
    {"guidance_scale": 2.0},
    {"guidance_scale": 2.0, "guidance_schedule": "constant", "temperature": 0.25},
    {"temperature": 0.0, "final_noise": False, "num_diffusion_steps": 4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "plain")
@pytest.mark.parametrize("window", [1, 3, 64, "auto"])
def test_tokens_are_those_of_next_token_decoding(window, settings):
    settings = {"num_diffusion_steps": 6} | settings
    expected = draw(next_token(**settings))
    out = draw(jacobi(window=window, tolerance=1e-9, **settings))
    torch.testing.assert_close(out.latents, expected.latents, rtol=0, atol=1e-6)
    assert out.stats.num_forwards <= expected.stats.num_forwards
    assert len(out.stats.widths) == out.stats.num_forwards - 1


def test_fewer_passes_and_a_bound_that_is_measured():
    expected = draw(next_token())
    out = draw(jacobi(tolerance=1e-3))
    assert out.stats.num_forwards < 0.8 * expected.stats.num_forwards
    moved = out.stats.extra["largest_change"]
    assert 0 < moved <= 1e-3
    assert out.stats.guarantee == "heuristic"
    assert f"{moved:.1e}" in out.stats.notes[0]
    assert float((out.latents - expected.latents).abs().max()) < 0.1


def test_tolerance_zero_is_exact_and_still_fast_where_tokens_depend_on_few_others():
    toy = linear_gaussian(num_tokens=12, slope=0.0)  # tokens that do not depend on one another settle at once
    expected = draw(next_token(), toy)
    out = draw(jacobi(tolerance=0.0, window=6), toy)
    assert torch.equal(out.latents, expected.latents)
    assert out.stats.guarantee == "exact"
    assert not out.stats.notes
    assert out.stats.extra["largest_change"] == 0.0
    assert out.stats.num_forwards <= 6


def test_a_token_behind_one_that_moved_is_not_kept():
    """Dies here: committing past the first row whose input was not settled."""
    toy = linear_gaussian(num_tokens=9, slope=0.9)
    for tolerance in (0.0, 1e-12):
        out = draw(jacobi(tolerance=tolerance, window=9), toy)
        torch.testing.assert_close(out.latents, draw(next_token(), toy).latents, rtol=0, atol=1e-9)


def test_images_do_not_depend_on_their_batch():
    together = draw(jacobi(tolerance=1e-6))
    assert len(set(together.stats.forwards_per_image.tolist())) > 1  # they leave at different times
    for i, seed in enumerate(SEEDS):
        alone = jacobi(tolerance=1e-6).sample(model(), torch.tensor([i % 2]), seeds=[seed])
        torch.testing.assert_close(alone.latents[0], together.latents[i], rtol=0, atol=1e-4)


def test_widths_are_chosen_told_and_repeated():
    chosen = Cycle(1, 5, 2)
    out = draw(jacobi(window=chosen, tolerance=1e-6))
    assert [told.width for told in chosen.told] == out.stats.widths
    again = draw(jacobi(window=out.stats.widths, tolerance=1e-6))
    assert again.stats.widths == out.stats.widths
    assert torch.equal(again.latents, out.latents)


def test_windows_by_batch_are_numbers_and_repeat():
    """Two equal calls agree to the last bit; a large batch is next-token decoding."""
    sampler = jacobi(window="by-batch", num_diffusion_steps=4)
    for count, width in ((1, 64), (2, 32), (4, 12), (5, 1)):
        seeds = list(range(count))
        out, again = (draw(sampler, seeds=seeds) for _ in range(2))
        assert torch.equal(out.latents, again.latents)
        assert max(out.stats.widths) == min(width, model().num_codes - 1)
    assert torch.equal(out.latents, draw(next_token(num_diffusion_steps=4), seeds=seeds).latents)
    assert vargen.ContinuousJacobiSampler.from_config(sampler.config) == sampler


def test_habit_a_pipeline_swaps_it_in():
    pipe = pipeline(causal(), next_token())
    expected = pipe(class_labels=[1], seed=5, output_type="codes").codes
    pipe.sampler = vargen.ContinuousJacobiSampler.from_config(pipe.sampler.config, tolerance=1e-6)
    out = pipe(class_labels=[1], seed=5, output_type="codes")
    torch.testing.assert_close(out.codes, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tolerance": -1e-4}, "tolerance must be at least 0, got -0.0001"),
        ({"tolerance": math.nan}, "tolerance must be a finite number at least 0, got nan"),
        ({"window": "wide"}, "window must be an integer at least 1, 'auto', or a list"),
        ({"window": 0}, "window must be an integer at least 1, got 0"),
        ({"top_k": 5}, "top_k must be 0"),
    ],
)
def test_bad_settings_are_one_line(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        jacobi(**settings)
    assert "\n" not in str(caught.value)


def test_bad_calls_are_one_line():
    with pytest.raises(ValueError, match="window must sum to at least"):
        draw(jacobi(window=[2, 2]))
    of_codes = vargen.LlamaGenTransformer(dim=16, num_layers=1, num_heads=2, grid_size=(2, 2)).eval()
    with pytest.raises(ValueError, match="ContinuousJacobiSampler needs a backbone with continuous"):
        draw(jacobi(), of_codes)
