"""Exact laws of window decoding on tiny models: no sampling, no error but rounding.

Three enumerators, from the rule to the code:

- ``rule_law`` follows the published rule in plain Python, with switches for the known ways to get it wrong;
- ``decoder_law`` drives the real decoder: every iteration is run once for each outcome of its random numbers, with
  noise placed just inside the interval of that outcome, so that the decision itself is the decoder's;
- ``shared_noise_law`` does the same for the equality rule, whose noise stays with a position for the whole run.

Letters: V codes, L positions, W window. A law is a dictionary from sequences to probabilities.
"""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise, product
from unittest import mock

import numpy as np
import torch

from vargen.kernels.verify.types import Draft, Label, VerifyNoise
from vargen.kernels.verify.verify import verify_window
from vargen.kernels.warp import warp_logits
from vargen.samplers.acceptance import base as rules
from vargen.samplers.window import decoder as window_module

EDGE = 0.02  # how deep inside its interval a random number is placed, as a share of the interval


def total_variation(one, other) -> float:
    return 0.5 * sum(abs(one.get(x, 0.0) - other.get(x, 0.0)) for x in set(one) | set(other))


def random_laws(codebook_size: int, length: int, seed: int = 0, alpha: float = 0.7):
    """Independent Dirichlet laws for every prefix: a function from a prefix to probabilities."""
    rng = np.random.default_rng(seed)
    prefixes = [x for n in range(length) for x in product(range(codebook_size), repeat=n)]
    return {x: rng.dirichlet([alpha] * codebook_size) for x in prefixes}.__getitem__


def sequence_law(law, length: int):
    """The joint law of autoregressive sampling."""
    joint = {(): 1.0}
    for _ in range(length):
        joint = {(*x, v): w * p for x, w in joint.items() for v, p in enumerate(law(x)) if p > 0}
    return joint


# ---------------------------------------------------------------------------------------------------------- the rule


def rule_law(law, codebook_size, length, window, *, carry, init="uniform", mistake=None, strength=None):
    """Law of the sequences that the rule produces, state by state.

    ``mistake``: "old_label" (accepted codes behind a rejection keep their label), "draw_from_p" (no residual),
    "temper_residual" (the residual is tempered again), "reuse" (a draft stays when p / q exceeds ``strength``).
    """
    start = ((), ())
    mass, final = {0: {start: 1.0}}, defaultdict(float)
    for n in range(length):
        for state, weight in mass.get(n, {}).items():
            for p, prefix, drafts in _rule_step(
                law, codebook_size, length, window, state, carry, init, mistake, strength
            ):
                if len(prefix) == length:
                    final[prefix] += weight * p
                else:
                    level = mass.setdefault(len(prefix), defaultdict(float))
                    level[prefix, drafts] += weight * p
    return dict(final)


def _label_law(law, label, token, codebook_size):
    if label == "point":
        return np.eye(codebook_size)[token]
    if label == "uniform":
        return np.full(codebook_size, 1 / codebook_size)
    return law(label)  # a context


def _rule_step(law, size, length, window, state, carry, init, mistake, strength):
    prefix, drafts = state
    rows = 1 if not prefix else min(window, length - len(prefix))  # the prefill has one row
    tokens = [token for token, _ in drafts]
    branches = [(1.0, [], None)]  # probability, (code, label) of the rows so far, first row that was not accepted
    for j in range(rows):
        context = prefix + tuple(tokens[:j])
        p = law(context)
        grown = []
        for weight, outcome, first in branches:
            for chance, code, label, accepted in _row(
                p, context, drafts[j : j + 1], law, size, carry, first, mistake, strength
            ):
                stop = j if first is None and not accepted else first
                grown.append((weight * chance, [*outcome, (code, label)], stop))
        branches = grown
    for weight, outcome, first in branches:
        count = min(rows if first is None else first + 1, rows)
        done = prefix + tuple(code for code, _ in outcome[:count])
        for chance, new in _tails(done, outcome[count:], size, length, window, init):
            yield weight * chance, done, new


def _row(p, context, draft, law, size, carry, first, mistake, strength):
    """Outcomes of one row: (probability, code, label, accepted)."""
    fresh = [(p[v], v, context, False) for v in range(size) if p[v] > 0]
    if not draft or (carry == "independent" and first is not None and mistake != "reuse"):
        return fresh
    token, label = draft[0]
    q = _label_law(law, label, token, size)
    if carry == "independent" and first is not None:  # confidence-based reuse
        return [(1.0, token, context, False)] if p[token] / max(q[token], 1e-30) > strength else fresh
    keep = min(1.0, p[token] / q[token]) if q[token] > 0 else 1.0
    kept = label if mistake == "old_label" and first is not None else context
    outcomes = [(keep, token, kept, True)] if keep > 0 else []
    if keep < 1:
        residual = np.clip(p - q, 0, None)
        if mistake == "draw_from_p":
            residual = p
        elif mistake == "temper_residual":
            residual = residual ** (1 / strength)
        if residual.sum() == 0:
            residual = p
        residual = residual / residual.sum()
        outcomes += [((1 - keep) * residual[v], v, context, False) for v in range(size) if residual[v] > 0]
    return outcomes


def _tails(done, carried, size, length, window, init):
    """Fill the window behind the carried codes; yield (probability, drafts)."""
    room = min(window - 1, length - len(done))
    drafts = list(carried[:room])
    missing = room - len(drafts)
    if missing == 0:
        yield 1.0, tuple(drafts)
    elif init == "repeat_left":
        last = drafts[-1][0] if drafts else done[-1]
        yield 1.0, tuple(drafts + [(last, "point")] * missing)
    else:
        label = {"uniform": "uniform", "point": "point"}[init]
        for new in product(range(size), repeat=missing):
            yield size**-missing, tuple(drafts + [(v, label) for v in new])


# ------------------------------------------------------------------------------------------------------- the decoder


def decoder_law(sampler, backbone, *, label=0, ragged=False):
    """Law of the codes that ``sampler`` draws from a tabular backbone, by running its decoder on every outcome.

    ``ragged=False`` lets states of equal length share a batch, so each runs as it would alone; ``ragged=True`` runs all
    states of an iteration together, whatever their lengths.
    """
    tree = _Tree(sampler, backbone, label)
    waiting, final = {}, defaultdict(float)
    tree.collect(tree.first(), waiting, final)
    while waiting:
        shortest = min(record["length"] for record, _ in waiting.values())
        batch = [key for key, (record, _) in waiting.items() if ragged or record["length"] == shortest]
        tree.collect(tree.advance([waiting.pop(key) for key in batch]), waiting, final)
    return dict(final)


class _Tree:
    """Runs one iteration of the real decoder for many states at once, one copy for every outcome."""

    def __init__(self, sampler, backbone, label) -> None:
        self.sampler, self.backbone, self.label = sampler, backbone, label
        self.size, self.length, self.window = backbone.codebook_size, backbone.num_codes, sampler.num_rows

    def first(self):
        """All outcomes of the prefill."""
        outcomes = [(1.0, [None], [None], (), o) for o in self._rows((), [], [])]
        state, weights = self._run(outcomes, None)
        return state, weights

    def advance(self, entries):
        """All outcomes of the next iteration of some states."""
        outcomes, parents = [], []
        for number, (record, weight) in enumerate(entries):
            prefix = tuple(record["slots"][: record["length"]].tolist())
            rows = min(self.window, self.length - len(prefix))
            drafts = record["tokens"][:rows].tolist()
            labels = [self._label(record, j) for j in range(rows)]
            for outcome in self._rows(prefix, drafts, labels):
                outcomes.append((weight, drafts, labels, prefix, outcome))
                parents.append(number)
        return self._run(outcomes, self._assemble([entries[n][0] for n in parents]))

    def collect(self, result, waiting, final) -> None:
        """Split a batch into records, spell out uniform new drafts, merge equal ones."""
        state, weights = result
        place = {int(row): i for i, row in enumerate(state.rows)}
        for image, weight in enumerate(weights):
            slots = state.tokens[image, : self.length]
            if bool((slots >= 0).all()):
                final[tuple(slots.tolist())] += weight
                continue
            for record, share in self._expand(self._record(state, image, place[image])):
                key = record["key"]
                waiting[key] = (record, share * weight + (waiting[key][1] if key in waiting else 0.0))

    def _rows(self, prefix, drafts, labels):
        """Outcomes of one window: (probability, accept u, pick u, expected code, expected count) over its rows."""
        rows = 1 if not prefix else len(drafts)
        laws = [self._target((*prefix, *drafts[:j])) for j in range(rows)]
        partial = [(1.0, [], [], [], None)]
        for j, p in enumerate(laws):
            grown = []
            for weight, accepts, picks, codes, first in partial:
                tested = (
                    prefix and labels[j] is not None and not (self.sampler.rule == "independent" and first is not None)
                )
                for chance, accept, pick, code, accepted in _noise(p, drafts[j], labels[j]) if tested else _fresh(p):
                    stop = j if first is None and not accepted else first
                    grown.append((weight * chance, [*accepts, accept], [*picks, pick], [*codes, code], stop))
            partial = grown
        return [(w, a, u, c, rows if first is None else first + 1) for w, a, u, c, first in partial]

    def _target(self, prefix):
        logits = self.backbone.logits_after(self.label, prefix)[: self._branches(), None, None]
        return warp_logits(logits, **self.sampler.warp)[0, 0].double().softmax(-1).numpy()

    def _branches(self):
        return 1 if self.sampler.guidance_scale == 1 else 2

    def _label(self, record, j):
        kind, token = int(record["kind"][j]), int(record["tokens"][j])
        if kind == Label.NONE or token < 0:
            return None
        if kind == Label.POINT:
            return np.eye(self.size)[token]
        if kind == Label.UNIFORM:
            return np.full(self.size, 1 / self.size)
        row = record["logits"][:, None, int(record["row"][j]), None]  # g 1 1 v
        return warp_logits(row, **self.sampler.warp)[0, 0].double().softmax(-1).numpy()

    def _run(self, outcomes, state):
        """Start or step the decoder with the noise of the outcomes; check that it did what they say."""
        width = max(len(o[4][1]) for o in outcomes) if state is None else state.width
        width = self.window if state is None else width
        noise = torch.full((2, len(outcomes), width), 0.5, dtype=torch.float64)
        for i, (_, _, _, _, (_, accepts, picks, _, _)) in enumerate(outcomes):
            for j, (accept, pick) in enumerate(zip(accepts, picks, strict=True)):
                noise[0, i, j], noise[1, i, j] = accept, pick
        given = VerifyNoise(accept=noise[0].float(), fresh=noise[1], residual=noise[1])

        def verify(*args, **kwargs):
            return verify_window(*args, **{**kwargs, "noise": given})

        with mock.patch.object(rules, "verify_window", verify):
            if state is None:
                labels = torch.full((len(outcomes),), self.label)
                state = self.sampler.start(self.backbone, labels, seeds=list(range(len(outcomes))))
            else:
                state = self.sampler.step(state)
        for i, (_, _, _, prefix, (_, _, _, codes, count)) in enumerate(outcomes):
            expected = [*prefix, *codes[:count]]
            assert state.tokens[i, : len(expected)].tolist() == expected, "the decoder decides otherwise than the rule"
            assert int((state.tokens[i, : self.length] >= 0).sum()) == len(expected), "wrong number of codes committed"
        return state, [weight * o[0] for weight, _, _, _, o in outcomes]

    def _record(self, state, image, active):
        """Everything the decoder knows about one image, padded to the full window."""
        draft, record = state.draft, {"length": int(state.length[active]), "slots": state.tokens[image].clone()}
        record["cache"] = state.session.cache[active].clone()
        assert int(state.session.length[active]) == record["length"] - 1
        for name, empty in (("tokens", -1), ("kind", 0), ("prob", 0), ("row", 0)):
            value = getattr(draft, name)[active]
            record[name] = torch.cat([value, value.new_full((self.window - len(value),), empty)])
        rows = draft.logits[:, active]
        record["logits"] = torch.cat([rows, rows.new_zeros(len(rows), self.window - rows.shape[1], self.size)], dim=1)
        stats = draft.stats[active]
        record["stats"] = torch.cat([stats, stats.new_zeros(self.window - len(stats), 2)])
        return record

    def _expand(self, record):
        """Spell out the new drafts that were drawn uniformly."""
        new = (record["kind"] == Label.UNIFORM).nonzero().flatten()
        for tokens in product(range(self.size), repeat=len(new)):
            copy = dict(record, tokens=record["tokens"].clone())
            copy["tokens"][new] = torch.tensor(tokens, dtype=torch.int64)
            laws = [self._label(copy, j) for j in range(self.window)]
            copy["key"] = (
                tuple(copy["slots"][: copy["length"]].tolist()),
                tuple(copy["tokens"].tolist()),
                tuple(None if law is None else tuple(np.round(law, 10)) for law in laws),
            )
            yield copy, self.size ** -len(new)

    def _assemble(self, records):
        """A decoder state with one image for every record."""
        labels = torch.full((len(records),), self.label)
        state = self.sampler.start(self.backbone, labels, seeds=list(range(len(records))))
        stack = {name: torch.stack([r[name] for r in records]) for name in records[0] if name not in ("length", "key")}
        state.session.cache, state.tokens = stack["cache"], stack["slots"]
        state.length = torch.tensor([r["length"] for r in records])
        state.session.length = state.length - 1
        state.rows, state.num_forwards, state.done = torch.arange(len(records)), 1, False
        state.keys = torch.arange(len(records))
        state.width = min(self.window, self.length - int(state.length.min()))
        parts = {name: stack[name][:, : state.width] for name in ("tokens", "kind", "prob", "row")}
        state.draft = Draft(**parts, logits=stack["logits"].movedim(0, 1), stats=stack["stats"])
        return state


def _fresh(p):
    """Outcomes of a draw from ``p``: (probability, accept u, pick u, code, accepted)."""
    return [(chance, 0.5, pick, code, False) for chance, pick, code in _picks(p)]


def _noise(p, token, q):
    """Outcomes of testing ``token`` with label ``q`` against ``p``."""
    keep = min(1.0, p[token] / q[token]) if q[token] > 0 else 1.0
    keep = 1.0 if keep > 1 - 1e-6 else keep
    outcomes = [(keep, keep * (1 - EDGE), 0.5, token, True)] if keep > 0 else []
    if keep < 1:
        residual = np.clip(p - q, 0, None)
        residual = residual / residual.sum()
        outcomes += [((1 - keep) * w, keep + EDGE * (1 - keep), u, v, False) for w, u, v in _picks(residual)]
    return outcomes


def _picks(law):
    """(probability, number near an end of its interval, code) of every code."""
    high = np.cumsum(law)
    for code, mass in enumerate(law):
        if mass > 0:
            inside = EDGE * mass
            yield float(mass), float(high[code] - inside if code % 2 else high[code] - mass + inside), code


# -------------------------------------------------------------------------------------------------------- shared noise


class _FixedNoise:
    """Stands in for the cache of Gumbel rows: explicit rows ``[B, N, V]``."""

    def __init__(self, rows) -> None:
        self.table, self.capacity, self.num_codes = rows, rows.shape[1], rows.shape[2]

    def rows(self, positions):
        return self.table.gather(1, positions[..., None].expand(-1, -1, self.num_codes))

    def select(self, rows) -> None:
        self.table = self.table[rows]


def shared_noise_law(sampler, backbone, *, label=0):
    """Law under the equality rule, for two codes: the noise of a position matters only through one difference.

    The laws that a position can have cut the line of that difference into intervals of known probability; the decoder
    runs once for every combination of intervals, all of them in one batch.
    """
    assert backbone.codebook_size == 2
    branches = 1 if sampler.guidance_scale == 1 else 2
    cells = []
    for n in range(backbone.num_codes):
        logits = torch.stack([backbone.logits_after(label, x) for x in backbone.prefixes(n)], dim=1)  # 2 K V
        z = warp_logits(logits[:branches, None], **sampler.warp)[0].double()
        cuts = sorted({float(d) for d in z[:, 0] - z[:, 1] if math.isfinite(d)})
        edges = [-math.inf, *cuts, math.inf]
        cells.append([(_logistic(b) - _logistic(a), _inside(a, b)) for a, b in pairwise(edges)])
    runs = list(product(*cells))
    difference = torch.tensor([[point for _, point in run] for run in runs])  # of noise 1 over noise 0
    rows = torch.stack([torch.zeros_like(difference), difference], dim=-1).float()
    with mock.patch.object(window_module, "GumbelCache", return_value=_FixedNoise(rows)):
        codes = sampler.sample(backbone, torch.full((len(runs),), label), seeds=list(range(len(runs)))).codes
    law = defaultdict(float)
    for sequence, run in zip(codes.tolist(), runs, strict=True):
        law[tuple(sequence)] += math.prod(weight for weight, _ in run)
    return dict(law)


def _logistic(x):
    return 0.0 if x == -math.inf else 1 / (1 + math.exp(-x))


def _inside(a, b):
    if a == -math.inf:
        return b - 1.0 if b < math.inf else 0.0
    return a + 1.0 if b == math.inf else (a + b) / 2


def table_law(backbone, sampler, *, label=0):
    """The autoregressive law of a tabular backbone under the sampler's settings."""
    branches = 1 if sampler.guidance_scale == 1 else 2

    def law(prefix):
        logits = backbone.logits_after(label, prefix)[:branches, None, None]
        return warp_logits(logits, **sampler.warp)[0, 0].double().softmax(-1).tolist()

    return sequence_law(law, backbone.num_codes)


# ------------------------------------------------------------------------------------------------------------- samples


def chi_square_p(codes, law) -> float:
    """p-value of samples ``[n, L]`` against a law; cells with expectation below 5 are pooled."""
    counts = defaultdict(int)
    for sequence in codes.tolist():
        counts[tuple(sequence)] += 1
    if any(law.get(sequence, 0.0) == 0.0 for sequence in counts):
        return 0.0  # something impossible was drawn
    statistic, cells, pooled, pooled_count = 0.0, 0, 0.0, 0
    for sequence, mass in law.items():
        expected = mass * len(codes)
        if expected < 5:
            pooled, pooled_count = pooled + expected, pooled_count + counts[sequence]
        else:
            statistic, cells = statistic + (counts[sequence] - expected) ** 2 / expected, cells + 1
    if pooled > 0:
        statistic, cells = statistic + (pooled_count - pooled) ** 2 / pooled, cells + 1
    half = torch.tensor([(cells - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
