"""What a token head is: it turns rows of a backbone into tokens, whatever a token is.

Letters: A images, G guidance branches, g positions drawn at once, R width of a row (codes, or the condition of a chain).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class TokenHead(Protocol):
    """Draws tokens; the noise is a function of seed and position alone, so an image does not depend on its batch."""

    def draw(self, rows: Tensor, keys: Tensor, positions: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """Draw one token a row.

        Args:
            rows: ``[G, A, g, R]``, conditional branch first.
            keys: ``[A]`` int64 seeds.
            positions: ``[A, g]`` int64 places of the tokens.
            guidance_scale: a number, or one a token ``[A, g]`` where the head takes that.

        Returns:
            ``[A, g]`` int64 codes or ``[A, g, D]`` continuous tokens.
        """
        ...
