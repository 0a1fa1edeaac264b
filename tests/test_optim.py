"""Muon and AdamW in one optimizer, against torch's own; averages of weights against their formula."""

import copy

import torch
from torch import nn

from vargen.training.checkpoints import load_named_state, named_state
from vargen.training.ema import EMA
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


def mixed_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6, bias=False), nn.Linear(6, 3))


def mixed_optimizer(model: nn.Sequential) -> MuonAdamW:
    """Muon for the first layer, AdamW for the second."""
    groups = [{"params": [model[0].weight], "muon": True}, {"params": list(model[1].parameters())}]
    return MuonAdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_adamw_group_beside_a_muon_group_is_adamw():
    """Against the formula of Loshchilov and Hutter (arXiv:1711.05101), written out."""
    model = mixed_model()
    expected = [p.detach().double() for p in model[1].parameters()]
    means, squares = ([torch.zeros_like(w) for w in expected] for _ in range(2))
    optimizer, start = mixed_optimizer(model), model[0].weight.detach().clone()
    for step in range(1, 6):
        give_gradients(model, step)
        optimizer.step()
        for i, p in enumerate(model[1].parameters()):
            gradient = p.grad.double()
            means[i] = 0.9 * means[i] + 0.1 * gradient
            squares[i] = 0.95 * squares[i] + 0.05 * gradient.square()
            mean, square = means[i] / (1 - 0.9**step), squares[i] / (1 - 0.95**step)
            expected[i] = expected[i] * (1 - 1e-2 * 0.1) - 1e-2 * mean / (square.sqrt() + 1e-8)
    for p, weight in zip(model[1].parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), weight.float())
    assert (model[0].weight != start).all()
    assert [group["muon"] for group in optimizer.param_groups] == [True, False]


def test_state_of_an_older_checkpoint_goes_on_as_if_nothing_had_been_renamed():
    """Checkpoints written before torch's AdamW was used name its moments otherwise and count steps in whole numbers."""
    model = mixed_model()
    optimizer = mixed_optimizer(model)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
    old_names = {"exp_avg": "mean", "exp_avg_sq": "square"}
    saved = {
        name: {old_names.get(k, k): int(v) if k == "step" else v.clone() for k, v in state.items()}
        for name, state in named_state(optimizer, model).items()
    }
    assert set(saved["1.weight"]) == {"mean", "square", "step"}
    other = copy.deepcopy(model)
    resumed = mixed_optimizer(other)
    load_named_state(resumed, other, saved)
    for each, its_optimizer in ((model, optimizer), (other, resumed)):
        give_gradients(each, 3)
        its_optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_average_of_weights_follows_its_formula_and_a_resumed_one_goes_on():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    ema = EMA(model, decay=0.4)
    expected = [p.detach().clone() for p in model.parameters()]
    for step in range(8):
        if step == 5:  # as a checkpoint does
            state, ema = ema.model.state_dict(), EMA(model, decay=0.4)
            ema.model.load_state_dict(state)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(6, 4))  # moves the buffers
        ema.update(model, step)
        decay = min(0.4, (1 + step) / (10 + step))
        expected = [decay * a + (1 - decay) * p.detach() for a, p in zip(expected, model.parameters(), strict=True)]
    for average, wanted in zip(ema.model.parameters(), expected, strict=True):
        torch.testing.assert_close(average, wanted)
    assert not ema.model.training
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)


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
