"""Trees of proposals: published shapes and buffers, and distributions of what they emit by enumeration."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.enumeration import sequence_law, total_variation
from tests.tree_enumeration import distributions_with_zeros, emitted, shape
from vargen.kernels.tree import reference
from vargen.kernels.tree.reference import target_of, verify_tree_reference
from vargen.samplers.acceptance.greedy import verify_greedy
from vargen.samplers.acceptance.k_seq import k_seq_factor
from vargen.samplers.acceptance.typical import verify_typical
from vargen.samplers.drafters.tree import NAMED_TREES, Tree, TreeDraft

EXACT = 1e-12
PUBLISHED = [*NAMED_TREES, "chain"]


def published(golden, name):
    buffers = golden("lantern/tree_buffers", f"{name}.")
    paths = [[digit for digit in path if digit >= 0] for path in buffers["choices"].tolist()]
    return Tree.from_paths(paths), buffers


# ------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_trees_are_the_published_ones(golden, name):
    tree, _ = published(golden, name)
    named = Tree.chain(5) if name == "chain" else Tree.named(name)
    assert torch.equal(named.parents, tree.parents)


@pytest.mark.parametrize("name", PUBLISHED)
def test_verification_buffers_are_the_released_ones(golden, name):
    tree, buffers = published(golden, name)
    rows = tree.rows()
    assert torch.equal(tree.mask[0], buffers["verify.tree_attn_mask"][0, 0].bool())
    assert torch.equal(tree.depth[0], buffers["verify.tree_position_ids"])
    assert torch.equal(rows, buffers["verify.retrieve_indices"])
    inner = [node for level in tree.inner() for node in level]
    children = tree.children[0].tolist()
    rank = {child: i for kids in children for i, child in enumerate(kids) if child >= 0}
    flat = [0] + [1 + 10 * inner.index(int(tree.parents[0, i])) + rank[i] for i in range(1, tree.num_nodes)]
    assert flat == buffers["verify.tree_indices"].tolist()
    for row, which, earlier in zip(rows, buffers["verify.p_indices"], buffers["verify.b_indices"], strict=True):
        for depth in range(1, int((row >= 0).sum())):
            node, parent = int(row[depth]), int(row[depth - 1])
            assert int(which[depth]) == tree.inner()[depth - 1].index(parent)
            siblings = [kid for kid in children[parent] if 0 <= kid < node]
            assert earlier[depth][: len(siblings)].tolist() == siblings
            assert int(earlier[depth].max()) == max(siblings, default=-1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_drafting_reads_the_nodes_that_the_released_buffers_read(golden, name):
    tree, buffers = published(golden, name)
    children = tree.children[0].tolist()
    levels = tree.inner()
    assert len(levels) == tree.max_depth
    for step, nodes in enumerate(levels[1:]):
        above = levels[step]
        place = [10 * above.index(int(tree.parents[0, n])) + children[int(tree.parents[0, n])].index(n) for n in nodes]
        assert place == buffers[f"draft.{step}.tree_indices"].tolist()
        seen = buffers[f"draft.{step}.attn_mask"][0, 0].bool()
        read = [node for level in levels[1 : step + 2] for node in level]
        assert torch.equal(seen, tree.mask[0][nodes][:, read])


def test_a_tree_of_parents_is_the_tree_of_its_paths():
    tree = Tree.named("naive_extend_57")
    again = Tree.from_parents(tree.parents.expand(3, -1), 7, 6)
    assert torch.equal(again.mask, tree.mask.expand(3, -1, -1))
    assert torch.equal(again.depth, tree.depth.expand(3, -1))
    assert torch.equal(again.children[:, :, :5], tree.children.expand(3, -1, -1))
    assert bool((again.children[:, :, 5] == -1).all())


def test_the_first_nodes_of_a_tree_form_a_tree():
    tree = Tree.named("mc_sim_7b_63")
    for depth, width in [(0, 1), (1, 5), (2, 13), (3, 21), (4, 24), (5, 26)]:
        part = tree.narrow(width)
        assert part.max_depth == depth
        assert int(part.children.max()) == (width - 1 if depth else -1)
        assert torch.equal(part.mask, Tree.from_parents(part.parents, depth, 4).mask)


@pytest.mark.parametrize("paths", [[[0], [1, 0]], [[0], [0]]])
def test_paths_without_their_prefix_or_twice_are_refused(paths):
    with pytest.raises(ValueError, match="every prefix of a path, once"):
        Tree.from_paths(paths)


# --------------------------------------------------------------------------------------------------------- exact rules

SHAPES = {
    "one": shape("0"),
    "pair": shape("0", "1"),
    "four": shape("0", "1", "2", "3"),
    "chain": shape("0", "00", "000"),
    "bushy": shape("0", "1", "00", "01", "10"),
}
RULES = {
    "top": ("top", False),
    "independent": ("with_replacement", False),
    "without replacement": ("without_replacement", False),
    "k-seq": ("with_replacement", True),
}


@pytest.mark.parametrize("zeros", [0.0, 0.35], ids=["full support", "zeros"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SHAPES)
def test_trees_are_exact(name, rule, zeros):
    """Distributions with zeros: drafts outside the target's support, targets outside the draft's, fewer codes than siblings."""
    tree, (proposal, k_seq) = SHAPES[name], RULES[rule]
    size, length = (4 if name in ("one", "pair", "four") else 3), tree.max_depth + 1
    target, draft = (
        distributions_with_zeros(size, length + 1, 11, zeros),
        distributions_with_zeros(size, length + 1, 12, zeros),
    )
    law = emitted(target, draft, tree, proposal, length, k_seq=k_seq)
    assert total_variation(law, sequence_law(target, length)) < EXACT


def test_forced_codes_are_emitted_and_leave_the_rest_exact():
    target, draft = distributions_with_zeros(3, 4, 1), distributions_with_zeros(3, 4, 2)
    forced = torch.tensor([[-1, 2, -1]])

    def conditioned(prefix):
        return [0.0, 0.0, 1.0] if len(prefix) == 1 else target(prefix)

    # the drafter knows the forced code and puts it first
    aware = lambda prefix: np.array([0.0, 0.0, 1.0]) if len(prefix) == 1 else draft(prefix)  # noqa: E731
    for drafter in (draft, aware):
        law = emitted(conditioned, drafter, shape("0", "1", "00", "01"), "without_replacement", 3, forced=forced)
        assert total_variation(law, sequence_law(conditioned, 3)) < EXACT


def test_k_seq_divides_by_the_root_and_reaches_its_acceptance():
    """Acceptance of SpecTr is at least 1 - (1 - 1/K)^K of what any rule can reach: sum of min(p, 1 - (1 - q)^K)."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 10):
        p, q = (torch.from_numpy(rng.dirichlet([0.5] * 12, size=20)) for _ in range(2))
        number = torch.full((20,), count)
        rho = k_seq_factor(p, q, number)
        beta = torch.minimum(q, p / rho[:, None]).sum(-1)
        accepted = 1 - (1 - beta) ** count
        torch.testing.assert_close(accepted, rho * beta, rtol=0, atol=1e-9)
        assert bool((accepted <= rho * beta + 1e-12).all()), "the wrong side of the root"
        best = torch.minimum(p, 1 - (1 - q) ** count).sum(-1)
        assert bool((accepted >= (1 - (1 - 1 / count) ** count) * best - 1e-9).all())


MUTANTS = {
    "the distribution stays after a rejection": lambda p, q, token, found, relaxation: p,
    "only the code is removed": lambda p, q, token, found, relaxation: p.scatter(1, token[:, None], 0.0),
    "the difference is not cut at zero": lambda p, q, token, found, relaxation: (p - q).abs(),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_enumeration_catches_wrong_residuals(monkeypatch, name):
    monkeypatch.setattr(reference, "after_rejection", MUTANTS[name])
    target, draft = distributions_with_zeros(4, 3, 11), distributions_with_zeros(4, 3, 12)
    law = emitted(target, draft, SHAPES["pair"], "without_replacement", 2)
    assert total_variation(law, sequence_law(target, 2)) > 1e-2


def distance_of_mislabelled(monkeypatch, drawn, replacement):
    make = TreeDraft.__init__

    def mislabelled(self, *args, **kwargs):
        make(self, *args, **kwargs)
        object.__setattr__(self, "replacement", replacement)

    monkeypatch.setattr(TreeDraft, "__init__", mislabelled)
    target, draft = distributions_with_zeros(4, 3, 5), distributions_with_zeros(4, 3, 6)
    return total_variation(emitted(target, draft, SHAPES["four"], drawn, 2), sequence_law(target, 2))


def test_enumeration_catches_the_wrong_label_of_siblings(monkeypatch):
    assert distance_of_mislabelled(monkeypatch, "without_replacement", replacement=True) > 1e-2


def test_independent_draws_without_their_repeats_are_draws_without_replacement(monkeypatch):
    assert distance_of_mislabelled(monkeypatch, "with_replacement", replacement=False) < EXACT


# --------------------------------------------------------------------------------------------------------- verification


def random_draft(batch, tree, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(size, (batch, tree.num_nodes), generator=generator)
    return TreeDraft(tree, tokens), torch.randn(1, batch, tree.num_nodes, size, generator=generator)


def test_the_path_is_reported():
    tree = Tree.named("mc_sim_7b_63")
    draft, logits = random_draft(64, tree, 5)
    found = verify_tree_reference(
        target_of(logits), draft.proposals, torch.rand(64, tree.num_nodes, generator=torch.Generator().manual_seed(1))
    )
    assert len(set(found.num_accepted.tolist())) > 2
    for i, count in enumerate(found.num_accepted.tolist()):
        path = found.path[i].tolist()
        assert path[0] == 0
        for above, node in pairwise(path[: count + 1]):
            assert int(tree.parents[0, node]) == above
        assert found.tokens[i, :count].tolist() == draft.tokens[i, path[1 : count + 1]].tolist()
        assert bool((found.tokens[i, count:] == -1).all())


def test_an_image_does_not_depend_on_its_batch():
    tree = Tree.named("mc_sim_7b_63")
    draft, logits = random_draft(9, tree, 5)
    uniforms = torch.rand(9, tree.num_nodes, generator=torch.Generator().manual_seed(1))
    limit = torch.tensor([3, 9, 1, 0, 2, 9, 4, 5, 6])
    together = verify_tree_reference(target_of(logits), draft.proposals, uniforms, limit=limit)
    for i in range(9):
        one = torch.tensor([i])
        alone = verify_tree_reference(
            target_of(logits[:, one]), draft.select(one).proposals, uniforms[one], limit=limit[one]
        )
        for name in ("path", "tokens", "num_accepted", "num_uniforms"):
            assert torch.equal(getattr(alone, name), getattr(together, name)[one])
        if limit[i]:
            assert torch.equal(alone.distribution, together.distribution[one])
        assert int(together.num_accepted[i]) <= max(int(limit[i]) - 1, 0)


def test_a_code_is_tested_once_among_deterministic_siblings():
    draft = TreeDraft(shape("0", "1", "2"), torch.tensor([[0, 3, 3, 1]]))
    found = verify_tree_reference(target_of(torch.zeros(1, 1, 4, 8)), draft.proposals, torch.full((1, 4), 0.99))
    assert int(found.num_uniforms) == 2
    assert found.distribution[0, 3] == 0
    assert found.distribution[0, 1] == 0


def test_missing_proposals_are_passed_by():
    draft = TreeDraft(shape("0", "1", "00"), torch.tensor([[0, -1, -1, -1]]))
    found = verify_tree_reference(target_of(torch.zeros(1, 1, 4, 8)), draft.proposals, torch.zeros(1, 4))
    assert int(found.num_uniforms) == int(found.num_accepted) == 0
    torch.testing.assert_close(found.distribution, torch.full((1, 8), 1 / 8))


def test_impossible_codes_are_never_accepted():
    logits = torch.zeros(1, 1, 2, 4)
    logits[..., 2] = float("-inf")
    found = verify_tree_reference(
        target_of(logits), TreeDraft(shape("0"), torch.tensor([[0, 2]])).proposals, torch.zeros(1, 2)
    )
    assert int(found.num_accepted) == 0
    assert found.distribution[0, 2] == 0


def test_a_distribution_without_a_rest_is_kept():
    """p <= q everywhere although rejected happens by rounding only; the law before the test is used again."""
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25]])
    draft = TreeDraft(shape("0"), torch.tensor([[0, 1]]), (2 * p)[None], torch.tensor([0, -1]))
    found = verify_tree_reference(lambda images, nodes: p, draft.proposals, torch.tensor([[0.9, 0.9]]))
    assert int(found.num_accepted) == 0
    torch.testing.assert_close(found.distribution, p)


# ------------------------------------------------------------------------------------------------------- longest path


def test_greedy_keeps_what_the_target_would_choose():
    tree = Tree.named("naive_extend_57")
    draft, logits = random_draft(200, tree, 3)
    found = verify_greedy(logits[0], draft)
    best = logits[0].argmax(-1)
    for i in range(200):
        expected, node = [], 0
        while True:
            kids = [kid for kid in tree.children[0, node].tolist() if kid >= 0]
            hits = [kid for kid in kids if int(draft.tokens[i, kid]) == int(best[i, node])]
            expected.append(int(best[i, node]))
            if not hits:
                break
            # of equal proposals any may be followed: the longest path counts
            node = max(hits, key=lambda kid: depth_of_agreement(tree, draft.tokens[i], best[i], kid))
        count = int(found.num_accepted[i])
        assert found.tokens[i, : count + 1].tolist() == expected


def depth_of_agreement(tree, tokens, best, node):
    kids = [kid for kid in tree.children[0, node].tolist() if kid >= 0 and int(tokens[kid]) == int(best[node])]
    return 1 + max((depth_of_agreement(tree, tokens, best, kid) for kid in kids), default=0)


def test_greedy_stops_at_the_last_slot():
    tree = Tree.chain(4)
    logits = torch.zeros(2, 5, 3)
    logits[..., 1] = 1.0
    draft = TreeDraft(tree, torch.ones(2, 5, dtype=torch.int64))
    found = verify_greedy(logits, draft, limit=torch.tensor([3, 9]))
    assert found.num_accepted.tolist() == [2, 4]
    assert found.tokens.tolist() == [[1, 1, 1, -1, -1], [1, 1, 1, 1, 1]]


def test_typical_acceptance_cuts_the_distribution_behind_the_path():
    logits = torch.tensor([[[3.0, 2.9, -4.0, -4.0], [3.0, 2.9, -4.0, -4.0]]])
    found = verify_typical(logits, TreeDraft(shape("0"), torch.tensor([[0, 1]])))
    assert int(found.num_accepted) == 1
    assert bool((found.distribution[0, :2] > 0).all())
    assert bool((found.distribution[0, 2:] == 0).all())
    refused = verify_typical(logits, TreeDraft(shape("0"), torch.tensor([[0, 3]])))
    assert int(refused.num_accepted) == 0
