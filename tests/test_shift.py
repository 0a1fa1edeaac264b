"""The window moves right: tails as specified, labels true, and the decoded joint law equal to the enumerated one."""

import pytest
import torch
from scipy.stats import chi2

from vargen.kernels.draw import draw
from vargen.kernels.verify import reference
from vargen.kernels.verify.shift import shift_window
from vargen.kernels.verify.verify import Draft, Label, VerifyOutcome, verify_window
from vargen.random import Stream, random_bits

V, N, W, WIDTH = 3, 5, 4, 2
IMAGES = 40_000


def table():
    torch.manual_seed(0)
    return torch.randn(2, N, V + 1, V + 1, V) * 1.3  # logits given the two codes before; index V = none


def enumerated(**settings):
    """Exact law of all V^N images."""
    from vargen.kernels.warp import warp_logits

    laws = warp_logits(table().flatten(1, 3)[:, None], **settings)[0].softmax(-1).view(N, V + 1, V + 1, V).double()
    codes = torch.cartesian_prod(*[torch.arange(V)] * N)
    padded = torch.cat([torch.full((len(codes), 2), V), codes], 1)
    prob = torch.ones(len(codes), dtype=torch.float64)
    for n in range(N):
        prob *= laws[n, padded[:, n], padded[:, n + 1], padded[:, n + 2]]
    return prob


def decode(carry, tail, mutate=lambda draft: draft, first_seed=11, images=IMAGES, **settings):
    logits_of, column = table(), torch.arange(W)
    seeds = torch.arange(images) + first_seed
    codes = torch.full((images, N + 2 + W), V)  # two empty cells before the image, room behind it
    n, step, draft = (
        torch.zeros(images, dtype=torch.int64),
        torch.zeros(images, dtype=torch.int64),
        Draft.none(images, W),
    )
    iterations = 0
    while (n < N).any():
        rows, positions = (N - n).clamp(0, W), n[:, None] + column
        before = codes.gather(1, n[:, None] + torch.arange(2))
        fed = torch.cat([before[:, 1:], draft.tokens[:, :-1].clamp(min=0)], 1)
        older = torch.cat([before[:, :1], fed[:, :-1]], 1)
        logits = logits_of[:, positions.clamp(max=N - 1), older, fed]
        where = {"seeds": seeds, "positions": positions, "iteration": step, "num_rows": rows}
        outcome = verify_window(logits, draft, carry=carry, **where, **settings)
        written = torch.where(column < outcome.num_committed[:, None], outcome.tokens, codes.gather(1, positions + 2))
        codes.scatter_(1, positions + 2, written)
        draft = shift_window(
            outcome, logits, **where, num_positions=N, tail=tail, grid_width=WIDTH, codes=codes[:, 2 : N + 2]
        )
        draft = mutate(draft)
        n, step, iterations = n + outcome.num_committed, step + 1, iterations + 1
    return codes[:, 2 : N + 2], iterations


def p_value(codes, law):
    counts = torch.bincount((codes * V ** torch.arange(N - 1, -1, -1)).sum(1), minlength=V**N).double()
    expected = law * counts.sum()
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    keep = expected > 0
    return float(chi2.sf(float(((counts - expected).square() / expected)[keep].sum()), int(keep.sum()) - 1))


@pytest.mark.parametrize("tail", ["uniform", "repeat_left", "repeat_above"])
@pytest.mark.parametrize("carry", ["gumbel", "maximal", "independent"])
def test_joint_law_is_that_of_the_model(carry, tail):
    settings = {"guidance_scale": 1.5, "temperature": 0.9}
    codes, iterations = decode(carry, tail, **settings)
    assert iterations <= N
    assert p_value(codes, enumerated(**settings)) > 1e-4


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.7}])
def test_joint_law_with_filters(settings):
    codes, _ = decode("maximal", "uniform", **settings)
    assert p_value(codes, enumerated(**settings)) > 1e-4


def test_gumbel_carry_returns_the_tokens_of_next_token_sampling():
    codes, _ = decode("gumbel", "uniform", images=2000, top_k=2)
    seeds, before = torch.arange(2000) + 11, torch.full((2000, 2), V)
    for n in range(N):
        logits = table()[:, n, before[:, -2], before[:, -1]][:, :, None]
        code = draw(logits, seeds=seeds, positions=torch.full((2000, 1), n), top_k=2)
        before = torch.cat([before, code], 1)
    assert torch.equal(codes, before[:, 2:])


def label_of_the_next_row(draft):
    rows = (draft.row + (draft.kind == Label.ROW)).clamp(max=W - 1)
    return Draft(draft.tokens, draft.kind, draft.prob, rows, draft.logits, draft.stats)


def carried_as_uniform(draft):
    flat = torch.where(draft.kind == Label.ROW, torch.tensor(int(Label.UNIFORM), dtype=torch.int8), draft.kind)
    return Draft(draft.tokens, flat, torch.full_like(draft.prob, 1 / V), draft.row, draft.logits, draft.stats)


@pytest.mark.parametrize("mutate", [label_of_the_next_row, carried_as_uniform])
def test_wrong_labels_are_seen(mutate):
    codes, _ = decode("maximal", "uniform", mutate=mutate)
    assert p_value(codes, enumerated()) < 1e-6


def test_drawing_from_p_after_a_rejection_is_seen(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(reference, "residual", SimpleNamespace(fn=lambda p, q: p))
    codes, _ = decode("independent", "uniform")
    assert p_value(codes, enumerated()) < 1e-6


def scene(window=6, batch=3):
    torch.manual_seed(1)
    tokens = torch.randint(40, (batch, window))
    num_rows = torch.tensor([window, 3, 0][:batch])
    tokens = tokens.where(torch.arange(window) < num_rows[:, None], -1)
    committed = torch.tensor([2, 3, 0][:batch])
    outcome = VerifyOutcome(tokens, tokens > 0, torch.rand(batch, window), committed, torch.zeros(batch, window, 2))
    where = {
        "positions": torch.tensor([[4], [13], [9]])[:batch] + torch.arange(window),
        "num_rows": num_rows,
        "num_positions": 16,
        "seeds": torch.tensor([3, 4, 5])[:batch],
        "iteration": torch.tensor([0, 7, 2])[:batch],
    }
    return outcome, torch.zeros(1, batch, window, 40), where


def test_carried_rows_keep_their_law_and_the_tail_is_uniform():
    outcome, logits, where = scene()
    draft = shift_window(outcome, logits, **where)
    assert draft.kind.tolist() == [[3, 3, 3, 3, 2, 0], [0] * 6, [0] * 6]
    assert draft.tokens[0, :4].tolist() == outcome.tokens[0, 2:].tolist()
    assert draft.row[0, :4].tolist() == [2, 3, 4, 5]
    assert torch.equal(draft.prob[0, :4], outcome.prob[0, 2:])
    word = random_bits(where["seeds"], where["positions"] + 2, 1, Stream.INIT, where["iteration"])[0, 4, 0]
    assert draft.tokens[0, 4] == word * 40 >> 32
    assert draft.prob[0, 4] == pytest.approx(1 / 40)
    assert (draft.tokens[1:] == -1).all()


def test_uniform_tail_is_uniform():
    outcome, _, where = scene(window=2, batch=1)
    images = 40_000
    outcome = VerifyOutcome(*[v.expand(images, *v.shape[1:]) for v in (outcome.tokens, outcome.accepted, outcome.prob)],
                      torch.full((images,), 2), outcome.stats.expand(images, -1, -1))  # fmt: skip
    where = {name: v.expand(images, *v.shape[1:]) if isinstance(v, torch.Tensor) else v for name, v in where.items()}
    where["seeds"] = torch.arange(images)
    draft = shift_window(outcome, torch.zeros(1, images, 2, 40), **where)
    counts = torch.bincount(draft.tokens[:, 0], minlength=40).double()
    assert chi2.sf(float(((counts - images / 40).square() / (images / 40)).sum()), 39) > 1e-4


def test_left_neighbour_copies_as_in_the_released_loop(golden):
    g = golden("sjd/accept", "init.repeat_horizon.")
    width, prompt, num_new, num_codes = golden("sjd/accept")["init.meta"].tolist()
    carried, size = g["carried"].shape[1], g["prefix"].shape[1]
    window = 1 + carried + num_new + 1
    tokens = torch.full((1, window), -1)
    tokens[0, : 1 + carried] = torch.cat([g["prefix"][0, -1:], g["carried"][0]])
    outcome = VerifyOutcome(tokens, tokens > 0, torch.rand(1, window), torch.tensor([1]), torch.zeros(1, window, 2))
    origin = size - 1 - (prompt + 2)  # the released column counts from two slots behind the prompt
    draft = shift_window(
        outcome,
        torch.zeros(1, 1, window, num_codes),
        positions=origin + torch.arange(window)[None],
        num_rows=torch.tensor([1 + carried]),
        num_positions=10_000,
        seeds=torch.tensor([0]),
        iteration=torch.tensor([0]),
        tail="repeat_left",
        grid_width=width + 1,
    )
    ours, theirs = draft.tokens[0, carried : carried + num_new], g["tokens"][0]
    copied = draft.kind[0, carried : carried + num_new] == Label.POINT
    assert torch.equal(ours[copied], theirs[copied])
    assert torch.equal(theirs[~copied], g["random_fill"][0][~copied])  # column 0, random on both sides
    assert 0 < copied.sum() < num_new


def test_codes_above_come_from_the_image_or_from_the_window():
    outcome, logits, where = scene()
    codes = torch.arange(100, 116).expand(3, -1).clone()
    draft = shift_window(outcome, logits, **where, tail="repeat_above", grid_width=4, codes=codes)
    assert draft.kind.tolist()[0] == [3, 3, 3, 3, 1, 0]
    assert draft.tokens[0, 4] == outcome.tokens[0, 2]  # one row up is the first carried row
    wide = shift_window(outcome, logits, **where, tail="repeat_above", grid_width=7, codes=codes)
    assert wide.tokens[0, 4] == codes[0, 3]
    top = shift_window(outcome, logits, **where, tail="repeat_above", grid_width=11, codes=codes)
    assert top.kind[0, 4] == Label.UNIFORM
    unknown = shift_window(outcome, logits, **where, tail="repeat_above", grid_width=1, codes=codes)
    assert unknown.tokens[0, 4] == outcome.tokens[0, 5]


def test_forced_positions_become_points():
    outcome, logits, where = scene()
    forced = torch.full_like(outcome.tokens, -1)
    forced[0, 1], forced[0, 4], forced[0, 5], forced[1, 0] = 7, 8, 9, 9
    draft = shift_window(outcome, logits, **where, forced=forced)
    assert draft.kind.tolist()[0] == [3, 1, 3, 3, 1, 0]
    assert draft.tokens[0, [1, 4]].tolist() == [7, 8]
    assert draft.prob[0, [1, 4]].tolist() == [1.0, 1.0]
    assert (draft.tokens[1] == -1).all()


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("tail", "width"), [("uniform", None), ("repeat_left", 5), ("repeat_above", 3), ("repeat_above", 9)]
)
def test_kernel_equals_reference(on_kernel, poisoned, tail, width, forced):
    outcome, logits, where = scene()
    where |= {"tail": tail, "grid_width": width, "codes": torch.randint(40, (3, 16))}
    if forced:
        where["forced"] = torch.where(torch.rand(3, 6) < 0.3, 17, -1)
    reference, kernel = shift_window(outcome, logits, **where), on_kernel(shift_window, outcome, logits, **where)
    for name in ("tokens", "kind", "prob", "row"):
        assert torch.equal(getattr(kernel, name), getattr(reference, name)), name
        assert getattr(kernel, name).dtype == getattr(reference, name).dtype


def test_arguments_are_named():
    outcome, logits, where = scene()
    with pytest.raises(ValueError, match="got 'left'"):
        shift_window(outcome, logits, **where, tail="left")
    with pytest.raises(ValueError, match="grid_width"):
        shift_window(outcome, logits, **where, tail="repeat_left")
    with pytest.raises(ValueError, match="committed codes"):
        shift_window(outcome, logits, **where, tail="repeat_above", grid_width=4)
