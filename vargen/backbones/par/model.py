"""PAR's transformer: groups of distant codes in one forward pass (Wang et al., 2024, arXiv:2412.15119).

LlamaGen's blocks over codes in another order: the first code of each region one by one, then, beside M - 1 learned
tokens, the same cell of all regions at once. Parameter names are those of the official checkpoints.

Letters: B images, N codes, T condition positions, M codes of a group, V codes of the codebook, D width.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vargen.backbones.decoding.condition import padding_mask
from vargen.backbones.decoding.schedule import ScheduledBackbone
from vargen.backbones.layers.tables import DeviceTables
from vargen.backbones.llamagen.body import ConditionType, LlamaGenBody
from vargen.backbones.llamagen.sizes import RECOMPUTED
from vargen.backbones.par.sizes import infer_par_config
from vargen.backbones.settings.discrete import PAR
from vargen.checkpoints.reader import load_family
from vargen.features import Feature
from vargen.validation.checks import checked
from vargen.validation.folders import Stored


class PARTransformer(ScheduledBackbone, LlamaGenBody, Stored, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Codes of a grid, group by group.

    Args:
        group_size: M, the square of a number that divides both sides of the grid; 4 or 16 in the published models.
        dim, num_layers, num_heads, codebook_size, grid_size, condition_type, num_classes, caption_dim,
            num_condition_tokens, num_attributes, ffn_dim, multiple_of, rope_base, norm_eps, condition_rope,
            token_dropout_p, resid_dropout_p, ffn_dropout_p, class_dropout_prob, attribute_dropout_prob: as in
            ``LlamaGenTransformer``.
    """

    features = frozenset({Feature.GROUPS})
    schedules = ("par",)

    @checked(PAR)
    @register_to_config
    def __init__(
        self,
        dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        codebook_size: int = 16384,
        grid_size: tuple[int, int] = (24, 24),
        condition_type: ConditionType = "class",
        num_classes: int = 1000,
        caption_dim: int = 2048,
        num_condition_tokens: int = 120,
        num_attributes: int = 0,
        ffn_dim: int | None = None,
        multiple_of: int = 256,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        condition_rope: Literal["zero", "identity"] = "zero",
        token_dropout_p: float = 0.1,
        resid_dropout_p: float = 0.1,
        ffn_dropout_p: float = 0.1,
        class_dropout_prob: float = 0.1,
        attribute_dropout_prob: float = 0.0,
        group_size: int = 4,
    ) -> None:
        super().__init__()
        self.build_body(num_layers)
        self.spe_tok_embeddings = SpecialTokens(group_size - 1, dim)
        self.build_head()
        self._tables = DeviceTables()
        self._order_tables(torch.device("cpu"))

    @classmethod
    def from_original(cls, checkpoint: Any, **config: Any) -> PARTransformer:
        """Load an official checkpoint strictly; arguments as in ``LlamaGenTransformer.from_original``."""
        return load_family(cls, checkpoint, config, infer_par_config, family="par", ignore=RECOMPUTED)

    def check_schedule(self, schedule: Any) -> None:
        """Raise ``ValueError`` unless the weights were trained for this schedule, M included."""
        super().check_schedule(schedule)
        if schedule.group_size != self.config.group_size:
            raise ValueError(
                f"the schedule draws groups of {schedule.group_size} codes, the model was trained for {self.config.group_size}"
            )

    def special_embeddings(self, index: Tensor) -> Tensor:
        """Learned tokens: [w] to [w, D]."""
        return self.spe_tok_embeddings.special_embeddings(index)

    def forward(
        self,
        codes: Tensor,
        condition: Any,
        *,
        drop: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Predict every code from the condition and the groups before its own.

        Args:
            codes: [B, N] int64 in raster order.
            condition: as the model takes.
            drop: as in ``LlamaGenTransformer.forward``.
            generator: likewise.

        Returns:
            [B, N, V] float32 logits, row p for code p of the raster order.
        """
        rows, present = self.training_condition(codes, condition, drop, generator)
        size, offset = self.config.group_size, self.num_condition_tokens
        order, stamps = self._order_tables(codes.device)
        fed = self.embed(codes[:, order[:-size]])  # the last group is never read
        special = self.special_embeddings(torch.arange(size - 1, device=codes.device)).expand(len(codes), -1, -1)
        x = torch.cat([rows, fed[:, :size], special, fed[:, size:]], dim=1)
        null = order.new_full((size - 1,), -1)
        places = torch.cat([torch.arange(offset, device=codes.device), offset + order[:size], null])
        places = torch.cat([places, offset + order[size:-size]])
        mask = padding_mask(present, len(stamps), stamps <= stamps[:, None])
        h = self.forward_full(self.tok_dropout(x), positions=places, mask=mask)
        logits = self.output(self.norm(h[:, offset - 1 :])).float()
        return torch.empty_like(logits).index_copy(1, order, logits)

    def make_tables(self, device: torch.device) -> None:
        """Make rotations and orders."""
        super().make_tables(device)
        self._order_tables(device)

    def _order_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[N] raster position of the k-th code, and the stamps of the input [T + N - 1]."""
        return self._tables.get(device, self._orders)  # type: ignore[return-value]

    def _orders(self) -> tuple[Tensor, ...]:
        size, offset = self.config.group_size, self.num_condition_tokens
        side, height = math.isqrt(size), self.grid_size[0]
        cells = torch.arange(self.num_codes)  # regions of h x w cells, a of them down and b across
        order = rearrange(cells, "(a h b w) -> (h w a b)", a=side, b=side, h=height // side)
        singles = torch.arange(offset + size - 1)  # condition and all but the last code of the first group
        groups = torch.arange(self.num_codes // size - 1).repeat_interleave(size) + offset + size - 1
        return order, torch.cat([singles, groups])


class SpecialTokens(nn.Module):
    """Embeddings of the learned tokens, under their official name."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.special_embeddings = nn.Embedding(count, dim)
