"""The item forward runs any decoding order through the same blocks: the schedules of NAR, blocks, queries, scales."""

import pytest
import torch
from torch import nn

from vargen.backbones.layers.cache.kv_cache import NOCACHE, KVCache
from vargen.backbones.layers.rope import constant_rows, grid_table, rotate, spread
from vargen.backbones.layers.transformer import (
    DropPath,
    FeedForward,
    ItemTransformer,
    RMSNorm,
    TransformerBlock,
    swiglu_dim,
)

R, D, H, W = 2, 16, 3, 4
N = H * W


class Stack(ItemTransformer, nn.Module):
    """Three blocks over a grid without conditions; the last row of the table is NULL."""

    def __init__(self, num_kv_heads=2):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(TransformerBlock(D, 2, num_kv_heads, 24) for _ in range(3))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)
        self.table = torch.cat([grid_table((H, W), D // 2), constant_rows(1, D // 2, "zero")])

    def rope_table(self, device=None):
        return self.table


@pytest.fixture(scope="module")
def items():
    return torch.randn(R, N, D, generator=torch.Generator().manual_seed(1))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def diagonals():
    index = torch.arange(N)
    distance = index // W + index % W
    return [torch.nonzero(distance == d)[:, 0] for d in range(H + W - 1)], distance


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@torch.no_grad()
def test_diagonals_equal_the_proximity_mask(items, compact, num_kv_heads):
    """NAR: bidirectional on an anti-diagonal, nearer diagonals visible; raster slots, or decode order without masks."""
    stack = Stack(num_kv_heads)
    groups, distance = diagonals()
    mask = distance[None] <= distance[:, None]
    expected = stack.forward_full(items, positions=torch.arange(N), mask=mask, taps=(2, 3))
    cache, made = KVCache(R, N, 3), 0
    for step, group in enumerate(groups):
        slots = made + torch.arange(len(group)) if compact else group
        stamp = torch.full((len(group),), step)
        out = stack.forward_items(
            items[:, group],
            cache=cache,
            slots=slots,
            tau=stamp,
            positions=group,
            all_visible=compact,
            taps=(2, 3),
        )
        assert out.shape == (2, R, len(group), D)
        close(out, expected[:, :, group])
        made += len(group)


@torch.no_grad()
def test_random_orders_differ_from_row_to_row(items):
    """RandAR: every row has its own order; a slot is a place in the order, a position a cell of the grid."""
    stack = Stack()
    order = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(r)) for r in range(R)])
    x = items.gather(1, order[..., None].expand(-1, -1, D))
    expected = stack.forward_full(x, positions=order, is_causal=True)
    cache = KVCache(R, N, 3)
    pieces = []
    for start, stop in ((0, 1), (1, 5), (5, 12)):
        slots = torch.arange(start, stop)
        piece = slice(start, stop)
        pieces.append(stack.forward_items(x[:, piece], cache=cache, slots=slots, positions=order[:, piece]))
    close(torch.cat(pieces, dim=1), expected)


@torch.no_grad()
def test_queries_leave_no_trace(items):
    """LPD: query items see the context and each other, are erased, and the tokens take their slots."""
    stack = Stack()
    queries = torch.randn(R, 4, D, generator=torch.Generator().manual_seed(5))
    index = torch.arange(8)
    context = index[:4]
    # reference: context causal, then queries that see everything before and each other
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    mask[4:, 4:] = True
    expected = stack.forward_full(torch.cat([items[:, :4], queries], 1), positions=index, mask=mask)
    clean = stack.forward_full(items[:, :8], positions=index, is_causal=True)
    cache = KVCache(R, 8, 3)
    stack.forward_items(items[:, :4], cache=cache, slots=context, positions=context)
    stamp = torch.full((4,), 4)
    out = stack.forward_items(queries, cache=cache, slots=index[4:], tau=stamp, nu=stamp, positions=index[4:])
    close(out, expected[:, 4:])
    cache.erase(index[4:])
    out = stack.forward_items(items[:, 4:5], cache=cache, slots=index[4:5], positions=index[4:5])
    close(out, clean[:, 4:5])
    cache.erase(index[5:])
    out = stack.forward_items(items[:, 5:8], cache=cache, slots=index[5:], positions=index[5:])
    close(out, clean[:, 5:8])
    # queries outside the cache read it, not each other, not themselves
    cross = stack.forward_items(
        queries, cache=cache, slots=torch.full((4,), NOCACHE), nu=torch.full((4,), 100), positions=index[4:]
    )
    alone = stack.forward_items(
        queries[:, 2:3], cache=cache, slots=torch.tensor([NOCACHE]), nu=torch.tensor([100]), positions=index[6:7]
    )
    close(cross[:, 2:3], alone)


@torch.no_grad()
def test_null_positions_have_zero_queries_and_keys(items):
    stack = Stack()
    rows = stack.rope_rows(torch.tensor([0, -1]))
    query = torch.randn(R, 2, 1, D // 2)
    turned = rotate(query, rows)
    assert torch.equal(turned[:, 0], query[:, 0])
    assert (turned[:, 1] == 0).all()
    assert stack.rope_rows(None) is None


def test_rotation_keeps_lengths_and_depends_on_offsets_only():
    table = spread(grid_table((5, 6), 16))
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 16, generator=generator).expand(1, 30, 1, 16) for _ in range(2))
    query, key = rotate(query, table)[0, :, 0], rotate(key, table)[0, :, 0]
    close(query.norm(dim=-1), query[:1].norm(dim=-1).expand(30))
    scores = query @ key.T
    close(scores[0, 8], scores[14, 22])  # both one row down, two columns right
    assert (scores[0, 8] - scores[0, 13]).abs() > 1e-3


def test_rotation_turns_neighbouring_channels_like_complex_numbers():
    table = grid_table((2, 3), 8)
    x = torch.randn(2, 6, 3, 8, generator=torch.Generator().manual_seed(0))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.view_as_complex(table)[:, None]
    close(rotate(x, spread(table)), torch.view_as_real(turned).flatten(-2))


def test_rotation_is_computed_in_float32():
    table = spread(grid_table((30, 30), 8))
    x = torch.randn(1, 900, 1, 8, generator=torch.Generator().manual_seed(0))
    half = rotate(x.bfloat16(), table)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, rotate(x.bfloat16().float(), table).bfloat16())


def test_three_axes_share_the_pairs():
    table = grid_table((2, 3, 4), 12)
    assert table.shape == (24, 6, 2)
    angle = torch.atan2(table[..., 1], table[..., 0])
    close(angle[1 * 12 + 2 * 4 + 3, ::2], torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="multiple of 4"):
        grid_table((2, 2), 6)


def test_norm_casts_before_it_scales():
    norm = RMSNorm(8).to(torch.bfloat16)
    nn.init.normal_(norm.weight)
    x = torch.randn(5, 8).bfloat16() * 100
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), y.bfloat16() * norm.weight)


def test_feed_forward_gates_with_its_first_matrix():
    layer = FeedForward(4, 6)
    x = torch.randn(3, 4)
    gate, value = x @ layer.w1.weight.T, x @ layer.w3.weight.T
    close(layer(x), (gate * gate.sigmoid() * value) @ layer.w2.weight.T)
    assert [swiglu_dim(dim) for dim in (768, 1024, 2560, 3200)] == [2048, 2816, 6912, 8704]
    assert swiglu_dim(4096, 1024, 1.3) == 14336  # with a multiplier, as in Llama 2


def test_stochastic_depth_keeps_the_expectation():
    path = DropPath(0.25).train()
    torch.manual_seed(0)
    x = torch.ones(8000, 2, 3)
    y = path(x)
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (y.amax((1, 2)) == y.amin((1, 2))).all()  # whole samples
    assert abs(float(y.mean()) - 1) < 0.03
    assert torch.equal(path.eval()(x), x)
