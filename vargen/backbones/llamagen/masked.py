"""LlamaGen's transformer without an order: all codes see each other, unknown ones are masked (MaskGIT, arXiv:2202.04200).

Trained to guess masked codes, it is decoded by confidence in a few passes; nothing is cached, every pass reads all codes.

Letters: B images, N codes, T condition positions, V codes of the codebook, D width.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from vargen.backbones.decoding.schedule import ScheduledBackbone, padding_mask
from vargen.backbones.llamagen.model import LlamaGenTransformer
from vargen.features import Feature


class MaskedTransformer(ScheduledBackbone, LlamaGenTransformer):  # type: ignore[misc]
    """Masked codes from all others; the arguments are those of ``LlamaGenTransformer``."""

    features = frozenset({Feature.MASKED})
    schedules = ("maskgit",)
    sampler_hint = "MaskedSampler"

    @wraps(LlamaGenTransformer.__init__)  # type: ignore[misc]  # its signature is what the configuration reads
    def __init__(self, *args: Any, **config: Any) -> None:
        super().__init__(*args, **config)
        self.mask_embedding = nn.Parameter(torch.randn(1, self.config.dim) * 0.02)

    @classmethod
    def from_original(cls, checkpoint: Any, **config: Any) -> MaskedTransformer:
        """Refuse: no checkpoint of this layout is published."""
        raise ValueError("no masked LlamaGen checkpoints are published; train one and use from_pretrained")

    def head_norm(self, head: int, states: Tensor) -> Tensor:
        """Normalise states for the head."""
        return self.norm(states)

    def head_output(self, head: int, states: Tensor) -> Tensor:
        """[R, g, D] to [R, g, V]."""
        return self.output(states)

    def unknown_embedding(self) -> Tensor:
        """[D] what stands for a masked code."""
        return self.mask_embedding[0]

    def forward(  # type: ignore[override]
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
        if codes.ndim != 2 or codes.shape[1] != self.num_codes:
            raise ValueError(f"codes must be [batch, {self.num_codes}], got {tuple(codes.shape)}")
        condition = self._drop_condition(
            self.cls_embedding.check(condition, values=False), len(codes), drop, generator
        )
        x = torch.cat([self.cls_embedding(condition), self._embed_codes(codes)], dim=1)
        present = self.cls_embedding.mask(condition)
        mask = None if present is None else padding_mask(present, x.shape[1])
        index = torch.arange(x.shape[1], device=x.device)
        h = self.forward_full(self.tok_dropout(x), positions=index, mask=mask)
        return self.output(self.norm(h[:, self.num_condition_tokens :])).float()
