"""Token Recycling: the likeliest successors that the target named for a code when it last read it (arXiv:2408.08696)."""

from __future__ import annotations

import torch
from torch import Tensor

from vargen.samplers.drafters.lookup import LookupDrafter, one_each
from vargen.validation.checks import check_integer


class TokenRecyclingDrafter(LookupDrafter):
    """Remembers, for every code, the successors with the highest logits; accepted or not, every scored code teaches it.

    As published but for two things: siblings are drawn by the noise of their slot from the remembered logits, not taken in
    the order of the table, and an unknown code proposes itself. Trees of any shape; the published template has 80 nodes.

    Args:
        num_successors: K, remembered for a code.

    Example:
        >>> import vargen
        >>> drafter = vargen.TokenRecyclingDrafter()  # kept: it is warm for the next picture
        >>> sampler = vargen.SpeculativeSampler(tree="mc_sim_7b_63")  # sampler.sample(..., drafter=drafter)
    """

    watches_logits = True

    def __init__(self, num_successors: int = 8) -> None:
        self.num_successors = check_integer("num_successors", num_successors, low=1)
        self.codes: Tensor | None = None  # [V + 1, K]; the last row takes what is thrown away
        self.logits: Tensor | None = None  # [V + 1, K] float32, -inf where nothing is known

    def prepare(self, codebook_size: int, device: torch.device) -> None:
        """Make an empty table."""
        count = min(self.num_successors, codebook_size)
        if self.codes is None or self.logits is None:
            self.codes = torch.zeros(codebook_size + 1, count, dtype=torch.int64, device=device)
            self.logits = torch.full((codebook_size + 1, count), float("-inf"), device=device)
        elif len(self.codes) != codebook_size + 1:
            raise ValueError(
                f"this TokenRecyclingDrafter has seen codes of a codebook of {len(self.codes) - 1}, the backbone has "
                f"{codebook_size}; make a new one"
            )
        self.codes, self.logits = self.codes.to(device), self.logits.to(device)

    def lookup(self, left: Tensor, above: Tensor) -> Tensor:
        """The remembered logits, everything else impossible."""
        assert self.codes is not None
        assert self.logits is not None
        found = torch.full((*left.shape, len(self.codes) - 1), float("-inf"), device=left.device)
        row = left.clamp(min=0)
        found.scatter_(-1, self.codes[row], self.logits[row])
        unknown = ~found.isfinite().any(-1, keepdim=True)
        return torch.where(unknown, found.scatter(-1, row[..., None], 0.0), found)

    def watch(self, codes: Tensor, logits: Tensor) -> None:
        """Replace the successors of every code that was scored."""
        assert self.codes is not None
        assert self.logits is not None
        best, successors = logits.float().topk(self.codes.shape[1], dim=-1)
        row = one_each(codes.flatten(), len(self.codes) - 1)
        self.codes[row], self.logits[row] = successors.flatten(0, 1), best.flatten(0, 1)
