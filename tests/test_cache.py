"""Windows through the cache give the teacher-forced logits, whatever the split, the rows, the rollbacks or the tree."""

import pytest
import torch

from vargen.backbones.layers.cache.kv_cache import NOCACHE, UNWRITTEN, KVCache, attention
from vargen.backbones.llamagen.model import LlamaGenTransformer

B, GRID, V = 3, (3, 4), 23
N = GRID[0] * GRID[1]
CONDITIONS = ["class", "caption", "attributes"]


def tiny(condition_type="class", **overrides):
    torch.manual_seed(0)
    config = {"dim": 24, "num_layers": 2, "num_heads": 3, "codebook_size": V, "grid_size": GRID, "multiple_of": 8}
    config |= {"condition_type": condition_type, "num_classes": 5, "caption_dim": 7, "num_attributes": 9}
    config |= {"num_condition_tokens": 6, **overrides}
    model = LlamaGenTransformer(**config).eval()
    for parameter in model.parameters():  # the head starts at zero: nothing could fail
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def condition_of(condition_type, batch=B):
    generator = torch.Generator().manual_seed(1)
    if condition_type == "class":
        return torch.randint(5, (batch,), generator=generator)
    if condition_type == "attributes":
        return torch.randint(9, (batch, 6), generator=generator)
    lengths = torch.tensor([2, 6, 4, 1, 5])[:batch]
    mask = torch.arange(6) >= 6 - lengths[:, None]
    return torch.randn(batch, 6, 7, generator=generator), mask


def random_codes(batch=B, length=N):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(2))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def teacher_forced(model, condition, codes):
    """[2, B, n, V]: conditional and null branch of the training forward."""
    null = torch.ones(len(codes), dtype=torch.bool)
    with torch.no_grad():
        return torch.stack([model(codes, condition), model(codes, condition, drop=null)])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("widths", [[1] * 11, [11], [4, 1, 6], [2, 2, 7]])
@pytest.mark.parametrize("condition_type", CONDITIONS)
def test_windows_equal_the_training_forward(condition_type, widths, static):
    model, condition, codes = tiny(condition_type), condition_of(condition_type), random_codes()
    expected = teacher_forced(model, condition, codes)
    session, out = model.open(model.prepare(condition, guidance_scale=2.0), max_window=max(widths), static=static)
    logits, start = [out.logits], 0
    for width in widths:
        logits.append(model.step(session, codes[:, start : start + width]).logits)
        model.commit(session, width if start % 2 else torch.full((B,), width))
        start += width
    close(torch.cat(logits, dim=2), expected)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("condition_type", CONDITIONS)
def test_ragged_rows_with_rejections_equal_the_training_forward(condition_type, static):
    model, condition, codes = tiny(condition_type), condition_of(condition_type), random_codes()
    expected = teacher_forced(model, condition, codes)
    session, _ = model.open(model.prepare(condition, guidance_scale=2.0), max_window=4, static=static)
    generator = torch.Generator().manual_seed(3)
    for step in range(12):
        length = session.length
        width = 1 + step % 4
        index = length[:, None] + torch.arange(width)
        right = torch.randint(0, width + 1, (B,), generator=generator)  # entries that agree with the sequence
        right = torch.minimum(right, N - 1 - length)
        proposal = torch.randint(V, (B, width), generator=generator)
        inside = torch.arange(width) < right[:, None]
        proposal = torch.where(inside, codes.gather(1, index.clamp(max=N - 1)), proposal)
        out = model.step(session, proposal)
        for b in range(B):
            good = int(right[b])
            close(out.logits[:, b, :good], expected[:, b, int(length[b]) + 1 : int(length[b]) + 1 + good])
        model.commit(session, right)
    assert len(set(session.length.tolist())) > 1 or session.length[0] == N - 1


def test_a_window_without_commit_vanishes():
    model, condition, codes = tiny(), condition_of("class"), random_codes()
    expected = teacher_forced(model, condition, codes)[:1]
    session, _ = model.open(model.prepare(condition), max_window=5)
    model.step(session, codes[:, :3])
    model.commit(session, 3)
    model.step(session, (codes[:, 3:8] + 1) % V)  # never committed
    out = model.step(session, codes[:, 3:4])
    close(out.logits, expected[:, :, 4:5])


@pytest.mark.parametrize("condition_type", CONDITIONS)
def test_select_keeps_the_rows_asked_for_in_their_order(condition_type):
    model, condition, codes = tiny(condition_type), condition_of(condition_type), random_codes()
    expected = teacher_forced(model, condition, codes)
    session, _ = model.open(model.prepare(condition, guidance_scale=2.0), max_window=4)
    model.step(session, codes[:, :4])
    lengths = torch.tensor([2, 4, 1])
    model.commit(session, lengths)
    rows = torch.tensor([2, 0])
    model.select(session, rows)
    assert session.length.tolist() == [1, 2]
    index = lengths[rows][:, None] + torch.arange(3)
    out = model.step(session, codes[rows].gather(1, index))
    for i, row in enumerate(rows.tolist()):
        start = int(lengths[row]) + 1
        close(out.logits[:, i], expected[:, row, start : start + 3])


@pytest.mark.parametrize("condition_type", CONDITIONS)
@pytest.mark.parametrize("ragged", [False, True])
def test_tree_windows_and_their_paths(condition_type, ragged):
    """A tree of depth 3: entries 0 -> {1, 2}, 1 -> 3, 2 -> {4, 5}; each node sees its ancestors only."""
    model, condition = tiny(condition_type), condition_of(condition_type)
    codes = random_codes()
    parents, depth = [-1, 0, 0, 1, 2, 2], torch.tensor([0, 1, 1, 2, 2, 2])
    mask = torch.eye(6, dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            mask[i] |= mask[parent]
    session, _ = model.open(model.prepare(condition, guidance_scale=2.0), max_window=6)
    model.step(session, codes[:, :3])
    start = torch.tensor([1, 3, 2]) if ragged else torch.tensor([2, 2, 2])
    model.commit(session, start)
    tree = torch.randint(V, (B, 6), generator=torch.Generator().manual_seed(5))
    tree[:, 0] = codes.gather(1, start[:, None])[:, 0]
    out = model.step(session, tree, slots=start[:, None] + depth, mask=mask, hidden=True)
    assert out.hidden is not None
    assert out.hidden.shape == (2, B, 6, 24)
    paths = [[0, 1, 3], [0, 2, 4], [0, 2, 5]]
    sequences = [
        torch.cat([codes[b, : start[b]], tree[b, torch.tensor(path)], torch.zeros(N, dtype=torch.int64)])[:N]
        for b, path in enumerate(paths)
    ]
    expected = teacher_forced(model, condition, torch.stack(sequences))
    for b, path in enumerate(paths):
        close(out.logits[:, b, path], expected[:, b, start[b] + 1 : start[b] + 4])
    depth_kept = torch.tensor([3, 2, 3])
    path = torch.tensor(paths)
    path[1, 2] = -1
    model.commit(session, depth_kept, path=path)
    assert torch.equal(session.length, start + depth_kept)
    following = torch.stack([sequences[b][session.length[b] : session.length[b] + 2] for b in range(B)])
    out = model.step(session, following)
    for b in range(B):
        close(out.logits[:, b], expected[:, b, session.length[b] + 1 : session.length[b] + 3])


@pytest.mark.parametrize("condition_type", CONDITIONS)
def test_batch_rows_equal_single_rows(condition_type):
    model, condition, codes = tiny(condition_type), condition_of(condition_type), random_codes()
    session, _ = model.open(model.prepare(condition, guidance_scale=2.0), max_window=8)
    together = model.step(session, codes[:, :8]).logits
    for b in range(B):
        one = tuple(part[b : b + 1] for part in condition) if condition_type == "caption" else condition[b : b + 1]
        session, _ = model.open(model.prepare(one, guidance_scale=2.0), max_window=8)
        close(model.step(session, codes[b : b + 1, :8]).logits, together[:, b : b + 1])


def test_a_finished_session_lends_its_buffers():
    model, condition, codes = tiny(), condition_of("class"), random_codes()
    prepared = model.prepare(condition)
    session, _ = model.open(prepared, max_window=3)
    model.step(session, (codes[:, :3] + 1) % V)
    model.commit(session, torch.tensor([3, 1, 2]))
    address = session.cache.keys[0].data_ptr()
    again, _ = model.open(prepared, max_window=3, reuse=session)
    assert again.cache.keys[0].data_ptr() == address
    out = model.step(again, codes[:, :3])
    close(out.logits, teacher_forced(model, condition, codes)[:1, :, 1:4])


def test_a_static_step_is_one_graph_for_every_acceptance_pattern():
    model, condition, codes = tiny(), condition_of("class"), random_codes()
    expected = teacher_forced(model, condition, codes)[:1]
    prepared = model.prepare(condition)
    session, _ = model.open(prepared, max_window=3, static=True)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(lambda codes: model.step(session, codes).logits, backend=count, fullgraph=True)
    for accepted in ([1, 3, 2], [0, 1, 3], [2, 2, 1], [3, 0, 0]):
        length = session.length
        logits = step(codes.gather(1, length[:, None] + torch.arange(3)))
        for b in range(B):
            close(logits[0, b], expected[0, b, length[b] + 1 : length[b] + 4])
        model.commit(session, torch.tensor(accepted))
    assert len(graphs) == 1


def test_out_of_range_requests_are_refused():
    model = tiny()
    session, _ = model.open(model.prepare(condition_of("class")), max_window=2)
    model.step(session, random_codes()[:, :2])
    with pytest.raises(ValueError, match=r"0\.\.2"):
        model.commit(session, torch.tensor([0, 3, 1]))
    model.commit(session, 2)
    with pytest.raises(ValueError, match=r"0\.\.0"):
        model.commit(session, 1)
    with pytest.raises(ValueError, match="open a larger session"):
        model.step(session, torch.zeros(B, 40, dtype=torch.int64))
    with pytest.raises(ValueError, match="max_window"):
        model.open(model.prepare(condition_of("class")), max_window=0)
    with pytest.raises(ValueError, match="eval"):
        model.train().open(model.prepare(condition_of("class")))


# the cache on its own: the mask rule in its bare form


def reference_attention(query, keys, values, visible):
    scores = (query @ keys.transpose(-1, -2)) / query.shape[-1] ** 0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values


def qkv(rows, heads, width, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, heads, width, dim, generator=generator) for _ in range(3)]


def test_stamps_decide_what_is_seen():
    """Blocks of two in scattered slots: bidirectional inside a block, later blocks see earlier ones."""
    cache = KVCache(2, 10, 1)
    assert cache.capacity == 16
    query, key, value = qkv(2, 2, 6)
    slots, block = torch.tensor([5, 0, 9, 3, 7, 1]), torch.tensor([0, 0, 1, 1, 2, 2])
    pieces = []
    for i in range(0, 6, 2):
        plan = cache.plan(slots[i : i + 2], tau=block[i : i + 2])
        piece = slice(i, i + 2)
        pieces.append(cache.attend(0, plan, query[:, :, piece], key[:, :, piece], value[:, :, piece]))
    visible = block[None] <= block[:, None]
    close(torch.cat(pieces, dim=2), reference_attention(query, key, value, visible))


def test_padding_is_seen_by_itself_only():
    cache = KVCache(2, 8, 1)
    query, key, value = qkv(2, 1, 4)
    padded = torch.tensor([[True, True, False, False], [False, False, False, False]])
    index = torch.arange(4)
    plan = cache.plan(index, tau=torch.where(padded, UNWRITTEN, index), nu=index)
    visible = (index <= index[:, None]) & ~padded[:, None] | torch.eye(4, dtype=torch.bool)
    close(cache.attend(0, plan, query, key, value), reference_attention(query, key, value, visible[:, None]))
    query, key, value = qkv(2, 1, 1, seed=9)
    plan = cache.plan(torch.tensor([4]))
    assert plan.mask[0, 0, 0, :5].tolist() == [False, False, True, True, True]
    assert plan.mask[1, 0, 0, :5].tolist() == [True] * 5


def test_uncached_items_read_and_leave_nothing():
    cache = KVCache(1, 8, 1)
    _, key, value = qkv(1, 1, 3)
    plan = cache.plan(torch.arange(3))
    cache.attend(0, plan, key, key, value)
    before = cache.keys[0][:, :, : cache.capacity].clone()
    query, k, v = qkv(1, 1, 2, seed=4)
    plan = cache.plan(torch.tensor([NOCACHE, NOCACHE]), nu=torch.tensor([0, 5]))
    out = cache.attend(0, plan, query, k, v)
    visible = torch.tensor([[True, False, False], [True, True, True]])
    close(out, reference_attention(query, key, value, visible))
    assert torch.equal(cache.keys[0][:, :, : cache.capacity], before)
    assert (cache.stamps[:, 3 : cache.capacity] == UNWRITTEN).all()


def test_erased_slots_and_rollback_hide():
    cache = KVCache(2, 8, 1)
    _, key, value = qkv(2, 1, 6)
    cache.attend(0, cache.plan(torch.arange(6)), key, key, value)
    cache.erase(torch.tensor([[1], [4]]))
    cache.rollback(torch.tensor([5, 6]))
    plan = cache.plan(torch.tensor([NOCACHE]), nu=torch.tensor([100]))
    assert plan.mask[:, 0, 0].tolist() == [
        [True, False, True, True, True, False],
        [True, True, True, True, False, True],
    ]


@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (6, 3)])
def test_grouped_queries_share_consecutive_heads(heads):
    query, key, value = (torch.randn(2, h, 5, 4) for h in (heads[0], heads[1], heads[1]))
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    full = [x.repeat_interleave(heads[0] // heads[1], dim=1) for x in (key, value)]
    close(attention(query, key, value, visible), reference_attention(query, *full, visible))
    close(attention(query, key, value, is_causal=True), reference_attention(query, *full, visible))


def test_all_visible_skips_the_mask():
    cache = KVCache(2, 8, 1)
    query, key, value = qkv(2, 1, 4)
    assert cache.plan(torch.arange(4), tau=torch.zeros(4, dtype=torch.int64), all_visible=True).mask is None
    plan = cache.plan(torch.arange(4), tau=torch.zeros(4, dtype=torch.int64), all_visible=True)
    visible = torch.ones(4, 4, dtype=torch.bool)
    close(cache.attend(0, plan, query, key, value), reference_attention(query, key, value, visible))


@pytest.mark.parametrize("static", [False, True])
def test_what_is_rewound_is_fed_anew(static):
    """A draft model runs ahead code by code; the target takes a different number of codes back in every row."""
    model, condition, codes = tiny(), condition_of("class"), random_codes()
    expected = teacher_forced(model, condition, codes)[:1]
    session, _ = model.open(model.prepare(condition), max_window=4, static=static)
    for column in range(4):
        model.step(session, (codes if column == 0 else (codes + 1) % V)[:, column, None])
        model.commit(session, 1)
    model.rewind(session, torch.tensor([3, 1, 2]))
    model.rewind(session, torch.tensor([0, 2, 1]))
    out = model.step(session, codes[:, 1:4])
    close(out.logits, expected[:, :, 2:5])
