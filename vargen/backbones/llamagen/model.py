"""LlamaGen's transformer over raster codes (Sun et al., 2024, arXiv:2406.06525).

The parameter names are those of the official checkpoints. Weights are published for class labels (ImageNet) and captions
(FLAN-T5 features); attribute slots are an addition of this library.

Letters: B images, N codes of the grid, T condition positions, V codes of the codebook, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor

from vargen.backbones.decoding.condition import padding_mask
from vargen.backbones.decoding.window import WindowBackbone
from vargen.backbones.llamagen.body import OneHeadBody
from vargen.backbones.llamagen.sizes import RECOMPUTED, infer_config
from vargen.checkpoints.reader import load_family
from vargen.validation.folders import Stored

FAMILIES = ("llamagen-c2i", "llamagen-t2i")


class LlamaGenTransformer(WindowBackbone, OneHeadBody, Stored, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Causal transformer: condition, then the codes of a grid row by row; position i predicts code i.

    Args:
        dim: D.
        num_layers: blocks.
        num_heads: query heads; D / num_heads must be a multiple of 4 (two rotary axes).
        num_kv_heads: key-value heads; None = num_heads.
        codebook_size: V.
        grid_size: (height, width) in codes.
        condition_type: what stands before the codes.
        num_classes: labels without the null label ("class").
        caption_dim: width of text features ("caption").
        num_condition_tokens: T; ignored for "class" (1). Captions use 120 in all published models; for "attributes" it
            is the number of slots.
        num_attributes: attribute ids, 0 = unspecified included ("attributes").
        ffn_dim: hidden width of the feed-forward; None = two thirds of 4 D rounded up to ``multiple_of``.
        multiple_of: see ``ffn_dim``.
        ffn_dim_multiplier: factor on the hidden width before rounding.
        rope_base: longest rotary period.
        norm_eps: of the RMS norms.
        condition_rope: "zero" as in every official checkpoint (condition rows have zero queries and keys, so that codes
            see the mean of the condition); "identity" gives them unrotated queries and keys.
        token_dropout_p: on all input embeddings, in training.
        resid_dropout_p: behind the attention projection, in training.
        ffn_dropout_p: behind the feed-forward, in training.
        drop_path_rate: stochastic depth of the last block, linear from 0; sets the two above to 0 when positive.
        class_dropout_prob: probability of training a sample without its condition.
        attribute_dropout_prob: mean rate of unspecifying single attributes in training.
    """

    @classmethod
    def from_original(cls, checkpoint: Any, **config: Any) -> LlamaGenTransformer:
        """Load an official checkpoint strictly.

        Args:
            checkpoint: path or state dict, any of the published containers.
            config: ``grid_size`` always, ``num_heads`` unless width and depth are those of a published size; anything
                else overrides what the shapes tell.
        """
        return load_family(cls, checkpoint, config, infer_config, family=FAMILIES, ignore=RECOMPUTED)

    def forward(
        self,
        codes: Tensor,
        condition: Any,
        *,
        drop: Tensor | None = None,
        generator: torch.Generator | None = None,
        hidden: bool = False,
    ) -> Any:
        """Predict every code from the condition and the codes before it.

        In training mode conditions are dropped: with ``drop`` as given, else drawn from ``generator`` (or the global
        one). Evaluation mode drops nothing unless ``drop`` is given.

        Args:
            codes: [B, n] int64, n <= N.
            condition: class ids [B], (features [B, T, C], mask [B, T]) or attribute ids [B, T].
            drop: [B] bool, True = train without condition; for attributes also [B, T], single slots.
            generator: for the drop decisions only, so that a resumed run draws the same.
            hidden: also return the states that enter the head, [B, n, D].

        Returns:
            [B, n, V] float32 logits, row i for code i; with ``hidden`` a pair.
        """
        if codes.ndim != 2 or not 0 < codes.shape[1] <= self.num_codes:
            raise ValueError(f"codes must be [batch, 1..{self.num_codes}], got {tuple(codes.shape)}")
        rows, present = self.embed_condition(condition, drop, generator)
        x = torch.cat([rows, self.embed(codes[:, :-1])], dim=1)
        index = torch.arange(x.shape[1], device=x.device)
        mask = None if present is None else padding_mask(present, len(index), index <= index[:, None])
        h = self.forward_full(self.tok_dropout(x), positions=index, mask=mask, is_causal=mask is None)
        h = self.norm(h[:, self.num_condition_tokens - 1 :])
        logits = self.output(h).float()
        return (logits, h) if hidden else logits
