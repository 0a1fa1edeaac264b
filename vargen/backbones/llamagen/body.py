"""What LlamaGen's transformer shares with the families that stand on it (RandAR, PAR, NAR, masked codes).

Condition, table of codes, blocks and rotary rows, under the names of the official checkpoints (arXiv:2406.06525). A family
adds its heads, and the decoding that its weights were trained for (``vargen.backbones.decoding``).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.backbones.decoding.condition import ConditionedBackbone
from vargen.backbones.layers.conditions import AttributeEmbedding, CaptionEmbedding, ClassEmbedding, ConditionEmbedding
from vargen.backbones.layers.rope import constant_rows, grid_table
from vargen.backbones.layers.tables import DeviceTables
from vargen.backbones.layers.transformer import RMSNorm, TransformerBlock, swiglu_dim
from vargen.backbones.llamagen.sizes import size_config
from vargen.backbones.settings.discrete import LLAMAGEN
from vargen.validation.checks import checked

ConditionType = Literal["class", "caption", "attributes"]


class LlamaGenBody(ConditionedBackbone, nn.Module):
    """Mixin of a ``ModelMixin``: everything below the heads. A family declares its settings in its constructor and calls ``build_body``."""

    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _no_split_modules = ("TransformerBlock",)
    _repeated_blocks = ("TransformerBlock",)  # what ``compile_repeated_blocks`` compiles, once for all of them

    def build_body(self, num_layers: int) -> None:
        """Make so many blocks, and what stands before them, from the settings."""
        c = self.config
        self.grid_size = c.grid_size
        self.cls_embedding = self._condition_embedding()
        self.tok_embeddings = self._code_embedding()
        self.tok_dropout = nn.Dropout(c.token_dropout_p)
        drop_path_rate = c.get("drop_path_rate", 0.0)
        resid, ffn = (0.0, 0.0) if drop_path_rate > 0 else (c.resid_dropout_p, c.ffn_dropout_p)
        ffn_dim = c.ffn_dim or swiglu_dim(c.dim, c.multiple_of, c.get("ffn_dim_multiplier"))
        kv_heads = c.get("num_kv_heads") or c.num_heads
        paths = torch.linspace(0, drop_path_rate, num_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(
            TransformerBlock(c.dim, c.num_heads, kv_heads, ffn_dim, c.norm_eps, resid, ffn, path) for path in paths
        )
        self._rope = DeviceTables()
        self.rope_table(torch.device("cpu"))

    def build_head(self) -> None:
        """Make the one head of LlamaGen, then draw all weights."""
        c = self.config
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output = nn.Linear(c.dim, c.codebook_size, bias=False)
        self.initialize_weights()
        nn.init.zeros_(self.output.weight)

    def _condition_embedding(self) -> ConditionEmbedding:
        c = self.config
        if c.condition_type == "class":
            return ClassEmbedding(c.num_classes, c.dim, c.class_dropout_prob)
        if c.condition_type == "caption":
            return CaptionEmbedding(c.caption_dim, c.dim, c.num_condition_tokens)
        return AttributeEmbedding(c.num_attributes, c.num_condition_tokens, c.dim)

    def _code_embedding(self) -> nn.Embedding:
        return nn.Embedding(self.config.codebook_size, self.config.dim)

    def initialize_weights(self) -> None:
        """Draw linear and embedding weights from N(0, 0.02); heads start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    @classmethod
    def from_size(cls, size: str, **config: Any) -> Any:
        """Build a published size with random weights: "B", "L", "XL", "XXL", "XXXL", "1B", "3B" or "7B"."""
        return cls(**{**size_config(size), **config})

    def rope_table(self, device: torch.device | None = None) -> Tensor | None:
        """[T + N + 1, d / 2, 2]: condition rows, the grid, and a NULL row that equals the condition's."""
        return self._rope.get(self.device if device is None else device, self._rotations)[0]

    def _rotations(self) -> tuple[Tensor, ...]:
        c = self.config
        head_dim = c.dim // c.num_heads
        condition = constant_rows(self.cls_embedding.num_tokens, head_dim, c.condition_rope)
        return (torch.cat([condition, grid_table(self.grid_size, head_dim, c.rope_base), condition[:1]]),)


class OneHeadBody(LlamaGenBody):
    """The body with LlamaGen's own settings and head; the arguments are those of ``LlamaGenTransformer``."""

    @checked(LLAMAGEN)
    @register_to_config
    def __init__(
        self,
        dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        num_kv_heads: int | None = None,
        codebook_size: int = 16384,
        grid_size: tuple[int, int] = (16, 16),
        condition_type: ConditionType = "class",
        num_classes: int = 1000,
        caption_dim: int = 2048,
        num_condition_tokens: int = 120,
        num_attributes: int = 0,
        ffn_dim: int | None = None,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        condition_rope: Literal["zero", "identity"] = "zero",
        token_dropout_p: float = 0.1,
        resid_dropout_p: float = 0.1,
        ffn_dropout_p: float = 0.1,
        drop_path_rate: float = 0.0,
        class_dropout_prob: float = 0.1,
        attribute_dropout_prob: float = 0.0,
    ) -> None:
        super().__init__()
        self.build_body(num_layers)
        self.build_head()
