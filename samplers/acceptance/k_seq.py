"""K-SEQ (SpecTr: Sun et al., 2023, arXiv:2310.15141): independent siblings, tested without updates between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vargen.samplers.acceptance.tree import Recursive


@dataclass(frozen=True)
class KSeq(Recursive):
    """Exact for siblings drawn with replacement."""

    k_seq: ClassVar[bool] = True
