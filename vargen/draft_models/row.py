"""The row drafter: two small heads guess the right and the lower neighbour of a code, so that a row is proposed at once.

The idea is that of spatially speculative decoding (arXiv:2606.20543), which keeps guesses by a test of its own; here they are
verified by the shared noise, so that codes are next-token's. The lower head reads the target's hidden state at the code above a
slot, the right head the code to its left; their sum goes through the target's own head.

Letters: R rows of hidden states, w slots, D width, H width of a head, V codes of the codebook.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.backbones.settings.discrete import ROW
from vargen.features import Feature
from vargen.hooks import HookedModel, compute_dtype, runs_as_forward
from vargen.validation.checks import checked
from vargen.validation.folders import Stored


class NeighborHead(nn.Module):
    """Two linear layers."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(in_dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        out: Tensor = self.down(F.silu(self.up(x.to(compute_dtype(self.up)))))
        return out


class RowDrafter(HookedModel, Stored, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A drafter that stands on the hidden states and the head of one backbone whose codes lie in raster order.

    Args:
        dim: D, the backbone's.
        right_dim: H of the head that guesses the right neighbour.
        below_dim: H of the head that guesses the lower neighbour.
        codebook_size: V, the backbone's.
        grid_size: (height, width) in codes, the backbone's.
        num_condition_tokens: the backbone's.

    Example:
        >>> RowDrafter(dim=16, right_dim=8, below_dim=8, codebook_size=32, grid_size=(4, 4)).right.up.weight.shape
        torch.Size([8, 16])
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = False

    @checked(ROW)
    @register_to_config
    def __init__(
        self,
        dim: int = 768,
        right_dim: int = 160,
        below_dim: int = 192,
        codebook_size: int = 16384,
        grid_size: tuple[int, int] = (16, 16),
        num_condition_tokens: int = 1,
    ) -> None:
        super().__init__()
        self.grid_size, self.codebook_size = grid_size, codebook_size
        self.right = NeighborHead(dim, right_dim, dim)
        self.below = NeighborHead(2 * dim, below_dim, dim)

    def forward(self, above: Tensor, corner: Tensor, left: Tensor) -> Tensor:
        """Estimate the hidden states that draw slots.

        Args:
            above: [..., D] hidden states at the codes above them (of the last condition position in the first row).
            corner: [..., D] embeddings of the codes above to the right, 0 where there is none.
            left: [..., D] embeddings of the codes to their left, which precede them in raster order.

        Returns:
            [..., D].
        """
        return self.lower(above, corner) + self.righter(left)

    @runs_as_forward
    def lower(self, above: Tensor, corner: Tensor) -> Tensor:
        """What the rows above say."""
        out: Tensor = self.below(torch.cat([above, corner.to(above)], dim=-1))
        return out

    @runs_as_forward
    def righter(self, left: Tensor) -> Tensor:
        """What the code before says."""
        out: Tensor = self.right(left)
        return out

    def check_backbone(self, backbone: Any) -> None:
        """Raise ``ValueError`` unless this drafter was made for a backbone of these sizes."""
        names = ("output", "hidden_size", "num_condition_tokens", "head_logits", "embed")
        missing = [name for name in names if not hasattr(backbone, name)]
        if missing or Feature.HIDDEN not in backbone.features:
            lacks = ", ".join(missing) or "hidden states"
            raise ValueError(f"a row drafter needs a backbone with hidden states and a head, this one lacks {lacks}")
        mine = (self.config.dim, self.codebook_size, tuple(self.grid_size), self.config.num_condition_tokens)
        theirs = (
            backbone.hidden_size,
            backbone.codebook_size,
            tuple(backbone.grid_size),
            backbone.num_condition_tokens,
        )
        if mine != theirs:
            words = "(width, codebook, grid, condition positions)"
            raise ValueError(
                f"the row drafter was made for a backbone of {words} {mine}, this one has {theirs}; train one for it"
            )
