"""LlamaGen's transformer without an order: all codes see each other, unknown ones are masked (MaskGIT, arXiv:2202.04200).

Trained to guess masked codes, it is decoded by confidence in a few passes; nothing is cached, every pass reads all codes.

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
from vargen.backbones.llamagen.body import OneHeadBody
from vargen.features import Feature
from vargen.validation.folders import Stored


class MaskedTransformer(ScheduledBackbone, OneHeadBody, Stored, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Masked codes from all others; the arguments are those of ``LlamaGenTransformer``."""

    features = frozenset({Feature.MASKED})
    schedules = ("maskgit",)

    @wraps(OneHeadBody.__init__)  # type: ignore[misc]  # its signature is what the configuration reads
    def __init__(self, *args: Any, **config: Any) -> None:
        super().__init__(*args, **config)
        self.mask_embedding = nn.Parameter(torch.randn(1, self.config.dim) * 0.02)

    def unknown_embedding(self) -> Tensor:
        """[D] what stands for a masked code."""
        return self.mask_embedding[0]

    def forward(
        self,
        codes: Tensor,
        condition: Any,
        *,
        drop: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Predict every code, masked or not, from the condition and all codes that are not masked.

        Args:
            codes: [B, N] int64, -1 = masked.
            condition: as the model takes.
            drop: as in ``LlamaGenTransformer.forward``.
            generator: likewise.

        Returns:
            [B, N, V] float32 logits.
        """
        rows, present = self.training_condition(codes, condition, drop, generator)
        x = torch.cat([rows, self._embed_codes(codes)], dim=1)
        index = torch.arange(x.shape[1], device=x.device)
        h = self.forward_full(self.tok_dropout(x), positions=index, mask=padding_mask(present, len(index)))
        return self.output(self.norm(h[:, self.num_condition_tokens :])).float()
