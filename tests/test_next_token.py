"""Next-token sampling: one code a forward pass, the law of the backbone, an image that depends on its seed only."""

import copy

import pytest
import torch

from tests.enumeration import chi_square_p, shared_noise_law, table_law, total_variation
from tests.tiny import tiny_backbone
from tests.toys import SpatialBackbone, TabularBackbone
from vargen.kernels.warp import warp_logits
from vargen.samplers.window import decoder as window
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler

SETTINGS = [
    {},
    {"guidance_scale": 2.0},
    {"guidance_scale": 0.0, "temperature": 0.7},
    {"top_k": 2, "temperature": 1.3},
    {"guidance_scale": 3.0, "top_p": 0.8},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_law_is_exactly_the_backbones(settings):
    backbone, sampler = TabularBackbone(2, (1, 5), seed=3), NextTokenSampler(**{**settings, "top_k": 0})
    assert total_variation(shared_noise_law(sampler, backbone), table_law(backbone, sampler)) < 1e-12


@pytest.mark.parametrize("settings", SETTINGS)
def test_samples_follow_the_law(settings):
    backbone, sampler = TabularBackbone(3, (2, 2), digits=1), NextTokenSampler(**settings)
    codes = sampler.sample(backbone, torch.ones(20_000, dtype=torch.int64), seeds=range(20_000)).codes
    p = chi_square_p(codes, table_law(backbone, sampler, label=1))
    assert p > 1e-4, f"p = {p:.2g}; a right sampler fails once in 10,000 runs"
    wrong = chi_square_p(codes, table_law(backbone, sampler.replace(temperature=1.1 * sampler.temperature), label=1))
    assert wrong < 1e-4, "the test has no power: it cannot tell the temperature from one a tenth higher"


def test_one_forward_a_code():
    backbone = TabularBackbone(3, (2, 3))
    out = NextTokenSampler().sample(backbone, torch.tensor([0, 1, 0]), seeds=[4, 5, 6])
    assert out.stats.num_forwards == backbone.num_forwards == 6
    assert backbone.num_rows == 3 * 5  # the last code is not fed
    assert out.stats.commit_trace.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert out.stats.forwards_per_image.tolist() == [6, 6, 6]
    assert out.stats.tokens_per_forward(6) == 1.0
    assert out.stats.guarantee == "exact"
    assert out.codes.shape == (3, 6)
    assert out.codes.dtype == torch.int64
    assert out.seeds == [4, 5, 6]


def test_greedy_follows_the_largest_logit():
    backbone = TabularBackbone(4, (1, 5), seed=1)
    out = NextTokenSampler(temperature=0, guidance_scale=2.0).sample(backbone, torch.tensor([1]), seeds=[0])
    prefix = ()
    for code in out.codes[0].tolist():
        z = warp_logits(backbone.logits_after(1, prefix)[:, None, None], guidance_scale=2.0)
        assert code == int(z.argmax())
        prefix += (code,)
    again = NextTokenSampler(temperature=0, guidance_scale=2.0).sample(backbone, torch.tensor([1]), seeds=[77])
    assert torch.equal(out.codes, again.codes)


def test_an_image_depends_on_its_seed_only():
    backbone, sampler = SpatialBackbone(64, (4, 5)), NextTokenSampler(top_k=16, guidance_scale=1.5)
    seeds, labels = [9, 2**63 + 1, 3, 12, 5], torch.zeros(5, dtype=torch.int64)
    together = sampler.sample(backbone, labels, seeds=seeds).codes
    order = [3, 0, 4, 2, 1]
    assert torch.equal(sampler.sample(backbone, labels, seeds=[seeds[i] for i in order]).codes, together[order])
    for seed, codes in zip(seeds, together, strict=True):
        assert torch.equal(sampler.sample(backbone, labels[:1], seeds=[seed]).codes[0], codes)
    assert len({tuple(c) for c in together.tolist()}) == 5


@pytest.mark.parametrize("block", [1, 100, 1 << 30])
def test_the_size_of_the_noise_block_changes_nothing(block, monkeypatch):
    backbone, sampler, labels = SpatialBackbone(16, (3, 5)), NextTokenSampler(), torch.zeros(3, dtype=torch.int64)
    expected = sampler.sample(backbone, labels, seeds=[1, 2, 3]).codes
    monkeypatch.setattr(window, "NOISE_BLOCK", block)
    assert torch.equal(sampler.sample(backbone, labels, seeds=[1, 2, 3]).codes, expected)


def test_the_global_generator_is_left_alone():
    backbone = TabularBackbone(3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = NextTokenSampler().sample(backbone, torch.tensor([0]), seeds=[5]).codes
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(NextTokenSampler().sample(backbone, torch.tensor([0]), seeds=[5]).codes, first)


def test_the_callback_sees_the_image_grow():
    seen = []

    def callback(step, state):
        seen.append((step, state.codes.clone(), state.num_committed.tolist()))

    out = NextTokenSampler().sample(TabularBackbone(3), torch.tensor([0, 1]), seeds=[1, 2], callback=callback)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    for step, codes, committed in seen:
        assert committed == [step + 1, step + 1]
        assert torch.equal(codes[:, : step + 1], out.codes[:, : step + 1])
        assert bool((codes[:, step + 1 :] == -1).all())


def test_a_run_goes_on_from_any_state():
    backbone, sampler = SpatialBackbone(16, (3, 4)), NextTokenSampler()
    expected = sampler.sample(backbone, torch.zeros(2, dtype=torch.int64), seeds=[1, 2]).codes
    state = next(
        s for s in sampler.stream(backbone, torch.zeros(2, dtype=torch.int64), seeds=[1, 2]) if s.num_forwards == 6
    )
    parked = copy.deepcopy(state)
    for branch in (state, parked):
        while not branch.done:
            branch = sampler.step(branch)
        assert torch.equal(sampler.finish(branch).codes, expected)


def test_forced_codes_are_kept_and_the_rest_follows_them():
    backbone, sampler = TabularBackbone(3, (1, 4)), NextTokenSampler()
    forced = torch.tensor([2, 1, -1, -1])
    codes = sampler.sample(
        backbone, torch.zeros(4000, dtype=torch.int64), seeds=range(4000), forced_codes=forced
    ).codes
    assert bool((codes[:, :2] == torch.tensor([2, 1])).all())
    law = {x: p for x, p in table_law(backbone, sampler).items() if x[:2] == (2, 1)}
    total = sum(law.values())
    assert chi_square_p(codes, {x: p / total for x, p in law.items()}) > 1e-4


def test_bad_logits_name_the_image_and_the_position():
    backbone = TabularBackbone(3, num_classes=2)
    backbone.table[1, :, 1:4] = float("nan")  # every law of position 1 of class 1
    with pytest.raises(ValueError, match="image 1 at position 1 are NaN"):
        NextTokenSampler().sample(backbone, torch.tensor([0, 1]), seeds=[1, 2])


@pytest.mark.parametrize(
    "sampler", [NextTokenSampler(guidance_scale=2.0), SpeculativeJacobiSampler(window=3)], ids=str
)
def test_compiled_blocks_are_one_graph_and_give_the_same_codes(sampler):
    """diffusers' regional compilation: all blocks and all steps share a graph, the prefill runs uncompiled."""
    labels, graphs = torch.tensor([1, 2]), []
    expected = sampler.sample(tiny_backbone(num_layers=3), labels, seeds=[5, 6]).codes

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    backbone = tiny_backbone(num_layers=3)
    backbone.compile_repeated_blocks(backend=count, fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(sampler.sample(backbone, labels, seeds=[5, 6]).codes, expected)
    assert len(graphs) == 1
