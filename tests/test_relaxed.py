"""LANTERN on chains: released acceptance and residuals, the bounds of the rule, and the kernels against their twin."""

import pytest
import torch

from tests.windows import assert_same, scene
from vargen.kernels.tree.neighborhood import RESIDUALS, Relaxation, neighbor_mass, relaxed_residual
from vargen.kernels.verify.relaxed import verify_relaxed
from vargen.kernels.verify.verify import Draft, Label, VerifyNoise, verify_window
from vargen.kernels.warp import warp_logits
from vargen.samplers.acceptance import lantern as aggregate

LIMITS = [{"delta": 0.1}, {"delta": 0.4}, {"lam": 3.0}, {"lam": 10.0}]


def table(num_codes, width, seed=0):
    codebook = torch.randn(num_codes, 4, generator=torch.Generator().manual_seed(seed))
    return torch.cdist(codebook, codebook).fill_diagonal_(float("inf")).argsort(-1)[:, :width]


def random_laws(rows, num_codes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.rand(2, rows, num_codes, generator=generator).pow(4).unbind()
    token = torch.multinomial(q, 1, generator=generator)[:, 0]
    return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True), token


CONFIGS = {
    "add_k8_d0.1": {"k": 8, "delta": 0.1},
    "add_k24_d0.4": {"k": 24, "delta": 0.4},
    "mult_k5_l3": {"k": 5, "lam": 3.0},
    "mult_k10_l10": {"k": 10, "lam": 10.0},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_walks_the_trees_of_the_released_code(golden, config):
    neighbors = golden("lantern/neighbors")["nearest_indices"]
    relaxation = Relaxation(neighbors, residual="upstream", **CONFIGS[config])
    for trial in range(6):
        g = golden("lantern/accept_dynamic", f"trial{trial:02d}.")
        laws = warp_logits(g["node_logits"][None, None], top_k=48)[0].softmax(-1)
        node, used, depth = 0, 0, 0
        p, touched = laws[0], False
        while True:
            for child in (g["parents"] == node).nonzero().flatten().tolist():
                token = g["tree_tokens"][child][None]
                added, count = neighbor_mass(p[None], token, relaxation)
                u, used = g["uniforms"][used], used + 1
                if u < p[token] + added:
                    node, depth, p, touched = child, depth + 1, laws[child], False
                    break
                point = torch.nn.functional.one_hot(token, len(p)).float()
                p = relaxed_residual(p[None], point, token, count, torch.tensor([True]), relaxation)[0]
                p = p / p.sum() if p.sum() > 0 else torch.full_like(p, 1 / len(p))  # what the released code does
                touched = True
            else:
                break
        wanted = {name: g[f"t1.{config}.{name}"] for name in ("accept_length", "num_uniforms", "sample_p")}
        assert (depth, used) == (int(wanted["accept_length"]), int(wanted["num_uniforms"]))
        assert torch.allclose(p if touched else laws[node], wanted["sample_p"], atol=1e-6)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("limit", LIMITS)
def test_agrees_with_the_rules_of_the_tree_walk(residual, limit):
    p, q, token = random_laws(200, 30)
    p[:, ::3] = 0
    ours = Relaxation(table(30, 9), 8, residual=residual, **limit)
    theirs = aggregate.Relaxation(ours.neighbors, 8, residual=residual, **limit)
    found = aggregate.aggregate(p, token, theirs)
    added, count = neighbor_mass(p, token, ours)
    assert torch.allclose(found.own + added, found.mass)
    for point in (False, True):
        label = torch.nn.functional.one_hot(token, 30).float() if point else q
        left = relaxed_residual(p, label, token, count, torch.full_like(token, point).bool(), ours)
        wanted = aggregate.after_rejection(p, None if point else q, token, found, theirs)
        assert torch.allclose(left, wanted, atol=1e-7)


@pytest.mark.parametrize("limit", LIMITS)
def test_neighbours_join_up_to_the_limit_and_no_further(limit):
    p, _, token = random_laws(500, 30)
    relaxation = Relaxation(table(30, 8), 8, **limit)
    added, count = neighbor_mass(p, token, relaxation)
    own = p.gather(1, token[:, None])[:, 0]
    bound = limit.get("delta", 0.0) + (limit.get("lam", 1.0) - 1.0) * own
    assert (added <= bound).all()
    sums = p.gather(1, relaxation.neighbors[token]).cumsum(-1)
    more = sums.gather(1, count.clamp(max=7)[:, None])[:, 0]
    assert (more > bound)[count < 8].all()


def chain(relaxed, p, q, token, u, relaxation=None):
    """Verify one sampled proposal a row with explicit uniforms."""
    rows = len(p)
    zeros = torch.zeros(rows, dtype=torch.int64)
    draft = Draft(
        tokens=token[:, None],
        kind=torch.full((rows, 1), Label.ROW, dtype=torch.int8),
        prob=q.gather(1, token[:, None]),
        row=zeros[:, None],
        logits=q.log()[None, :, None],
    )
    where = {"seeds": zeros, "positions": zeros[:, None], "iteration": zeros, "num_rows": zeros + 1}
    where["noise"] = VerifyNoise(u[:, None], u[:, None], ((u * 7919) % 1.0)[:, None])
    if relaxed:
        return verify_relaxed(p.log()[None, :, None], draft, relaxation, **where)
    return verify_window(p.log()[None, :, None], draft, carry="none", **where)


@pytest.mark.parametrize("residual", ["paper", "optimal"])
@pytest.mark.parametrize("nothing", [{"delta": 0.0}, {"lam": 1.0}])
def test_without_slack_the_rule_is_exact(residual, nothing):
    p, q, token = random_laws(2000, 30)
    u = torch.rand(2000, generator=torch.Generator().manual_seed(1))
    exact = chain(False, p, q, token, u)
    relaxed = chain(True, p, q, token, u, Relaxation(table(30, 8), 8, residual=residual, **nothing))
    assert torch.equal(exact.tokens, relaxed.tokens)
    assert torch.equal(exact.accepted, relaxed.accepted)


@pytest.mark.parametrize(
    "limits", [[{"delta": d} for d in (0.0, 0.05, 0.2, 0.6)], [{"lam": v} for v in (1.0, 2.0, 9.0)]]
)
def test_acceptance_grows_with_the_limit(limits):
    p, q, token = random_laws(2000, 30)
    u = torch.rand(2000, generator=torch.Generator().manual_seed(2))
    before = torch.zeros(2000, 1, dtype=torch.bool)
    for limit in limits:
        accepted = chain(True, p, q, token, u, Relaxation(table(30, 8), 8, **limit)).accepted
        assert (accepted | ~before).all()
        assert accepted.sum() > before.sum()
        before = accepted


def test_optimal_residual_has_the_smallest_distance():
    """TV(out, p) = sum [q a - p]+ for the optimal residual (one sampled proposal), integrated over all proposals."""
    p, q, _ = random_laws(1, 12, seed=3)
    neighbors, every = table(12, 5), torch.arange(12)
    distance = {}
    for residual in RESIDUALS:
        relaxation = Relaxation(neighbors, 4, delta=0.2, residual=residual)
        wide_p, wide_q = p.expand(12, -1), q.expand(12, -1)
        added, count = neighbor_mass(wide_p, every, relaxation)
        passes = ((p[0] + added) / q[0]).clamp(max=1.0)
        left = relaxed_residual(wide_p, wide_q, every, count, torch.zeros(12, dtype=torch.bool), relaxation)
        total = left.sum(-1, keepdim=True)
        left = torch.where(total > 0, left / total.clamp(min=1e-12), wide_p)
        out = q[0] * passes + ((q[0] * (1 - passes))[:, None] * left).sum(0)
        distance[residual] = float((out - p[0]).abs().sum() / 2)
        floor = float((q[0] * passes - p[0]).clamp(min=0).sum())
    assert distance["optimal"] == pytest.approx(floor, abs=1e-6)
    assert all(value >= floor - 1e-6 for value in distance.values())
    assert distance["upstream"] > floor + 1e-3  # so the comparison can fail


@pytest.mark.parametrize("carry", ["none", "independent"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_kernel_equals_twin(on_kernel, poisoned, carry, residual):
    settings = {"guidance_scale": 2.0, "top_k": 30}
    logits, draft, where = scene(seed=RESIDUALS.index(residual) + 10, batch=3, window=4, **settings)
    limit = {"lam": 4.0} if carry == "none" else {"delta": 0.2}
    relaxation = Relaxation(table(63, 9).to(torch.int16), 7, residual=residual, **limit)
    forced = torch.full_like(draft.tokens, -1)
    forced[0, 2] = 9
    arguments = (logits, draft, relaxation)
    settings |= {"carry": carry, "forced": forced}
    twin = verify_relaxed(*arguments, **where, **settings)
    assert_same(on_kernel(verify_relaxed, *arguments, **where, **settings), twin, where["num_rows"], settings)


def test_kernel_equals_twin_when_greedy_and_with_explicit_noise(on_kernel, poisoned):
    logits, draft, where = scene(seed=20, temperature=0.0)
    relaxation = Relaxation(table(63, 8), 7, delta=0.5)
    for carry in ("none", "independent"):
        settings = {"carry": carry, "temperature": 0.0}
        twin = verify_relaxed(logits, draft, relaxation, **where, **settings)
        kernel = on_kernel(verify_relaxed, logits, draft, relaxation, **where, **settings)
        assert_same(kernel, twin, where["num_rows"], settings)
        plain = verify_window(logits, draft, **where, **settings)
        assert twin.num_committed.sum() > plain.num_committed.sum()
    batch, window, num_codes = logits.shape[1:]
    noise = VerifyNoise(torch.rand(batch, window), *torch.randn(2, batch, window, num_codes).unbind())
    twin = verify_relaxed(logits, draft, relaxation, noise=noise, **where)
    assert_same(
        on_kernel(verify_relaxed, logits, draft, relaxation, noise=noise, **where), twin, where["num_rows"], {}
    )


def test_greedy_accepts_what_the_mass_of_its_neighbours_makes_the_argmax():
    p = torch.tensor([0.35, 0.3, 0.1, 0.25])
    neighbors = torch.tensor([[1, 2, 3], [2, 0, 3], [1, 0, 3], [0, 1, 2]])
    zeros = torch.zeros(4, dtype=torch.int64)
    every = torch.arange(4)[:, None]
    draft = Draft(every, torch.full((4, 1), Label.POINT, dtype=torch.int8), torch.ones(4, 1), every * 0)
    where = {"seeds": zeros, "positions": zeros[:, None], "iteration": zeros, "num_rows": zeros + 1}
    verdict = verify_relaxed(
        p.log().expand(1, 4, 1, 4), draft, Relaxation(neighbors, 1, delta=0.2), temperature=0.0, **where
    )
    # own + nearest within 0.2: 0.35; 0.3 + 0.1 > 0.35; 0.1 (0.3 is too much); 0.25
    assert verdict.accepted[:, 0].tolist() == [True, True, False, False]
    assert verdict.tokens[:, 0].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"delta": None}, "delta or lam"),
        ({"lam": 2.0}, "delta or lam"),
        ({"residual": "ours"}, "got 'ours'"),
        ({"k": 9}, "neighbors"),
        ({"k": 0}, "k >= 1"),
        ({"residual": "upstream", "k": 8}, "neighbors"),
    ],
)
def test_bad_relaxations_are_named(changes, words):
    logits, draft, where = scene()
    relaxation = Relaxation(**{"neighbors": table(63, 8), "k": 8, "delta": 0.1} | changes)
    with pytest.raises(ValueError, match=words):
        verify_relaxed(logits, draft, relaxation, **where)
    with pytest.raises(ValueError, match="carry"):
        verify_relaxed(logits, draft, Relaxation(table(63, 8), 8, delta=0.1), carry="maximal", **where)


def test_operator_survives_compilation():
    logits, draft, where = scene(seed=7)
    relaxation = Relaxation(table(63, 8), 8, delta=0.1)

    def step(logits):
        return verify_relaxed(logits * 1.0, draft, relaxation, **where).tokens

    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(logits), step(logits))
