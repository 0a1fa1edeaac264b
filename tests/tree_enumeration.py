"""Exact distributions of what tree verification emits: every draft and every outcome of every test, without sampling.

Verification itself makes all decisions. It is run with uniforms that reject, tells the chance of each test it made, and is run
again with one more test accepted, until all outcomes are covered.

Letters: V codes, n nodes, M weighted drafts. A distribution is a dictionary from sequences to probabilities.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import permutations, product

import numpy as np
import torch

from vargen.kernels.tree.reference import verify_tree_reference
from vargen.samplers.acceptance.k_seq import visit_k_seq
from vargen.samplers.drafters.tree import Tree, TreeDraft

REJECT, ACCEPT = 1.0 - 2.0**-53, 0.0


def sibling_draws(q, count, proposal):
    """All (codes, probability) of ``count`` siblings drawn from ``q``; fewer codes where the support is smaller."""
    if proposal == "top":
        return [(tuple(np.argsort(-q, kind="stable")[:count]), 1.0)]
    support = np.flatnonzero(q)
    if proposal == "with_replacement":
        return [(codes, float(np.prod(q[list(codes)]))) for codes in product(support, repeat=count)]
    draws = []
    for codes in permutations(support, min(count, len(support))):
        left, weight = 1.0, 1.0
        for code in codes:
            weight *= q[code] / left
            left -= q[code]
        draws.append((codes, float(weight)))
    return draws


def all_drafts(tree, draft_law, proposal):
    """Every assignment of codes to the nodes of a shared tree: list of (codes by node, probability)."""
    children = tree.children[0].tolist()
    finished, growing = [], [({}, 1.0, [0])]
    while growing:
        codes, weight, todo = growing.pop()
        if not todo:
            finished.append((codes, weight))
            continue
        node, rest = todo[0], todo[1:]
        kids = [c for c in children[node] if c >= 0]
        if not kids or (node and node not in codes):
            growing.append((codes, weight, rest))
            continue
        for drawn, chance in sibling_draws(draft_law(prefix_of(tree, codes, node)), len(kids), proposal):
            more = {**codes, **{kid: int(code) for kid, code in zip(kids, drawn, strict=False)}}
            growing.append((more, weight * chance, rest + kids))
    return finished


def prefix_of(tree, codes, node):
    path = tree.mask[0, node].nonzero().flatten().tolist()
    return tuple(codes[i] for i in path if i)


def emitted(target_law, draft_law, tree, proposal, length, *, relaxation=None, k_seq=False, forced=None):
    """Distribution of the first ``length`` codes: those that one tree emits, continued with the target's own distribution."""
    drafts = all_drafts(tree, draft_law, proposal)
    n, size = tree.num_nodes, len(target_law(()))
    inner = [node for level in tree.inner() for node in level]
    row_of = torch.full((n,), -1)
    row_of[inner] = torch.arange(len(inner))
    tokens = torch.full((len(drafts), n), -1)
    laws = torch.zeros(len(drafts), len(inner), size, dtype=torch.float64)
    targets = torch.zeros(len(drafts), n, size, dtype=torch.float64)
    for m, (codes, _) in enumerate(drafts):
        for node, code in codes.items():
            tokens[m, node] = code
        for node in range(n):
            if node == 0 or node in codes:
                prefix = prefix_of(tree, codes, node)
                targets[m, node] = torch.from_numpy(np.asarray(target_law(prefix)))
                if node in inner:
                    laws[m, row_of[node]] = torch.from_numpy(np.asarray(draft_law(prefix)))
    draft = TreeDraft(
        tree, tokens, None if proposal == "top" else laws, row_of, replacement=proposal == "with_replacement"
    )
    weights = torch.tensor([weight for _, weight in drafts], dtype=torch.float64)
    joint = defaultdict(float)
    for found, weight in all_outcomes(draft, targets, weights, relaxation, k_seq, forced):
        for i in range(len(weight)):
            done = tuple(found.tokens[i, : int(found.num_accepted[i])].tolist())
            if len(done) >= length:
                joint[done[:length]] += float(weight[i])
                continue
            for code, p in enumerate(found.distribution[i].tolist()):
                if p > 0:
                    continue_with(joint, (*done, code), float(weight[i]) * p, target_law, length)
    return dict(joint)


def all_outcomes(draft, targets, weights, relaxation, k_seq=False, forced=None):
    """Yield (paths, weights) that together cover every outcome of every test."""
    n = draft.tree.num_nodes
    rows = torch.arange(len(weights))
    decided = torch.zeros(len(weights), dtype=torch.int64)
    uniforms = torch.full((len(weights), n), REJECT, dtype=torch.float64)
    while len(rows):
        part = TreeDraft(
            draft.tree,
            draft.tokens[rows],
            None if draft.distributions is None else draft.distributions[rows],
            draft.row_of,
            draft.replacement,
        )
        here = targets[rows]
        found = verify_tree_reference(
            lambda images, nodes, here=here: here[images, nodes],
            part.proposals,
            uniforms,
            relaxation=relaxation,
            visit=visit_k_seq if k_seq else None,
            forced=None if forced is None else forced.expand(len(rows), -1),
            record=True,
        )
        chances = found.chances
        column = torch.arange(n)
        open_test = (column >= decided[:, None]) & (column < found.num_uniforms[:, None])
        lost = torch.where(open_test & (chances < 1.0), 1.0 - chances, 1.0)
        before = torch.cat([torch.ones(len(rows), 1, dtype=torch.float64), lost.cumprod(1)[:, :-1]], 1)
        yield found, weights * lost.prod(1)
        parent, test = (open_test & (chances > 0.0) & (chances < 1.0)).nonzero(as_tuple=True)
        weights = weights[parent] * before[parent, test] * chances[parent, test]
        uniforms = uniforms[parent].clone()
        uniforms[torch.arange(len(parent)), test] = ACCEPT
        rows, decided = rows[parent], test + 1


def continue_with(joint, prefix, weight, target_law, length):
    if len(prefix) >= length:
        joint[prefix[:length]] += weight
        return
    for code, p in enumerate(target_law(prefix)):
        if p > 0:
            continue_with(joint, (*prefix, code), weight * p, target_law, length)


def distributions_with_zeros(size, length, seed, zeros=0.0, alpha=0.7):
    """Random distributions of every prefix, some entries removed; drafts and targets may then differ in support."""
    rng = np.random.default_rng(seed)
    table = {}
    for depth in range(length):
        for prefix in product(range(size), repeat=depth):
            p = rng.dirichlet([alpha] * size)
            p[rng.random(size) < zeros] = 0.0
            table[prefix] = p / p.sum() if p.sum() > 0 else np.eye(size)[rng.integers(size)]
    return table.__getitem__


def shape(*words):
    """A tree from paths of digits."""
    return Tree.from_paths([[int(digit) for digit in word] for word in words])
