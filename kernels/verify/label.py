"""Labels in kernels: the distribution q that a draft token was drawn from, whatever its kind. Letters: V codes."""

from __future__ import annotations

from typing import Any, NamedTuple

from vargen.kernels import device as rows
from vargen.kernels.language import constant, jit, tl
from vargen.kernels.verify.types import Label

NONE, POINT, UNIFORM, ROW = (constant(kind) for kind in Label)


class Drafts(NamedTuple):
    """Pointers ``[B, W]`` of ``types.Draft``, with the raw logits and the statistics of its labels."""

    tokens: Any
    kind: Any
    prob: Any
    row: Any
    logits: Any  # device.Logits, W' rows
    stats: Any  # B W' 2


class LabelRow(NamedTuple):
    """One entry of a draft."""

    kind: Any  # Label
    token: Any
    prob: Any  # q of the token
    row: Any  # device.Row that is the label (ROW only), with its threshold and log-normaliser
    tau: Any
    lse: Any


@jit
def label_at(drafts, label_rows, warp, b, at, PER_IMAGE: tl.constexpr):
    """The label of entry ``at`` of image b; its row and statistics mean something for ROW labels only."""
    kind = tl.load(drafts.kind + at).to(tl.int32)
    source = tl.where(kind == ROW, tl.load(drafts.row + at), 0)
    row = rows.row_at(drafts.logits, warp, b, source, PER_IMAGE)
    stats = drafts.stats + 2 * (b * label_rows + source)
    token, prob = tl.load(drafts.tokens + at), tl.load(drafts.prob + at)
    return LabelRow(kind, token, prob, row, tl.load(stats), tl.load(stats + 1))


@jit
def label_tile(label, piece, GUIDED: tl.constexpr, PIECE: tl.constexpr):
    """q of a piece of the codes."""
    at = piece * PIECE + tl.arange(0, PIECE)
    q = tl.where(label.kind == UNIFORM, label.prob, tl.where((label.kind == POINT) & (at == label.token), 1.0, 0.0))
    if label.kind == ROW:
        q = rows.prob_of(rows.load_tile(label.row, piece, GUIDED, PIECE), label.tau, label.lse)
    return q


@jit
def label_code(label, code, GUIDED: tl.constexpr):
    """q of a code other than the token."""
    q = tl.where(label.kind == UNIFORM, label.prob, 0.0)
    if label.kind == ROW:
        q = rows.prob_of(rows.load_code(label.row, code, GUIDED), label.tau, label.lse)
    return q
