"""Counts of neighbours that adapt while pictures are drawn: the tables of ADED (arXiv:2407.12021), for two dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from vargen.samplers.drafters.lookup import LookupDrafter, one_each
from vargen.validation.checks import check_integer, check_number

NUM_ROWS = 1 << 16  # of the table of pairs, which are hashed
MIX = 1_000_003


class NgramDrafter(LookupDrafter):
    """Knows how often a code stood behind the code to its left and below the one above it.

    ADED keeps trigrams of a text (the two codes before) and adds to those of the last words; here the context is the left and
    the upper neighbour, with the left or the upper one alone where the pair is new. The published search (Monte Carlo, a budget
    of nodes) looks for likely paths of the same table; ``tree="dynamic"`` finds the likeliest ones within
    ``num_draft_tokens`` nodes.

    Args:
        num_successors: K, codes remembered for a context (12 as published).
        most: weight of a code in a context at which it stops growing.
        backoff: weight of the contexts of one neighbour beside that of both.

    Example:
        >>> import vargen
        >>> drafter = vargen.NgramDrafter()  # kept: it is warm for the next picture
        >>> sampler = vargen.SpeculativeSampler(tree="dynamic", num_draft_tokens=24)  # sampler.sample(..., drafter=drafter)
    """

    def __init__(self, num_successors: int = 12, most: float = 64.0, backoff: float = 0.1) -> None:
        self.num_successors = check_integer("num_successors", num_successors, low=1)
        self.most = check_number("most", most, low=1.0)
        self.backoff = check_number("backoff", backoff, low=0.0)
        self.codebook_size: int | None = None
        self.tables: list[_Counts] = []  # of pairs, of left codes, of upper codes

    def prepare(self, codebook_size: int, device: torch.device) -> None:
        """Make empty tables."""
        if self.codebook_size is None:
            sizes = (NUM_ROWS, codebook_size, codebook_size)
            self.codebook_size = codebook_size
            self.tables = [_Counts(size, self.num_successors, self.most, device) for size in sizes]
        elif self.codebook_size != codebook_size:
            raise ValueError(
                f"this NgramDrafter has seen codes of a codebook of {self.codebook_size}, the backbone has {codebook_size}; "
                "make a new one"
            )
        for table in self.tables:
            table.to(device)

    def lookup(self, left: Tensor, above: Tensor) -> Tensor:
        """Logarithms of the counts; a context that was never seen proposes the code above, or else the one before."""
        assert self.codebook_size is not None
        found = torch.zeros(*left.shape, self.codebook_size, device=left.device)
        guess = above.where(above >= 0, left.clamp(min=0))
        found.scatter_(-1, guess[..., None], 1e-3)
        for table, key, share in zip(self.tables, self._keys(left, above), self._shares(), strict=True):
            codes, weights = table.rows(key)
            found.scatter_add_(-1, codes, weights * share)
        return found.log()

    def learn(self, codes: Tensor, left: Tensor, above: Tensor) -> None:
        """Count codes in their contexts."""
        for table, key in zip(self.tables, self._keys(left, above), strict=True):
            table.add(key.where(codes >= 0, -1), codes)

    def _shares(self) -> tuple[float, float, float]:
        return (1.0, self.backoff, self.backoff)

    def _keys(self, left: Tensor, above: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the three tables, -1 where a neighbour is missing."""
        pair = (left * MIX + above * 31) % NUM_ROWS
        return pair.where((left >= 0) & (above >= 0), -1), left, above


class _Counts:
    """Weights of K codes for every row; a new code takes the place of the lightest one."""

    def __init__(self, size: int, count: int, most: float, device: torch.device) -> None:
        self.size, self.most = size, most
        self.codes = torch.zeros(size + 1, count, dtype=torch.int64, device=device)  # the last row is never read
        self.weights = torch.zeros(size + 1, count, device=device)

    def to(self, device: torch.device) -> None:
        self.codes, self.weights = self.codes.to(device), self.weights.to(device)

    def rows(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and weights ``[..., K]`` of rows, of weight 0 where ``key`` is -1."""
        row = key.clamp(min=0)
        return self.codes[row], self.weights[row] * (key >= 0)[..., None]

    def add(self, key: Tensor, codes: Tensor) -> None:
        """Count ``codes [A]`` in the rows ``key [A]``."""
        row = one_each(key, self.size)
        known = (self.codes[row] == codes[:, None]) & (self.weights[row] > 0)
        place = torch.where(known.any(-1), known.long().argmax(-1), self.weights[row].argmin(-1))
        before = self.weights[row, place].where(known.any(-1), 0.0)
        self.codes[row, place] = codes
        self.weights[row, place] = (before + 1.0).clamp(max=self.most)
