"""Switti: text to images in VAR's codes, scale after scale (Voronov et al., 2024, arXiv:2412.01819).

In the released models a scale attends to itself and to the caption alone: what it knows of coarser scales is the picture so far,
its input. Then a decode has no cache. The AR models attend to coarser scales as VAR does.

Letters: B images, R rows, K scales, n_k codes of scale k, L all codes, V codes of the codebook, C code channels, T text positions,
D width, c head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.backbones.decoding.scale import ScaleCondition
from vargen.backbones.decoding.text_scales import TextScaleBackbone
from vargen.backbones.settings.discrete import SWITTI
from vargen.backbones.switti.layers import CROP, CropEmbedding, SwittiBlock, SwittiText
from vargen.backbones.switti.sizes import (
    BUFFERS,
    DEPTH,
    from_hub_config,
    infer_switti_config,
    rope_rows,
    switti_size_config,
    to_native,
)
from vargen.backbones.var.layers import HeadNorm
from vargen.backbones.var.sizes import HEAD_DIM, SCALES_512
from vargen.checkpoints.reader import load_family
from vargen.hooks import compute_dtype
from vargen.validation.checks import checked
from vargen.validation.folders import Stored


class SwittiTransformer(TextScaleBackbone, Stored, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Captions to codes of ``MultiScaleVQTokenizer``. The defaults are the released model for 512 pixels.

    Conditions are captions as ``CLIPCaptionConditioner`` encodes them: (features ``[B, T, C]``, pooled ``[B, P]``, mask
    ``[B, T]``). There is no learned null caption: guidance needs ``negative``, the empty text encoded (pipelines give it).

    Args:
        dim: D.
        num_layers: blocks.
        num_heads: heads.
        codebook_size: V.
        codebook_dim: C of the codes.
        scales: sides, or (height, width) pairs, of the code grids, coarse to fine; those of the tokenizer.
        autoregressive: whether a scale attends to coarser ones ("use_ar"); else to itself alone.
        text_dim: width of the features of words.
        pooled_dim: P, width of the feature of the whole text.
        text_length: longest caption in words of the text model.
        ffn_dim: hidden width of the feed-forward; ``None`` = 8/3 D gated, 4 D plain.
        swiglu: gated feed-forward, else two layers with GELU.
        rope: rotate by position, else learned positions.
        rope_extent: rows and columns of every scale run from 0 to it.
        rope_base: longest period of the frequencies.
        crop_condition: modulated by the size and crop of a picture, which are constants when pictures are generated.
        norm_eps: of the norm in front of the head.
        drop_path_rate: stochastic depth of the last block, linear from 0.
        class_dropout_prob: must be 0: captions are dropped by whoever encodes them.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _no_split_modules = ("SwittiBlock",)
    gradient_checkpointing = False
    needs_negative = True  # guidance reads the encoded empty text; there is no learned one

    @checked(SWITTI)
    @register_to_config
    def __init__(
        self,
        dim: int = HEAD_DIM * DEPTH,
        num_layers: int = DEPTH,
        num_heads: int = DEPTH,
        codebook_size: int = 4096,
        codebook_dim: int = 32,
        scales: Sequence[int | Sequence[int]] = SCALES_512,
        autoregressive: bool = False,
        text_dim: int = 2048,
        pooled_dim: int = 1280,
        text_length: int = 77,
        ffn_dim: int | None = None,
        swiglu: bool = True,
        rope: bool = True,
        rope_extent: float = 128.0,
        rope_base: float = 10000.0,
        crop_condition: bool = True,
        norm_eps: float = 1e-6,
        drop_path_rate: float = 0.0,
        class_dropout_prob: float = 0.0,
    ) -> None:
        super().__init__()
        self._set_scales(scales)
        self.text = SwittiText(pooled_dim, text_dim, text_length, dim)
        self.word_embed = nn.Linear(codebook_dim, dim)
        self.pos_start = nn.Parameter(torch.empty(1, self.sizes[0], dim))
        self.lvl_embed = nn.Embedding(len(self.sizes), dim)
        if not rope:
            self.pos_1LC = nn.Parameter(torch.empty(1, sum(self.sizes), dim))
        if crop_condition:
            self.crop_embed, self.crop_proj = CropEmbedding(dim), nn.Linear(dim, dim)
        hidden = ffn_dim or (int(8 * dim / 3) if swiglu else 4 * dim)
        rates = torch.linspace(0, drop_path_rate, num_layers, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            SwittiBlock(dim, text_dim, num_heads, hidden, swiglu, crop_condition, rate) for rate in rates
        )
        self.head_nm = HeadNorm(dim, norm_eps)
        self.head = nn.Linear(dim, codebook_size)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self, gate_scale: float = 1e-3) -> None:
        """Draw weights as VAR does: truncated normal, small head, nearly closed gates."""
        c = self.config
        std = (1 / c.dim / 3) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_start, std=std)
        if not c.rope:
            nn.init.trunc_normal_(self.pos_1LC, std=std)
        self.head.weight.mul_(0.02)
        for block in self.blocks:
            block.ada_lin[1].weight[2 * c.dim :].mul_(0.5)  # type: ignore[index,union-attr]
            block.ada_lin[1].weight[: 2 * c.dim].mul_(gate_scale)  # type: ignore[index,union-attr]

    @classmethod
    def from_size(cls, size: str, **config: Any) -> SwittiTransformer:
        """Build a published size with random weights: "512", "512-ar", "1024" or "1024-ar"."""
        return cls(**{**switti_size_config(size), **config})

    @classmethod
    def from_original(cls, checkpoint: Any, **config: Any) -> SwittiTransformer:
        """Load an official checkpoint strictly; the stored mask and level numbers are not needed and not kept.

        Args:
            checkpoint: file, folder, or state dict.
            config: what shapes cannot tell: ``autoregressive`` where the file has no mask, ``num_heads`` of unpublished widths.
                The entries of the authors' ``config.json`` may be passed as they are; anything overrides what the shapes tell.

        Raises:
            ValueError: missing or extra keys, wrong shapes, another family or number of scales.
        """
        return load_family(
            cls,
            checkpoint,
            from_hub_config(config),
            infer_switti_config,
            family="switti",
            ignore=BUFFERS,
            rename=to_native,
        )

    @property
    def sees_coarser(self) -> bool:  # type: ignore[override]
        """Whether scales attend to coarser ones, over a cache."""
        return bool(self.config.autoregressive)

    @property
    def codebook_size(self) -> int:
        """Codes of the codebook, V."""
        return int(self.config.codebook_size)

    def _set_scales(self, scales: Any) -> None:
        learned = not self.config.rope
        super()._set_scales(scales)
        if learned and hasattr(self, "pos_1LC") and sum(self.sizes) > self.pos_1LC.shape[1]:
            raise ValueError(
                f"this model has {self.pos_1LC.shape[1]} learned positions, the scales need {sum(self.sizes)}"
            )

    def _rope(self) -> Tensor | None:
        c = self.config
        return rope_rows(self.scales, c.dim // c.num_heads, c.rope_extent, c.rope_base) if c.rope else None

    def crop_vector(self, crop: Tensor) -> Tensor:
        """``[R, 4]`` height, width, top and left of crops to ``[R, D]``."""
        return self.crop_proj(self.crop_embed(crop).to(compute_dtype(self.crop_proj)))

    def _rows(self, pooled: Tensor) -> list[Tensor]:
        crop = self.crop_vector(pooled.new_tensor([CROP], dtype=torch.float32)) if self.config.crop_condition else None
        return [block.modulate(pooled, crop) for block in self.blocks]  # type: ignore[operator]

    def _embed(self, condition: ScaleCondition, features: Tensor | None, first: int) -> Tensor:
        x = super()._embed(condition, features, first)
        if self.config.rope:
            return x
        offset = sum(condition.sizes[:first])
        positions = self.pos_1LC[:, offset : offset + x.shape[1]]
        return x + positions
