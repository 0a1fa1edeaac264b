"""NAR's transformer: every code is guessed by its nearest neighbors (He et al., 2025, arXiv:2503.10696).

One head for each axis of the grid, each above one more block than the one before it: the first guesses the next code of
the row, the second the code below, the third (video) the code of the next frame. The guesses of all neighbors that exist
are averaged, so a whole anti-diagonal is drawn in one forward pass. Parameter names are those of the official
checkpoints, image and video.

Letters: B images, N codes, T condition positions, V codes of the codebook, D width, H heads (axes), L = T + N, r rank.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.backbones.decoding.condition import padding_mask
from vargen.backbones.decoding.schedule import ScheduledBackbone
from vargen.backbones.layers.code_table import CodeTable
from vargen.backbones.layers.tables import DeviceTables
from vargen.backbones.layers.transformer import RMSNorm
from vargen.backbones.llamagen.body import ConditionType, LlamaGenBody
from vargen.backbones.llamagen.sizes import RECOMPUTED
from vargen.backbones.nar.sizes import infer_nar_config, nar_size_config
from vargen.backbones.settings.discrete import NAR
from vargen.checkpoints.reader import load_family
from vargen.features import Feature
from vargen.orders import neighbors
from vargen.validation.checks import checked
from vargen.validation.folders import Stored

FAMILIES = ("nar", "nar-video")
IMAGE_HEADS = (("norm", "output"), ("medusa_norm", "medusa_output"))  # official names: norm and matrix of each head
VIDEO_HEADS = (("norm_R", "output_R"), ("norm_D", "output_D"), ("norm_B", "output_B"))


class NARTransformer(ScheduledBackbone, LlamaGenBody, Stored, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Codes of a grid from their neighbors; anti-diagonal by anti-diagonal.

    Images (``grid_size=(h, w)``) have rotary positions, videos (``(t, h, w)``) learned ones, as the official models.

    Args:
        num_layers: blocks below the first head; every further head adds one.
        grid_size: (height, width) or (frames, height, width) in codes. The official video model reads 1024 codes of the
            LARP tokenizer as (4, 16, 16).
        code_rank: r, width of one code table that the input and all heads share through linear maps, for small models
            with large codebooks (as in arXiv:1909.11942); None = separate full tables, the official layout.
        dim, num_heads, codebook_size, condition_type, num_classes, caption_dim, num_condition_tokens, num_attributes,
            ffn_dim, multiple_of, rope_base, norm_eps, condition_rope, token_dropout_p, resid_dropout_p, ffn_dropout_p,
            class_dropout_prob, attribute_dropout_prob: as in ``LlamaGenTransformer``.
    """

    features = frozenset({Feature.NEIGHBORS})

    @checked(NAR)
    @register_to_config
    def __init__(
        self,
        dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        codebook_size: int = 16384,
        grid_size: tuple[int, ...] = (16, 16),
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
        code_rank: int | None = None,
    ) -> None:
        super().__init__()
        self.is_video = len(grid_size) == 3
        self.schedules = ("nar3d",) if self.is_video else ("nar2d",)
        self.heads = VIDEO_HEADS if self.is_video else IMAGE_HEADS
        self.build_body(num_layers + len(self.heads) - 1)
        for norm, output in self.heads:
            self.add_module(norm, RMSNorm(dim, norm_eps))
            self.add_module(output, nn.Linear(dim, code_rank or codebook_size, bias=False))
        if self.is_video:
            self.abs_pe = nn.Parameter(torch.zeros(1, self.num_codes + self.num_condition_tokens, dim))
        self._tables = DeviceTables()
        self._order_tables(torch.device("cpu"))
        self.initialize_weights()

    def _code_embedding(self) -> Any:
        c = self.config
        return super()._code_embedding() if c.code_rank is None else CodeTable(c.codebook_size, c.code_rank, c.dim)

    def initialize_weights(self) -> None:
        """Draw weights from N(0, 0.02); the heads start at zero."""
        super().initialize_weights()
        for _, output in self.heads:
            nn.init.zeros_(getattr(self, output).weight)
        if self.is_video:
            nn.init.normal_(self.abs_pe, std=0.02)

    @classmethod
    def from_size(cls, size: str, **config: Any) -> NARTransformer:
        """Build a published size with random weights: "B", "M", "L", "XL", "XXL" and the larger ones of LlamaGen.

        The sizes of the video models are "abs-S", "abs-B", "abs-L", "abs-LP" and "abs-XL".
        """
        return cls(**{**nar_size_config(size), **config})

    @classmethod
    def from_original(cls, checkpoint: Any, **config: Any) -> NARTransformer:
        """Load an official checkpoint strictly; upstream's loader lets missing heads pass.

        Args:
            checkpoint: path or state dict, any of the published containers, image or video.
            config: ``grid_size`` always, ``num_heads`` unless width and depth are those of a published size; anything
                else overrides what the shapes tell.
        """
        return load_family(cls, checkpoint, config, infer_nar_config, family=FAMILIES, ignore=RECOMPUTED)

    @property
    def taps(self) -> tuple[int, ...]:
        """One head above each of the last layers."""
        return tuple(range(len(self.layers) - len(self.heads) + 1, len(self.layers) + 1))

    def head_norm(self, head: int, states: Tensor) -> Tensor:
        """Normalise states as one head reads them."""
        return getattr(self, self.heads[head][0])(states)

    def head_output(self, head: int, states: Tensor) -> Tensor:
        """[R, g, D] to [R, g, V], or [R, g, r] with a shared table."""
        out = getattr(self, self.heads[head][1])(states)
        return out.float() if self.config.code_rank is None else out

    def to_logits(self, outputs: Tensor) -> Tensor:
        """Mixed outputs of the heads to [R, g, V] float32."""
        if self.config.code_rank is not None:
            outputs = self.tok_embeddings(outputs, score=True)
        return outputs.float()

    def rope_table(self, device: torch.device | None = None) -> Tensor | None:
        """As LlamaGen's; None for videos."""
        return None if self.is_video else super().rope_table(device)

    def make_tables(self, device: torch.device) -> None:
        """Make rotations and orders."""
        super().make_tables(device)
        self._order_tables(device)

    def item_inputs(self, condition: Any, step: Any, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Embed the items; videos add learned positions."""
        x, positions = super().item_inputs(condition, step, codes)
        return (x + self.abs_pe[0, positions] if self.is_video else x), positions

    def forward(
        self,
        codes: Tensor,
        condition: Any,
        *,
        drop: Tensor | None = None,
        generator: torch.Generator | None = None,
        parts: bool = False,
    ) -> Tensor:
        """Predict every code from the condition and the codes on nearer diagonals.

        Args:
            codes: [B, N] int64.
            condition: as the model takes: class ids [B], (features [B, T, C], mask [B, T]) or attribute ids [B, T].
            drop: as in ``LlamaGenTransformer.forward``.
            generator: likewise.
            parts: return the logits of each head at the last condition position and all codes instead of their mix.

        Returns:
            [B, N, V] float32 logits, row p for code p; with ``parts`` [H, B, 1 + N, V].
        """
        rows, present = self.training_condition(codes, condition, drop, generator)
        x = torch.cat([rows, self.embed(codes)], dim=1)
        index = torch.arange(x.shape[1], device=x.device)
        order, sources, weights = self._order_tables(x.device)
        mask = padding_mask(present, len(index), order)
        x = self.tok_dropout(x + self.abs_pe if self.is_video else x)
        states = self.forward_full(x, positions=index, mask=mask, taps=self.taps)
        heads = range(len(self.heads))
        if parts:
            shown = states[:, :, self.num_condition_tokens - 1 :]
            return torch.stack([self.to_logits(self.head_output(k, self.head_norm(k, shown[k]))) for k in heads])
        outputs = []
        for k in heads:
            near = self.head_norm(k, states[k])[:, sources[k]] * weights[k, :, None].to(x.dtype)
            outputs.append(self.head_output(k, near))
        return self.to_logits(reduce(torch.add, outputs))

    def _order_tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Proximity mask [L, L] bool; row of the input [H, N] and weight [H, N] with which each head guesses a code."""
        return self._tables.get(device, self._orders)  # type: ignore[return-value]

    def _orders(self) -> tuple[Tensor, ...]:
        offset = self.num_condition_tokens
        cells = torch.cartesian_prod(*[torch.arange(side) for side in self.grid_size]).sum(1)
        # condition rows see only what stands before them; in the official video model all but the first are unused
        stamps = torch.cat([torch.arange(offset), offset + cells])
        positions, weights = neighbors(self.grid_size)
        return stamps <= stamps[:, None], offset + positions, weights
