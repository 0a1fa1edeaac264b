"""Philox against the published vectors; noise has the law it claims and depends on seed and place only."""

import math

import pytest
import torch

from vargen.random import (
    MASK,
    GumbelCache,
    Stream,
    gumbel,
    image_seeds,
    normal,
    philox4x32,
    random_bits,
    seed_tensor,
    uniform,
)

SEEDS = seed_tensor([0, 7, (1 << 64) - 1])
POSITIONS = torch.tensor([[0, 1, 2, 3], [5, 9, 4, 4], [1 << 20, 3, 2, 1]])


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [  # Random123, kat_vectors, philox4x32 10
        ([0, 0], [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK, MASK], [MASK] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0xA4093822, 0x299F31D0],
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers_of_random123(key, counter, words):
    assert philox4x32(torch.tensor(key), torch.tensor(counter)).tolist() == words


def test_keys_and_counters_broadcast():
    keys, counters = torch.randint(MASK, (5, 1, 2)), torch.randint(MASK, (1, 3, 4))
    words = philox4x32(keys, counters)
    assert words.shape == (5, 3, 4)
    assert torch.equal(words[4, 2], philox4x32(keys[4, 0], counters[0, 2]))


def test_counter_is_position_lane_stream_iteration():
    iteration = torch.tensor([3, 4, 5])
    bits = random_bits(SEEDS, POSITIONS, 10, Stream.RESIDUAL, iteration)
    assert bits.shape == (3, 4, 10)
    for image, seed in enumerate([0, 7, (1 << 64) - 1]):
        key = torch.tensor([seed & MASK, seed >> 32])
        for column in range(4):
            lanes = [[int(POSITIONS[image, column]), lane, 3, 3 + image] for lane in range(3)]
            assert torch.equal(bits[image, column], philox4x32(key, torch.tensor(lanes)).flatten()[:10])


def test_the_two_implementations_agree(monkeypatch):
    """On the CPU numpy computes the words, elsewhere and inside torch.compile the integer operators of PyTorch."""
    numpy_words = random_bits(SEEDS, POSITIONS, 1001, Stream.FRESH, torch.tensor([1, (1 << 32) - 1, 3]))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(
        random_bits(SEEDS, POSITIONS, 1001, Stream.FRESH, torch.tensor([1, (1 << 32) - 1, 3])), numpy_words
    )


def test_a_row_does_not_depend_on_the_batch_or_on_how_work_is_cut(monkeypatch):
    whole = gumbel(SEEDS, POSITIONS, 1000, Stream.FRESH, torch.tensor([1, 2, 3]))
    alone = gumbel(SEEDS[1:2], POSITIONS[1:2, 2:3], 1000, Stream.FRESH, torch.tensor([2]))
    assert torch.equal(whole[1, 2], alone[0, 0])
    monkeypatch.setattr("vargen.random._CHUNK", 300)
    assert torch.equal(gumbel(SEEDS, POSITIONS, 1000, Stream.FRESH, torch.tensor([1, 2, 3])), whole)


def test_streams_may_differ_from_row_to_row():
    streams = torch.tensor([[2, 3, 2, 3]] * 3)
    mixed = gumbel(SEEDS, POSITIONS, 9, streams)
    assert torch.equal(mixed[:, 1::2], gumbel(SEEDS, POSITIONS, 9, Stream.RESIDUAL)[:, 1::2])
    assert torch.equal(mixed[:, ::2], gumbel(SEEDS, POSITIONS, 9, Stream.FRESH)[:, ::2])


def test_uniform_is_a_24_bit_truncation_below_one():
    values = uniform(SEEDS, POSITIONS, 5000, Stream.ACCEPT)
    assert values.dtype == torch.float32
    assert values.min() >= 0
    assert values.max() < 1
    assert torch.equal(values * 2**24, (values * 2**24).round())


def test_gumbel_follows_its_formula_at_the_ends(monkeypatch):
    words = torch.tensor([0, 1, 1 << 16, 1 << 31, MASK - 1, MASK])
    lanes = [words[:4][None], words[2:][None], words[:4][None], words[:4][None]]
    monkeypatch.setattr("vargen.random._lanes", lambda *arguments: [(slice(0, 1), lanes)])
    g = gumbel(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), 16)[0, 0].view(4, 4)
    exact = -torch.log(-torch.log1p(-(words.double() + 0.5) * 2.0**-32))
    assert torch.allclose(g[:, 0].double(), exact[:4], atol=1e-5)
    assert torch.allclose(g[:2, 1].double(), exact[2:4], atol=1e-5)
    assert g[0, 0] == pytest.approx(33 * math.log(2), abs=1e-4)  # the tail that decides an argmax is fine-grained
    assert torch.isfinite(g).all()  # r near 2^32 rounds to 1 in float32 and must not give -inf


def test_gumbel_and_normal_have_their_laws():
    seeds = torch.zeros(1, dtype=torch.int64)
    positions = torch.zeros(1, 1, dtype=torch.int64)
    for sample, cdf in (
        (gumbel(seeds, positions, 200_000), lambda x: torch.exp(-torch.exp(-x))),
        (normal(seeds, positions, 200_001), torch.special.ndtr),
    ):
        ordered = sample.flatten().double().sort().values
        steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
        gap = torch.maximum((cdf(ordered) - steps[:-1]).abs(), (cdf(ordered) - steps[1:]).abs()).max()
        assert gap * len(ordered) ** 0.5 < 2.2  # Kolmogorov-Smirnov; false alarm 1e-4, but the seed is fixed
    assert normal(seeds, positions, 7).shape == (1, 1, 7)


def test_cache_returns_the_rows_and_survives_select():
    cache = GumbelCache(SEEDS, 4, 33)
    for start in (torch.tensor([0, 2, 7]), torch.tensor([1, 2, 9]), torch.tensor([5, 6, 10])):
        positions = start[:, None] + torch.arange(4)
        assert torch.equal(cache.rows(positions), gumbel(SEEDS, positions, 33))
    keep = torch.tensor([2, 0])
    cache.select(keep)
    positions = torch.tensor([[11, 12], [6, 7]])
    assert torch.equal(cache.rows(positions), gumbel(SEEDS[keep], positions, 33))
    with pytest.raises(ValueError, match="window of 5"):
        cache.rows(torch.zeros(2, 5, dtype=torch.int64))


def test_cache_does_not_compute_a_row_twice(monkeypatch):
    asked = []
    monkeypatch.setattr("vargen.random.gumbel", lambda s, p, v: asked.append(p.flatten().tolist()) or gumbel(s, p, v))
    cache = GumbelCache(SEEDS[:1], 3, 8)
    cache.rows(torch.tensor([[0, 1, 2]]))
    cache.rows(torch.tensor([[1, 2, 3]]))
    assert asked == [[0, 1, 2], [3]]


def test_image_seeds():
    assert image_seeds(5, None, 3) == [5, 6, 7]
    assert image_seeds((1 << 64) - 1, None, 2) == [(1 << 64) - 1, 0]
    assert image_seeds([9, 2], None, 2) == [9, 2]
    one = image_seeds(None, torch.Generator().manual_seed(3), 2)
    assert one == image_seeds(None, torch.Generator().manual_seed(3), 2)
    assert one[:1] == image_seeds(None, [torch.Generator().manual_seed(3)], 1)
    assert len(set(one)) == 2
    torch.manual_seed(1)
    first = image_seeds(None, None, 3)
    torch.manual_seed(1)
    assert first == image_seeds(None, None, 3)
    assert first[1] == first[0] + 1
    assert seed_tensor([(1 << 64) - 1]).tolist() == [-1]


@pytest.mark.parametrize(
    ("seed", "generator", "words"),
    [
        (1, torch.Generator(), "not both"),
        ([1, 2, 3], None, "list of 3"),
        (-1, None, "2\\*\\*64"),
        (1 << 64, None, "2\\*\\*64"),
        (1.5, None, "integer"),
        (True, None, "integer"),
        (None, [torch.Generator()], "list of 1"),
        (None, ["x", "y"], "torch.Generator"),
    ],
)
def test_bad_seeds_are_named(seed, generator, words):
    with pytest.raises(ValueError, match=words):
        image_seeds(seed, generator, 2)
