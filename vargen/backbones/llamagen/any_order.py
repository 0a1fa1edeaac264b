"""LlamaGen's transformer in any order (RandAR, Pang et al., 2024, arXiv:2412.01827).

Before every code stands a query that says where the code lies: one learned vector, rotated by the place. Trained on random
orders, the model draws any partition of a permutation: several queries in one pass give several codes. The published
checkpoints add one parameter to LlamaGen's.

Letters: B images, N codes, T condition positions, V codes of the codebook, D width.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from vargen.backbones.decoding.condition import padding_mask
from vargen.backbones.decoding.schedule import ScheduledBackbone
from vargen.backbones.layers.rope import rotate
from vargen.backbones.llamagen.body import OneHeadBody
from vargen.backbones.llamagen.sizes import RECOMPUTED, infer_config
from vargen.checkpoints.reader import load_family
from vargen.features import Feature
from vargen.validation.folders import Stored


class AnyOrderTransformer(ScheduledBackbone, OneHeadBody, Stored, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Codes of a grid in any order, any number of them in a pass; the arguments are those of ``LlamaGenTransformer``."""

    features = frozenset({Feature.GROUPS})
    schedules = ("randar",)

    @wraps(OneHeadBody.__init__)  # type: ignore[misc]  # its signature is what the configuration reads
    def __init__(self, *args: Any, **config: Any) -> None:
        super().__init__(*args, **config)
        self.pos_instruct_embeddings = nn.Parameter(torch.randn(1, self.config.dim) * 0.02)

    @classmethod
    def from_original(cls, checkpoint: Any, **config: Any) -> AnyOrderTransformer:
        """Load a RandAR checkpoint strictly; arguments as in ``LlamaGenTransformer.from_original``."""
        return load_family(cls, checkpoint, config, infer_config, family="randar", ignore=RECOMPUTED)

    def query_embeddings(self, positions: Tensor) -> Tensor:
        """Questions for the codes at ``positions [..., w]``: [..., w, D]; attention rotates them once more."""
        vector = self.pos_instruct_embeddings.view(1, 1, self.config.num_heads, -1)
        rows = self.rope_rows(self.num_condition_tokens + positions.flatten())
        assert rows is not None
        turned = rotate(vector.expand(1, len(rows), -1, -1), rows).flatten(2)[0]
        return turned.unflatten(0, positions.shape)

    def forward(
        self,
        codes: Tensor,
        condition: Any,
        *,
        order: Tensor | None = None,
        drop: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Predict every code from the condition, its own place and the codes before it in an order.

        Args:
            codes: [B, N] int64 in raster order.
            condition: as the model takes.
            order: [N] or [B, N] raster position of the k-th code; None draws one for each image from ``generator`` (or
                the global one).
            drop: as in ``LlamaGenTransformer.forward``.
            generator: of orders and drops.

        Returns:
            [B, N, V] float32 logits, row p for code p of the raster order.
        """
        rows, present = self.training_condition(codes, condition, drop, generator)
        batch, device, offset = len(codes), codes.device, self.num_condition_tokens
        if order is None:
            where = device if generator is None else generator.device
            order = torch.rand(codes.shape, generator=generator, device=where).argsort(-1).to(device)
        order = order.expand(batch, -1)
        pairs = torch.stack([self.query_embeddings(order), self.embed(codes.gather(1, order))], dim=2).flatten(1, 2)
        x = torch.cat([rows, pairs[:, :-1]], dim=1)  # the last code is never read
        lead = torch.arange(offset, device=device).expand(batch, -1)
        places = torch.cat([lead, (offset + order).repeat_interleave(2, dim=1)[:, :-1]], dim=1)
        index = torch.arange(x.shape[1], device=device)
        mask = None if present is None else padding_mask(present, len(index), index <= index[:, None])
        h = self.forward_full(self.tok_dropout(x), positions=places, mask=mask, is_causal=mask is None)
        logits = self.output(self.norm(h[:, offset::2])).float()
        return torch.empty_like(logits).scatter(1, order[..., None].expand_as(logits), logits)
