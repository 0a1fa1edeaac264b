"""LlamaGen's transformer over raster codes (Sun et al., 2024, arXiv:2406.06525).

The parameter names are those of the official checkpoints. Weights are published for class labels (ImageNet) and captions
(FLAN-T5 features); attribute slots are an addition of this library.

Letters: B images, N codes of the grid, T condition positions, V codes of the codebook, D width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.backbones.decoding.window import WindowBackbone
from vargen.backbones.layers.conditions import AttributeEmbedding, CaptionEmbedding, ClassEmbedding, ConditionEmbedding
from vargen.backbones.layers.rope import constant_rows, grid_table
from vargen.backbones.layers.transformer import RMSNorm, TransformerBlock
from vargen.backbones.llamagen.sizes import RECOMPUTED, infer_config, size_config, swiglu_dim
from vargen.backbones.settings.discrete import LLAMAGEN
from vargen.checkpoints.bounds import check_given
from vargen.checkpoints.reader import check_family, load_original, load_strict
from vargen.validation.checks import checked
from vargen.validation.folders import Stored

ConditionType = Literal["class", "caption", "attributes"]
FAMILIES = ("llamagen-c2i", "llamagen-t2i")


class LlamaGenTransformer(WindowBackbone, Stored, ModelMixin, ConfigMixin):  # type: ignore[misc]
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

    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _no_split_modules = ("TransformerBlock",)
    _repeated_blocks = ("TransformerBlock",)  # what ``compile_repeated_blocks`` compiles, once for all of them

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
        num_kv_heads = num_kv_heads or num_heads
        self.grid_size = grid_size
        self.cls_embedding = self._condition_embedding(condition_type)
        self.tok_embeddings = nn.Embedding(codebook_size, dim)
        self.tok_dropout = nn.Dropout(token_dropout_p)
        drops = (0.0, 0.0) if drop_path_rate > 0 else (resid_dropout_p, ffn_dropout_p)
        ffn_dim = ffn_dim or swiglu_dim(dim, multiple_of, ffn_dim_multiplier)
        paths = torch.linspace(0, drop_path_rate, num_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(
            TransformerBlock(dim, num_heads, num_kv_heads, ffn_dim, norm_eps, *drops, path) for path in paths
        )
        self.norm = RMSNorm(dim, norm_eps)
        self.output = nn.Linear(dim, codebook_size, bias=False)
        self._rope: dict[torch.device, Tensor] = {}  # not buffers: they stay float32 when the weights are halved
        self.initialize_weights()

    def _condition_embedding(self, condition_type: str) -> ConditionEmbedding:
        c = self.config
        if condition_type == "class":
            return ClassEmbedding(c.num_classes, c.dim, c.class_dropout_prob)
        if condition_type == "caption":
            return CaptionEmbedding(c.caption_dim, c.dim, c.num_condition_tokens)
        return AttributeEmbedding(c.num_attributes, c.num_condition_tokens, c.dim)

    def initialize_weights(self) -> None:
        """Draw linear and embedding weights from N(0, 0.02); the head starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    @classmethod
    def from_size(cls, size: str, **config: Any) -> LlamaGenTransformer:
        """Build a published size with random weights: "B", "L", "XL", "XXL", "XXXL", "1B", "3B" or "7B"."""
        return cls(**{**size_config(size), **config})

    @classmethod
    def from_original(cls, checkpoint: Any, **config: Any) -> LlamaGenTransformer:
        """Load an official checkpoint strictly.

        Args:
            checkpoint: path or state dict, any of the published containers.
            config: ``grid_size`` always, ``num_heads`` unless width and depth are those of a published size; anything
                else overrides what the shapes tell.
        """
        config = check_given(cls, config)
        state_dict = load_original(checkpoint)
        check_family(state_dict, FAMILIES)
        config = infer_config(state_dict, config)
        with torch.device("meta"):  # the checkpoint's own tensors take the places: no second copy, no random draws
            model = cls(**config)
        load_strict(model, state_dict, family=FAMILIES, ignore=RECOMPUTED)
        return model.eval()

    def rope_table(self) -> Tensor:
        """[T + N + 1, d / 2, 2]: condition rows, the grid, and a NULL row that equals the condition's."""
        device = self.tok_embeddings.weight.device
        if device not in self._rope:
            c = self.config
            head_dim = c.dim // c.num_heads
            with torch.inference_mode(False):  # training may follow, which cannot save an inference tensor
                condition = constant_rows(self.num_condition_tokens, head_dim, c.condition_rope)
                grid = grid_table(self.grid_size, head_dim, c.rope_base)
                self._rope[device] = torch.cat([condition, grid, condition[:1]]).to(device)
        return self._rope[device]

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
        condition = self.cls_embedding.check(condition, values=False)
        condition = self._drop_condition(condition, len(codes), drop, generator)
        x = torch.cat([self.cls_embedding(condition), self.embed(codes[:, :-1])], dim=1)
        index = torch.arange(x.shape[1], device=x.device)
        mask = self._training_mask(self.cls_embedding.mask(condition), x.shape[1])
        h = self.forward_full(self.tok_dropout(x), positions=index, mask=mask, is_causal=mask is None)
        h = self.norm(h[:, self.num_condition_tokens - 1 :])
        logits = self.output(h).float()
        return (logits, h) if hidden else logits

    def _drop_condition(
        self, condition: Any, batch: int, drop: Tensor | None, generator: torch.Generator | None
    ) -> Any:
        embedding, c = self.cls_embedding, self.config
        device = self.tok_embeddings.weight.device
        if drop is not None:
            return embedding.drop(condition, drop.to(device))
        if not self.training:
            return condition
        if c.attribute_dropout_prob > 0 and isinstance(embedding, AttributeEmbedding):
            slots = embedding.draw_slots(batch, c.attribute_dropout_prob, generator)
            condition = embedding.drop(condition, slots.to(device))
        if c.class_dropout_prob > 0:
            where = device if generator is None else generator.device
            dropped = torch.rand(batch, generator=generator, device=where) < c.class_dropout_prob
            condition = embedding.drop(condition, dropped.to(device))
        return condition

    def _training_mask(self, present: Tensor | None, length: int) -> Tensor | None:
        """Causal order, padded condition columns hidden from everyone but themselves: [B, 1, L, L] bool."""
        if present is None:
            return None
        codes = present.new_ones(len(present), length - present.shape[1])
        columns = torch.cat([present, codes], dim=1)
        causal = torch.ones(length, length, dtype=torch.bool, device=present.device).tril()
        own = torch.eye(length, dtype=torch.bool, device=present.device)
        return ((causal & columns[:, None]) | own)[:, None]
