"""Muon and AdamW in one optimizer, against torch's own."""

import torch
from torch import nn

from vargen.training.optim import MuonAdamW, orthogonalize


def test_orthogonalize_brings_singular_values_close_to_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 8, 24), (2, 24, 8)):
        x = torch.randn(shape)
        y = orthogonalize(x)
        values = torch.linalg.svdvals(y)
        assert y.shape == shape
        assert 0.3 < values.min()
        assert values.max() < 1.3
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        nearest = u @ v  # same singular vectors: the polar factor is close
        cosine = (y * nearest).sum((1, 2)) / (y.norm(dim=(1, 2)) * nearest.norm(dim=(1, 2)))
        assert cosine.min() > 0.95


def test_adamw_group_is_torch_adamw():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    mine = MuonAdamW([{"params": list(ours.parameters())}], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        x = torch.randn(7, 5)
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_muon_agrees_with_torch_muon():
    torch.manual_seed(0)
    ours = nn.Linear(12, 24, bias=False)
    theirs = nn.Linear(12, 24, bias=False)
    theirs.load_state_dict(ours.state_dict())
    start = ours.weight.detach().clone()
    mine = MuonAdamW([{"params": [ours.weight], "muon": True}], lr=1e-2)
    reference = torch.optim.Muon(theirs.parameters(), lr=1e-2, weight_decay=0.0, adjust_lr_fn="original")
    for _ in range(3):
        x = torch.randn(32, 12)
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    moved, expected = ours.weight.detach() - start, theirs.weight.detach() - start
    # torch iterates in bfloat16, so the two agree to a few percent of the distance moved
    assert float((moved - expected).norm() / expected.norm()) < 0.05


def test_stacked_matrices_move_as_if_they_were_separate():
    torch.manual_seed(0)
    fused = nn.Parameter(torch.randn(24, 8))
    fused.num_blocks = 3
    parts = [nn.Parameter(block.clone()) for block in fused.detach().chunk(3)]
    gradient = torch.randn(24, 8)
    fused.grad = gradient.clone()
    for part, block in zip(parts, gradient.chunk(3), strict=True):
        part.grad = block.clone()
    for params in ([fused], parts):
        MuonAdamW([{"params": params, "muon": True}], lr=0.1).step()
    torch.testing.assert_close(fused.detach(), torch.cat([part.detach() for part in parts]))
