"""Infinity: text to images, scale after scale, every position a row of bits (Han et al., 2024, arXiv:2412.04431).

The blocks are VAR's with a rotation by position and cross-attention to the caption. A position carries d bits, each with two
logits; there is no codebook. Captions of a batch may have different lengths. Scales are chosen anew for every picture size.

Letters: B images, G guidance branches, R = G * B rows, branch-major, K scales, n_k positions of scale k, L all positions, d bits
of a position, T text positions, C text width, D width, c head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vargen.backbones.decoding.text_scales import TextPair, TextScaleBackbone
from vargen.backbones.infinity.layers import InfinityBlock, TextCondition
from vargen.backbones.infinity.sizes import (
    GRIDS,
    Grid,
    ffn_width,
    infer_infinity_config,
    infinity_size_config,
    reference_of,
    rope_rows,
    scales_for,
    scales_of,
    to_native,
)
from vargen.backbones.settings.discrete import INFINITY
from vargen.backbones.var.layers import HeadNorm, modulation
from vargen.checkpoints.reader import load_family
from vargen.hooks import runs_as_forward
from vargen.validation.checks import checked
from vargen.validation.folders import Stored

RECOMPUTED = ("*.zero_k_bias",)
SCALES_1M = tuple(side for side, _ in GRIDS["1:1"])


class InfinityTransformer(TextScaleBackbone, Stored, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Block-causal transformer: the pooled caption, then scale after scale, each predicted in one forward pass.

    Conditions are captions as ``T5CaptionConditioner`` encodes them: (features ``[B, T, C]``, mask ``[B, T]``). The defaults are
    Infinity-2B.

    Args:
        dim: D.
        num_layers: blocks.
        num_heads: heads.
        num_bits: d, those of the tokenizer (56 = 14 channels of 2 x 2 cells for Infinity-8B).
        scales: sides, or (height, width) pairs, of the grids of positions, coarse to fine; see ``with_scales``.
        position_grid: (height, width) in which rows and columns of all scales are counted; ``None`` is the last grid of the
            official table that the scales begin, and the last of the scales where there is none.
        text_dim: C.
        text_length: longest caption in words of the text model.
        text_pool_heads: heads that pool the caption; ``None`` = one for each 128 of C.
        ffn_dim: hidden width of the feed-forward; ``None`` = 4 D to the nearest multiple of 256.
        max_scales: rows of the table of scales.
        norm_eps: of the layer norms.
        drop_path_rate: stochastic depth of the last block, linear from 0.
        class_dropout_prob: probability of training a sample without its caption.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _no_split_modules = ("InfinityBlock",)
    gradient_checkpointing = False
    codebook_size = 2  # what each bit may be

    @checked(INFINITY)
    @register_to_config
    def __init__(
        self,
        dim: int = 2048,
        num_layers: int = 32,
        num_heads: int = 16,
        num_bits: int = 32,
        scales: Sequence[int | Sequence[int]] = SCALES_1M,
        position_grid: Sequence[int] | None = None,
        text_dim: int = 2048,
        text_length: int = 512,
        text_pool_heads: int | None = None,
        ffn_dim: int | None = None,
        max_scales: int = 15,
        norm_eps: float = 1e-6,
        drop_path_rate: float = 0.0,
        class_dropout_prob: float = 0.1,
    ) -> None:
        super().__init__()
        self._set_scales(scales, position_grid)
        self.text = TextCondition(text_dim, text_length, dim, text_pool_heads or max(1, text_dim // 128))
        self.pos_start = nn.Parameter(torch.empty(1, 1, dim))
        self.word_embed = nn.Linear(num_bits, dim)
        self.lvl_embed = nn.Embedding(max_scales, dim)
        self.shared_ada_lin = modulation(dim, 6)
        rates = torch.linspace(0, drop_path_rate, num_layers, device="cpu").tolist()
        hidden = ffn_dim or ffn_width(dim)
        self.blocks = nn.ModuleList(InfinityBlock(dim, num_heads, hidden, norm_eps, rate) for rate in rates)
        self.head_nm = HeadNorm(dim, norm_eps)
        self.head = nn.Linear(dim, 2 * num_bits)
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
        self.head.weight.mul_(0.02)
        self.shared_ada_lin[1].weight[2 * c.dim :].mul_(0.5)  # type: ignore[index,union-attr]
        self.shared_ada_lin[1].weight[: 2 * c.dim].mul_(gate_scale)  # type: ignore[index,union-attr]
        for block in self.blocks:
            for layer in (block.sa.proj, block.ca.proj, block.ffn.fc2):  # type: ignore[union-attr]
                layer.weight.div_((2 * c.num_layers) ** 0.5)  # type: ignore[union-attr,operator]
            block.ada_gss[:, :, 2:].mul_(0.5)  # type: ignore[index,operator]
            block.ada_gss[:, :, :2].mul_(gate_scale)  # type: ignore[index,operator]

    @classmethod
    def from_size(cls, size: str, **config: Any) -> InfinityTransformer:
        """Build a size with random weights: ``"2b"``, ``"8b"``, or one without published weights, ``"layer12"`` to ``"layer48"``."""
        return cls(**{**infinity_size_config(size), **config})

    @classmethod
    def from_original(cls, checkpoint: Any, **config: Any) -> InfinityTransformer:
        """Load an official checkpoint strictly.

        Args:
            checkpoint: file, folder of shards with their index, or state dict; blocks in chunks or not.
            config: what shapes cannot tell, such as ``scales``; anything else overrides what the shapes tell.

        Raises:
            ValueError: missing shards, missing or extra keys, wrong shapes, another family.
        """
        model = load_family(
            cls, checkpoint, config, infer_infinity_config, family="infinity", ignore=RECOMPUTED, rename=to_native
        )
        for block in model.blocks:  # built without memory: what files need not hold
            block.sa.zero_k_bias = torch.zeros_like(block.sa.q_bias, requires_grad=False)
        return model

    def with_scales(self, scales: Sequence[int | Sequence[int]], position_grid: Sequence[int] | None = None) -> Self:
        """The same model for another picture size: a light view that shares all weights.

        Args:
            scales: sides, or (height, width) pairs, such as those of ``vargen.backbones.infinity.sizes.scales_for``.
            position_grid: as in the constructor.

        Raises:
            ValueError: more scales than the model has levels for.
        """
        view = super().with_scales(scales)
        view._set_scales(view.scales, position_grid)
        return view

    def with_size(
        self,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        pixels: str | None = None,
    ) -> Self:
        """The same model for a picture size of the official tables.

        Args:
            height: pixels, together with
            width: pixels; one alone asks for a square.
            aspect_ratio: height to width instead, such as ``"3:2"``.
            pixels: about how many, with ``aspect_ratio``; ``None`` is ``"1M"``.

        Raises:
            ValueError: both ways at once, or none of the tables' sizes; the known ones are shown.
        """
        if height is None and width is None:
            return self.with_scales(scales_of(aspect_ratio or "1:1", pixels or "1M"))
        if aspect_ratio is not None or pixels is not None:
            raise ValueError("give either height and width or aspect_ratio and pixels, got both")
        tall = width if height is None else height
        return self.with_scales(scales_for(tall, tall if width is None else width))  # type: ignore[arg-type]

    def _set_scales(self, scales: Any, position_grid: Any = None) -> None:
        super()._set_scales(scales)
        self.position_grid: Grid = reference_of(self.scales) if position_grid is None else tuple(position_grid)

    @property
    def num_bits(self) -> int:
        """Bits of a position, d."""
        return int(self.config.num_bits)

    @runs_as_forward
    @torch.no_grad()
    def null_condition(self, num_images: int) -> TextPair:  # type: ignore[override]
        """The learned null caption, as long as captions may be."""
        mask = torch.ones(num_images, self.text.text_length, dtype=torch.bool, device=self.device)
        return self.text.null((torch.empty(0, dtype=self.text.cfg_uncond.dtype), mask))

    def _rows(self, pooled: Tensor) -> list[Tensor]:
        shared = rearrange(self.shared_ada_lin(pooled), "r (n d) -> r 1 n d", n=6)
        return [block.modulate(shared) for block in self.blocks]  # type: ignore[operator]

    def _rope(self) -> Tensor:
        return rope_rows(self.scales, self.position_grid, self.config.dim // self.config.num_heads)
