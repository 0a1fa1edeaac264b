"""Promises of the vector quantizer and of k-means."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vargen.tokenizers.vq.kmeans import kmeans
from vargen.tokenizers.vq.quantizers import VectorQuantizer, entropy_loss

SETTINGS = settings(max_examples=40, deadline=None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quantizer(codebook: Tensor, **options: object) -> VectorQuantizer:
    module = VectorQuantizer(*codebook.shape, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        module.embedding.weight.copy_(codebook)
    return module.eval()


@st.composite
def problem(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Vectors [n, C] and a codebook [V, C] of small integers: float32 distances are exact and ties are common."""
    n, v, c = draw(st.integers(1, 9)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    source = generator(draw(st.integers(0, 2**31)))
    return (torch.randint(-3, 4, (size, c), generator=source).float() for size in (n, v))  # type: ignore[return-value]


@SETTINGS
@given(problem())
def test_code_is_the_first_nearest(case: tuple[Tensor, Tensor]) -> None:
    vectors, codebook = case
    codes = quantizer(codebook, l2_norm=False).nearest(vectors)
    for vector, code in zip(vectors.tolist(), codes.tolist(), strict=True):
        distances = [sum((a - b) ** 2 for a, b in zip(vector, row, strict=True)) for row in codebook.tolist()]
        assert code == distances.index(min(distances))


@SETTINGS
@given(problem())
def test_quantizing_twice_changes_nothing(case: tuple[Tensor, Tensor]) -> None:
    vectors, codebook = case
    module = quantizer(codebook, l2_norm=False)
    codes = module.nearest(vectors)
    assert torch.equal(module.nearest(module.lookup(codes)), codes)


@SETTINGS
@given(problem(), st.integers(0, 2**31))
def test_permuting_the_codebook_permutes_codes(case: tuple[Tensor, Tensor], seed: int) -> None:
    vectors, codebook = case
    order = torch.randperm(len(codebook), generator=generator(seed))
    one, two = quantizer(codebook, l2_norm=False), quantizer(codebook[order], l2_norm=False)
    first, second = one.nearest(vectors), two.nearest(vectors)
    distances = torch.cdist(vectors.double(), codebook.double()).square().round()
    rows = torch.arange(len(vectors))
    assert torch.equal(distances[rows, first], distances[rows, order[second]])
    unique = (distances == distances.min(1, keepdim=True).values).sum(1) == 1
    assert torch.equal(first[unique], order[second][unique])


@SETTINGS
@given(problem())
def test_repeated_rows_are_never_used(case: tuple[Tensor, Tensor]) -> None:
    vectors, codebook = case
    codes = quantizer(codebook.repeat(2, 1), l2_norm=False).nearest(vectors)
    assert torch.equal(codes, quantizer(codebook, l2_norm=False).nearest(vectors))


@SETTINGS
@given(problem(), st.integers(-6, 6))
def test_l2_norm_ignores_lengths(case: tuple[Tensor, Tensor], exponent: int) -> None:
    vectors, codebook = case
    keep = vectors.norm(dim=1) > 0
    vectors, codebook = vectors[keep], codebook[codebook.norm(dim=1) > 0]
    if not len(vectors) or not len(codebook):
        return
    module = quantizer(codebook, l2_norm=True)
    codes = module.nearest(vectors)
    # powers of two keep every float32 digit
    assert torch.equal(module.nearest(vectors * 2.0**exponent), codes)
    assert torch.equal(quantizer(codebook * 2.0**exponent, l2_norm=True).nearest(vectors), codes)
    cosine = F.normalize(vectors.double(), dim=1) @ F.normalize(codebook.double(), dim=1).T
    assert bool((cosine.gather(1, codes[:, None])[:, 0] >= cosine.max(1).values - 1e-6).all())


def test_codes_of_real_vectors_are_nearest_in_double_precision() -> None:
    vectors, codebook = torch.randn(301, 8, generator=generator()), torch.randn(37, 8, generator=generator(1))
    expected = torch.cdist(vectors.double(), codebook.double()).argmin(1)
    assert torch.equal(quantizer(codebook, l2_norm=False).nearest(vectors), expected)


def test_grid_is_row_major() -> None:
    codebook = torch.eye(4)
    grid = torch.tensor([[[0, 1, 2], [3, 2, 1]]])
    out = quantizer(codebook, l2_norm=False)(F.one_hot(grid, 4).permute(0, 3, 1, 2).float())
    assert torch.equal(out.codes, grid)
    assert out.vq_loss is None


def test_straight_through_passes_the_gradient_unchanged() -> None:
    module = quantizer(torch.randn(6, 3, generator=generator()), l2_norm=False).train()
    z = torch.randn(2, 3, 4, 4, generator=generator(1), requires_grad=True)
    weight = torch.randn(2, 3, 4, 4, generator=generator(2))
    out = module(z)
    (out.latents * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)
    torch.testing.assert_close(out.latents, module.lookup(out.codes).permute(0, 3, 1, 2))
    assert module.embedding.weight.grad is None


def test_losses_pull_the_side_they_name() -> None:
    for part, moves_codes in (("vq_loss", True), ("commit_loss", False)):
        module = quantizer(torch.randn(6, 3, generator=generator()), l2_norm=False).train()
        z = torch.randn(1, 3, 2, 2, generator=generator(1), requires_grad=True)
        getattr(module(z), part).backward()
        assert (module.embedding.weight.grad is not None) == moves_codes
        assert (z.grad is not None) == (not moves_codes)


def test_legacy_beta_weights_the_codebook_term() -> None:
    codebook, z = torch.randn(6, 3, generator=generator()), torch.randn(1, 3, 4, 4, generator=generator(1))
    now = quantizer(codebook, l2_norm=False, commit_loss_beta=0.25).train()(z)
    legacy = quantizer(codebook, l2_norm=False, commit_loss_beta=0.25, legacy_beta=True).train()(z)
    error = F.mse_loss(now.latents, z)
    torch.testing.assert_close(torch.stack([now.vq_loss, now.commit_loss]), torch.stack([error, 0.25 * error]))
    torch.testing.assert_close(torch.stack([legacy.vq_loss, legacy.commit_loss]), torch.stack([0.25 * error, error]))


def test_entropy_loss_is_lowest_for_confident_rows_and_even_use() -> None:
    even = 100 * (1 - torch.eye(4))  # every row certain, all codes used
    collapsed = 100 * (1 - torch.eye(4)[[0, 0, 0, 0]])
    undecided = torch.ones(4, 4)
    log4 = torch.tensor(4.0).log()
    torch.testing.assert_close(entropy_loss(even), -log4, atol=1e-3, rtol=0)
    torch.testing.assert_close(entropy_loss(collapsed), torch.tensor(0.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(entropy_loss(undecided), torch.tensor(0.0), atol=1e-3, rtol=0)


def test_usage_counts_distinct_recent_codes() -> None:
    module = quantizer(torch.eye(8), l2_norm=False)
    z = F.one_hot(torch.tensor([[[0, 1], [1, 5]]]), 8).permute(0, 3, 1, 2).float()
    module(z)
    assert module.usage == 0.0  # evaluation leaves no trace
    module.train()(z)
    assert module.usage == 3 / 8
    assert module.code_counts.tolist() == [1, 2, 0, 0, 0, 1, 0, 0]


def test_dead_codes_move_onto_vectors_and_live_ones_stay() -> None:
    module = quantizer(torch.eye(8), l2_norm=False).train()
    module(F.one_hot(torch.tensor([[[0, 1], [1, 5]]]), 8).permute(0, 3, 1, 2).float())
    vectors = torch.randn(20, 8, generator=generator())
    assert module.restart_dead_codes_(vectors, generator(1)) == 5
    assert torch.equal(module.codebook[[0, 1, 5]], torch.eye(8)[[0, 1, 5]])
    moved = module.codebook[[2, 3, 4, 6, 7]]
    assert bool((moved[:, None] == vectors[None]).all(-1).any(1).all())
    assert len(moved.unique(dim=0)) == 5
    assert module.restart_dead_codes_(vectors, generator(1), min_count=0) == 0  # counts began anew, none required


def test_dead_codes_survive_fewer_vectors_than_codes() -> None:
    module = quantizer(torch.eye(8), l2_norm=True).train()
    assert module.restart_dead_codes_(torch.ones(3, 8), generator()) == 8
    torch.testing.assert_close(module.embedding.weight.norm(dim=1), torch.ones(8))


def test_half_precision_codes_come_from_float32_arithmetic() -> None:
    codebook = torch.randn(64, 8, generator=generator()).bfloat16()
    z = torch.randn(1, 8, 8, 8, generator=generator(1)).bfloat16()
    out = quantizer(codebook.float(), l2_norm=True).bfloat16()(z)
    assert out.latents.dtype == torch.bfloat16
    assert torch.equal(out.codes, quantizer(codebook.float(), l2_norm=True)(z.float()).codes)


def clusters(seed: int = 0) -> tuple[Tensor, Tensor]:
    centers = 10 * torch.randn(12, 5, generator=generator(seed))
    return centers, (centers[:, None] + 0.01 * torch.randn(12, 30, 5, generator=generator(seed + 1))).flatten(0, 1)


def test_kmeans_finds_separated_clusters() -> None:
    centers, vectors = clusters()
    found, error = kmeans(vectors, 12, generator=generator())
    distance = torch.cdist(centers, found)
    assert distance.min(1).values.max() < 0.05
    assert sorted(distance.argmin(1).tolist()) == list(range(12))
    assert error == pytest.approx(5 * 1e-4, rel=0.2)


def test_kmeans_is_a_function_of_vectors_and_generator() -> None:
    vectors = torch.randn(500, 6, generator=generator())
    first, second, other = (kmeans(vectors, 20, generator=generator(s))[0] for s in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    state = torch.random.get_rng_state()
    kmeans(vectors, 20, generator=generator(3))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_kmeans_that_goes_on_keeps_the_place_of_centroids() -> None:
    vectors = torch.randn(400, 3, generator=generator(5))
    first, error = kmeans(vectors, 20, generator=generator(6), num_iterations=2)
    order = torch.randperm(20, generator=generator(7))
    further, less = kmeans(vectors, 20, num_iterations=3, start=first)
    shuffled, _ = kmeans(vectors, 20, num_iterations=3, start=first[order])
    torch.testing.assert_close(shuffled, further[order])
    assert less < error
    few = vectors[:5]
    kept, _ = kmeans(few, 20, num_iterations=0, start=first)
    assert torch.equal(kept, first)


def test_kmeans_improves_on_a_random_subset_and_with_iterations() -> None:
    vectors = torch.randn(2000, 6, generator=generator())
    subset = vectors[torch.randperm(2000, generator=generator(1))[:32]]
    random_error = float(torch.cdist(vectors, subset).min(1).values.square().mean())
    seeded = kmeans(vectors, 32, generator=generator(2), num_iterations=0)[1]
    refined = kmeans(vectors, 32, generator=generator(2), num_iterations=10)[1]
    assert refined < seeded
    assert refined < 0.9 * random_error


def test_kmeans_reports_the_error_of_its_centroids() -> None:
    vectors = torch.randn(300, 4, generator=generator()).repeat(2, 1)
    centroids, error = kmeans(vectors, 9, generator=generator())
    assert error == pytest.approx(float(torch.cdist(vectors, centroids).min(1).values.square().mean()), rel=1e-4)


def test_kmeans_weighs_repeated_vectors() -> None:
    vectors = torch.tensor([[0.0]] * 9 + [[1.0]])
    centroids, error = kmeans(vectors, 1, generator=generator())
    assert float(centroids) == pytest.approx(0.1)
    assert error == pytest.approx(0.09)


def test_kmeans_on_directions_gives_unit_centroids() -> None:
    _, vectors = clusters()
    centroids, _ = kmeans(vectors, 12, l2_norm=True, generator=generator())
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(12))
    doubled, _ = kmeans(vectors * 2, 12, l2_norm=True, generator=generator())
    assert torch.equal(centroids, doubled)


def test_kmeans_keeps_every_vector_when_there_are_few() -> None:
    vectors = torch.tensor([[0.0, 1.0], [2.0, 3.0], [0.0, 1.0]])
    centroids, error = kmeans(vectors, 5, generator=generator())
    assert error == 0
    assert centroids.unique(dim=0).tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_kmeans_leaves_no_centroid_empty() -> None:
    # three far groups, many centroids: seeding and reseeding must not strand any of them
    vectors = torch.cat([torch.randn(200, 3, generator=generator(i)) + 50 * i for i in range(3)])
    centroids, _ = kmeans(vectors, 40, generator=generator())
    assert len(torch.cdist(vectors, centroids).argmin(1).unique()) == 40


def test_kmeans_initialises_a_quantizer() -> None:
    _, vectors = clusters()
    module = VectorQuantizer(12, 5, l2_norm=False)
    module.kmeans_(vectors, generator())
    labels = module.nearest(vectors).view(12, 30)
    assert bool((labels == labels[:, :1]).all())
    assert len(labels[:, 0].unique()) == 12


@pytest.mark.parametrize("vectors", [torch.zeros(0, 3), torch.zeros(3), torch.full((4, 2), float("nan"))])
def test_kmeans_refuses_what_it_cannot_cluster(vectors: Tensor) -> None:
    with pytest.raises(ValueError, match="vectors must be"):
        kmeans(vectors, 2)
