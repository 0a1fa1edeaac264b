"""A table of codes for small models with large codebooks, factored as in ALBERT (Lan et al., 2019, arXiv:1909.11942)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CodeTable(nn.Module):
    """A narrow table of all codes and the map to the model's width; heads share the table.

    It is read by calls only, so that whatever others put around a module's call sees them.
    """

    def __init__(self, codebook_size: int, rank: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(codebook_size, rank) * rank**-0.5)
        self.projection = nn.Linear(rank, dim, bias=False)
        self.embedding_dim = dim

    def forward(self, x: Tensor, score: bool = False) -> Tensor:
        """Codes [...] int64 to [..., D]; with ``score`` vectors [..., rank] to the logits [..., V] of all codes."""
        return F.linear(x, self.weight) if score else self.projection(F.embedding(x, self.weight))
