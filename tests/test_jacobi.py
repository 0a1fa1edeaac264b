"""Speculative Jacobi decoding: the same codes or the same law as next-token sampling, in fewer forward passes."""

import pytest
import torch

from tests.toys import SpatialBackbone, TabularBackbone
from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.samplers.window.jacobi import SpeculativeJacobiSampler
from vargen.samplers.window.next_token import NextTokenSampler

INITS = ["uniform", "repeat_left", "repeat_above"]


def zeros(n):
    return torch.zeros(n, dtype=torch.int64)


def tiny_llamagen():
    torch.manual_seed(0)
    model = LlamaGenTransformer(
        dim=32, num_layers=2, num_heads=2, codebook_size=48, grid_size=(4, 5), condition_type="class", num_classes=4
    )
    torch.nn.init.normal_(model.output.weight, std=0.4)  # zero as built, which would make all laws uniform
    return model.eval()


@pytest.mark.parametrize("window", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"guidance_scale": 2.0, "top_k": 20}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0}],
    ids=lambda s: "-".join(s) or "plain",
)
def test_shared_noise_gives_the_codes_of_next_token_sampling(window, init, settings):
    backbone = SpatialBackbone(64, (4, 6))
    expected = NextTokenSampler(**settings).sample(backbone, zeros(4), seeds=[7, 8, 9, 2**64 - 1])
    sampler = SpeculativeJacobiSampler(window=window, init=init, **settings)
    out = sampler.sample(backbone, zeros(4), seeds=[7, 8, 9, 2**64 - 1])
    assert torch.equal(out.codes, expected.codes)
    assert out.stats.num_forwards <= expected.stats.num_forwards
    if window >= 8:
        assert out.stats.num_forwards < expected.stats.num_forwards


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("window", [1, 2, 4, 8, 16, 32])
def test_shared_noise_on_a_transformer_with_a_key_value_cache(window, batch):
    model, settings = tiny_llamagen(), {"guidance_scale": 2.5, "top_k": 30}
    labels, seeds = torch.arange(4)[:batch], list(range(batch))
    expected = NextTokenSampler(**settings).sample(model, labels, seeds=seeds).codes
    out = SpeculativeJacobiSampler(window=window, **settings).sample(model, labels, seeds=seeds)
    assert torch.equal(out.codes, expected)


@pytest.mark.parametrize("carry", ["maximal", "independent"])
def test_greedy_is_greedy_under_every_carry(carry):
    backbone = SpatialBackbone(32, (4, 4))
    expected = NextTokenSampler(temperature=0).sample(backbone, zeros(2), seeds=[1, 2]).codes
    for init in INITS:
        sampler = SpeculativeJacobiSampler(window=8, carry=carry, init=init, temperature=0)
        assert torch.equal(sampler.sample(backbone, zeros(2), seeds=[1, 2]).codes, expected)


@pytest.mark.parametrize("carry", ["gumbel", "maximal", "independent"])
def test_right_guesses_are_committed_at_full_width(carry):
    backbone = TabularBackbone(2, (1, 13))
    backbone.table[..., 1] = 1000.0  # only code 1 is possible, and copying the left neighbour guesses it
    sampler = SpeculativeJacobiSampler(window=4, carry=carry, init="repeat_left")
    trace = sampler.sample(backbone, zeros(2), seeds=[1, 2]).stats.commit_trace
    assert torch.bincount(trace[0]).tolist() == torch.bincount(trace[1]).tolist() == [1, 4, 4, 4]


def spatial_speed(**settings):
    """Tokens per forward on the flat 16 x 16 model (256 codes, top-k 128, 4.3 nats a code), over 16 images."""
    out = SpeculativeJacobiSampler(top_k=128, **settings).sample(SpatialBackbone(), zeros(16), seeds=range(16))
    return out.stats.tokens_per_forward(256)


def test_the_synthetic_model_is_as_flat_as_it_says():
    entropies, backbone = [], SpatialBackbone()
    for state in NextTokenSampler(top_k=128).stream(backbone, zeros(16), seeds=range(16)):
        if not state.done:
            z = backbone.law(zeros(16), 0, state.tokens, state.length[:, None])[:, 0]
            z = z.masked_fill(z < z.topk(128).values[:, -1:], -torch.inf)
            entropies.append(torch.special.entr(z.softmax(-1)).sum(-1).mean())
    assert 4.2 < torch.stack(entropies).mean() < 4.4


@pytest.mark.slow
def test_coupled_carries_need_far_fewer_forwards_than_the_published_rule():
    speed = {carry: spatial_speed(window=32, carry=carry) for carry in ("gumbel", "maximal", "independent")}
    assert speed["gumbel"] > 4.0
    assert speed["maximal"] > 4.5
    assert speed["maximal"] > 2.3 * speed["independent"]
    assert speed["gumbel"] > 2.3 * speed["independent"]
    assert spatial_speed(window=64, carry="maximal") > speed["maximal"] > spatial_speed(window=8, carry="maximal")


@pytest.mark.slow
def test_guessing_with_the_shared_noise_beats_copying(monkeypatch):
    """The argmax of the position's own noise repeats the draw more often than a code that is independent of it."""
    from vargen.samplers.window import jacobi

    shared = spatial_speed(window=16)
    monkeypatch.setattr(jacobi, "shared_guesses", lambda _: None)
    assert shared > 1.05 * spatial_speed(window=16)
