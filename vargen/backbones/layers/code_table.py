"""A table of codes for small models with large codebooks, factored as in ALBERT (Lan et al., 2019, arXiv:1909.11942)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CodeTable(nn.Module):
    """A narrow table of all codes and the map to the model's width; heads share the table."""

    def __init__(self, codebook_size: int, rank: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(codebook_size, rank) * rank**-0.5)
        self.projection = nn.Linear(rank, dim, bias=False)
        self.embedding_dim = dim

    def forward(self, codes: Tensor) -> Tensor:
        """[...] int64 to [..., D]."""
        return self.projection(F.embedding(codes, self.weight))
