"""Nearest codes: the definition, ties, chunks, and the kernel against its reference."""

import pytest
import torch

from vargen.kernels import nearest
from vargen.kernels.nearest import nearest_code


def brute_force(x, codebook, l2_norm):
    x, codebook = x.double(), codebook.double()
    if l2_norm:
        x, codebook = (v / v.norm(dim=-1, keepdim=True).clamp(min=1e-12) for v in (x, codebook))
    return (x[:, None] - codebook).square().sum(-1).argmin(-1)


@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize(("n", "num_codes", "channels"), [(1, 1, 1), (7, 63, 8), (130, 100, 5), (65, 129, 70)])
def test_reference_and_kernel_find_the_nearest(on_kernel, poisoned, n, num_codes, channels, l2_norm):
    torch.manual_seed(0)
    x, codebook = torch.randn(n, channels), torch.randn(num_codes, channels) * torch.rand(num_codes, 1)
    wanted = brute_force(x, codebook, l2_norm)
    assert torch.equal(nearest_code(x, codebook, l2_norm), wanted)
    assert torch.equal(on_kernel(nearest_code, x, codebook, l2_norm), wanted)


def test_the_first_of_equal_entries_wins(on_kernel):
    # small integers: products are exact, so that equal entries are equally far on every processor
    codebook = torch.randint(-8, 9, (20, 8)).float().repeat(7, 1)[torch.randperm(140)]
    x = codebook[torch.randperm(140)[:50]] + 0.25
    first = (codebook[None] == codebook[nearest_code(x, codebook)][:, None]).all(-1).long().argmax(-1)
    assert torch.equal(nearest_code(x, codebook), first)
    assert torch.equal(on_kernel(nearest_code, x, codebook), first)


def test_chunks_do_not_matter(monkeypatch):
    x, codebook = torch.randn(37, 6), torch.randn(50, 6)
    whole = nearest_code(x, codebook)
    monkeypatch.setattr(nearest, "_CHUNK", 120)
    assert torch.equal(nearest_code(x, codebook), whole)


def test_half_precision_and_views():
    x, codebook = torch.randn(8, 9, 2).to(torch.bfloat16)[..., 0], torch.randn(9, 30).T
    assert torch.equal(nearest_code(x, codebook), brute_force(x, codebook, False))


def test_no_vectors_no_codes():
    assert nearest_code(torch.empty(0, 4), torch.randn(3, 4)).shape == (0,)


def test_shapes_are_named():
    with pytest.raises(ValueError, match=r"\[3, 4\] and \[5, 6\]"):
        nearest_code(torch.randn(3, 4), torch.randn(5, 6))


def test_operator_survives_compilation():
    x, codebook = torch.randn(12, 4), torch.randn(9, 4)

    def step(x):
        return nearest_code(x * 1.0, codebook, True) + 1

    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x))
