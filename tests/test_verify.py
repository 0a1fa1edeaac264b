"""Acceptance, residuals, coupling and groups against the released code, and the distribution of the outcome by integration."""

import pytest
import torch

from vargen.kernels.acceptance import residual
from vargen.kernels.verify.verify import Draft, GroupSpec, Label, VerifyNoise, verify_window
from vargen.kernels.warp import warp_logits

CASES = ["close", "mid", "far", "onehot", "same", "forced", "disjoint"]


def slots(values):
    """Golden slot i is target position i - 1; the last position has no draft."""
    return torch.cat([values[:, 1:], values[:, :1]], 1)


def golden_draft(g):
    batch, window = g["draft_tokens"].shape
    tokens = slots(g["draft_tokens"]).index_fill(1, torch.tensor([window - 1]), -1)
    return Draft(
        tokens=tokens,
        kind=torch.full((batch, window), Label.ROW, dtype=torch.int8),
        prob=slots(g["draft_probs"]).gather(-1, tokens.clamp(min=0)[..., None])[..., 0],
        row=torch.arange(1, window + 1).expand(batch, -1) % window,
        logits=g["draft_probs"].log()[None],
    )


def verify_golden(g, carry, *, group=None, residual_uniform=None, draft=None):
    batch, window = g["draft_tokens"].shape
    uniform = g["residual_uniform"][:, None].expand(-1, window) if residual_uniform is None else residual_uniform
    zeros = torch.zeros(batch, dtype=torch.int64)
    return verify_window(
        g["target_probs"].log()[None],
        golden_draft(g) if draft is None else draft,
        carry=carry,
        seeds=zeros,
        positions=torch.arange(window).expand(batch, -1),
        iteration=zeros,
        num_rows=torch.full((batch,), window),
        group=group,
        noise=VerifyNoise(slots(g["accept_uniform"]), torch.full((batch, window), 0.5), uniform),
    )


def assert_committed(outcome, g):
    assert torch.equal(outcome.num_committed, g["first_reject"])
    for image, count in enumerate(g["first_reject"].tolist()):
        drawn = count if count < g["out_tokens"].shape[1] else count - 1  # none rejected: the last is a free draw
        assert outcome.tokens[image, :drawn].tolist() == g["out_tokens"][image, :drawn].tolist()


@pytest.mark.parametrize("carry", ["independent", "maximal"])
@pytest.mark.parametrize("case", CASES)
def test_accepts_and_replaces_like_the_released_code(golden, case, carry):
    g = golden("sjd/accept", f"acc_{case}.")
    assert_committed(verify_golden(g, carry), g)


@pytest.mark.parametrize("case", CASES)
def test_residual_distribution_of_the_released_code(golden, case):
    g = golden("sjd/accept", f"acc_{case}.")
    window = g["draft_tokens"].shape[1]
    for image, reject in enumerate(g["first_reject"].tolist()):
        if reject < window:
            left = residual.fn(g["target_probs"][image, reject - 1], g["draft_probs"][image, reject])
            assert torch.allclose(left / left.sum(), g["residual_probs"][image], atol=1e-6)


def test_one_hot_labels_are_point_labels(golden):
    g = golden("sjd/accept", "acc_onehot.")
    row = golden_draft(g)
    point = Draft(row.tokens, torch.full_like(row.kind, Label.POINT), torch.ones_like(row.prob), row.row)
    for carry in ("independent", "maximal"):
        a, b = verify_golden(g, carry), verify_golden(g, carry, draft=point)
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.accepted, b.accepted)


def test_guidance_top_k_and_draws(golden):
    g = golden("sjd/accept", "fresh.")
    logits = torch.stack(g["logits"].chunk(2))
    scale, k = float(g["guidance_scale"]), int(g["top_k"])
    distribution = warp_logits(logits, guidance_scale=scale, top_k=k).softmax(-1)
    assert torch.allclose(distribution, g["probs"], atol=1e-6)
    batch, window = g["tokens"].shape
    zeros = torch.zeros(batch, dtype=torch.int64)
    outcome = verify_window(
        logits,
        Draft.none(batch, window),
        carry="independent",
        seeds=zeros,
        positions=torch.arange(window).expand(batch, -1),
        iteration=zeros,
        num_rows=torch.full((batch,), window),
        guidance_scale=scale,
        top_k=k,
        noise=VerifyNoise(torch.zeros(batch, window), g["uniform"], g["uniform"]),
    )
    assert torch.equal(outcome.tokens, g["tokens"])
    assert torch.allclose(outcome.prob, g["probs"].gather(-1, g["tokens"][..., None])[..., 0], atol=1e-6)


def test_gumbel_draws(golden):
    g = golden("sjd/accept", "gumbel.")
    noise = -torch.log(-torch.log(g["uniform"] + 1e-9) + 1e-9)
    zeros = torch.zeros(2, dtype=torch.int64)
    outcome = verify_window(
        g["probs"].log()[None],
        Draft.none(2, 8),
        carry="gumbel",
        seeds=zeros,
        positions=torch.arange(8).expand(2, -1),
        iteration=zeros,
        num_rows=torch.full((2,), 8),
        noise=VerifyNoise(fresh=noise),
    )
    assert torch.equal(outcome.tokens, g["tokens"])


def test_plain_jacobi_stops_at_the_first_mismatch(golden):
    g = golden("sjd/accept", "match.")
    batch, window = g["window_tokens"].shape
    tokens = slots(g["window_tokens"]).index_fill(1, torch.tensor([window - 1]), -1)
    sure = torch.full((batch, window, int(g["fresh_tokens"].max()) + 9), -30.0)
    logits = sure.scatter(-1, g["fresh_tokens"][..., None], 30.0)[None]
    zeros = torch.zeros(batch, dtype=torch.int64)
    for temperature in (0.0, 1.0):
        outcome = verify_window(
            logits,
            Draft(tokens, torch.full_like(tokens, Label.POINT).to(torch.int8), torch.ones(tokens.shape), tokens * 0),
            carry="gumbel",
            seeds=zeros,
            positions=torch.arange(window).expand(batch, -1),
            iteration=zeros,
            num_rows=torch.full((batch,), window),
            temperature=temperature,
        )
        assert torch.equal(outcome.tokens, g["fresh_tokens"])
        assert torch.equal(outcome.num_committed, g["first_mismatch"])


@pytest.mark.parametrize("variant", ["mc", "mc_lumina"])
def test_maximal_coupling_over_the_whole_window(golden, variant):
    g = golden("sjd/accept", "acc_mid.") | golden("sjd/accept", f"{variant}.")
    if variant == "mc":  # uniforms indexed by position there
        pad = torch.zeros_like(g["accept_uniform"][:, :1])
        g["accept_uniform"] = torch.cat([pad, g["accept_uniform"]], 1)
        g["residual_uniform"] = torch.cat([pad, g["residual_uniform"]], 1)
    outcome = verify_golden(g, "maximal", residual_uniform=slots(g["residual_uniform"]))
    assert torch.equal(outcome.num_committed, g["first_reject"])
    assert torch.equal(outcome.tokens[:, :-1], g["out_tokens"][:, :-1])  # the last row is a free draw


@pytest.mark.parametrize("case", ["flat", "peaky"])
def test_grouped_acceptance(golden, case):
    g, meta = golden("sjd/accept", f"gsd_{case}."), golden("sjd/accept", "gsd.")
    half, prob_threshold, distance_threshold = meta["meta"].tolist()
    centred = meta["sq_dist"].double()
    size = len(centred)
    centring = torch.eye(size, dtype=torch.float64) - 1 / size
    values, vectors = torch.linalg.eigh(-0.5 * centring @ centred @ centring)  # an embedding with these distances
    spec = GroupSpec(
        size=2 * int(half),
        prob_threshold=prob_threshold,
        distance_threshold=distance_threshold,
        embeddings=(vectors * values.clamp(min=0).sqrt()).float(),
    )
    assert_committed(verify_golden(g, "independent", group=spec), g)
    if case == "flat":  # there the group decides; the ratio itself is checked below for both
        assert not torch.equal(verify_golden(g, "independent").num_committed, g["first_reject"])
    for margin in (1e-5, -1e-5):  # the ratio itself: accepted just below it, rejected just above
        tested = slots(g["accept_prob"])
        outcome = verify_golden(g | {"accept_uniform": g["accept_prob"] * (1 - margin)}, "maximal", group=spec)
        sure = tested >= 1 + 1e-4
        accepted = outcome.accepted[:, :-1]
        wanted = (torch.full_like(tested, margin > 0).bool() & (tested > 0)) | sure
        decided = ((tested < 1 - 1e-4) | sure)[:, :-1]
        assert torch.equal(accepted[decided], wanted[:, :-1][decided])


@pytest.mark.parametrize(("run", "carry"), [("sjd", "independent"), ("mc", "maximal")])
def test_decoding_trace_of_the_released_loop(golden, run, carry):
    meta, g = golden("sjd/trace"), golden("sjd/trace", f"{run}.")
    num_codes, _, length, top_k, _ = meta["meta"].tolist()
    table = meta["table"].float()
    zero = torch.zeros(1, dtype=torch.int64)
    codes, draft = [], Draft.none(1, 1)
    for i, window in enumerate(g["window_len"].tolist()):
        n = len(codes)
        column = torch.arange(window)
        fed = torch.tensor([codes[-1] if n else num_codes, *draft.tokens[0, : window - 1].tolist()])
        before = torch.tensor([codes[-2] if n > 1 else num_codes, *fed[:-1].tolist()])
        assert fed[1:].tolist() == g["window_tokens"][i, 1:window].tolist()
        logits = table[:, (n + column).clamp(max=table.shape[1] - 1), before, fed][:, None]
        by_position = [torch.cat([g[name][i, 1:window], torch.zeros(1)])[None] for name in ("u_acc", "u_res")]
        outcome = verify_window(
            logits,
            draft,
            carry=carry,
            seeds=zero,
            positions=(n + column)[None],
            iteration=zero,
            num_rows=torch.tensor([window]),
            guidance_scale=float(meta["guidance_scale"]),
            top_k=top_k,
            noise=VerifyNoise(by_position[0], g["u_fresh"][i, None, :window], by_position[1]),
        )
        count = int(outcome.num_committed)
        assert count == int(g["n_committed"][i])
        if window > 1:
            assert outcome.tokens[0].tolist() == g["row_tokens"][i, :window].tolist()
        codes += outcome.tokens[0, :count].tolist()
        if i + 1 < len(g["window_len"]):
            draft = traced_draft(g, i + 1, outcome, count, logits)
    assert len(codes) == length
    assert codes == g["sequence"].tolist()


def traced_draft(g, i, outcome, count, logits):
    """Carried rows with their labels, then the recorded random tokens with point labels, as in the released loop."""
    window, new = int(g["window_len"][i]), int(g["n_new_random"][i])
    carried = window - 1 - new
    tokens = [*outcome.tokens[0, count : count + carried].tolist(), *g["u_init"][i].tolist()[-new or 99 :], -1]
    draft = Draft(
        tokens=torch.tensor([tokens]),
        kind=torch.tensor([[Label.ROW] * carried + [Label.POINT] * new + [Label.NONE]], dtype=torch.int8),
        prob=torch.cat([outcome.prob[:, count : count + carried], torch.ones(1, new), torch.zeros(1, 1)], 1),
        row=torch.tensor([[*range(count, count + carried), *[0] * (new + 1)]]),
        logits=logits,
        stats=outcome.stats,
    )
    recorded = g["q_of_draft"][i, 1:window]
    seen = recorded >= 0
    assert torch.allclose(draft.prob[0, :-1][seen], recorded[seen], atol=1e-6)
    return draft
