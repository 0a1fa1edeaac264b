"""VAR's transformer over scales of codes (Tian et al., 2024, arXiv:2404.02905).

All codes of a scale are predicted at once from the coarser scales: the input of a position is not a code but the picture so
far, shrunk to its scale (``MultiScaleVQTokenizer.scale_inputs``). Parameter names are those of the official checkpoints;
attribute conditions are an addition of this library.

Letters: B images, G guidance branches, R = G * B rows, branch-major, K scales, n_k codes of scale k, L all codes,
T condition positions, V codes of the codebook, C code channels, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vargen.backbones.decoding.scale import ScaleBackbone, ScaleCondition
from vargen.backbones.layers.cache.kv_cache import Attend, attention
from vargen.backbones.layers.conditions import AttributeEmbedding, LabelEmbedding, drop_condition
from vargen.backbones.settings.discrete import VAR
from vargen.backbones.var.layers import HeadNorm, VARBlock, modulation
from vargen.backbones.var.sizes import BUFFERS, SCALES_256, infer_var_config, var_size_config
from vargen.checkpoints.reader import load_family
from vargen.hooks import compute_dtype
from vargen.validation.checks import checked, pair_of
from vargen.validation.folders import Stored

FIRST_SHARPNESS = 1.0  # logarithm: the spread of features around their mean is about exp(-1)


class VARTransformer(ScaleBackbone, Stored, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Block-causal transformer: condition, then scale after scale, each predicted in one forward pass.

    Args:
        dim: D.
        num_layers: blocks.
        num_heads: heads.
        codebook_size: V.
        codebook_dim: C.
        scales: sides, or (height, width) pairs, of the code grids, coarse to fine; those of the tokenizer.
        condition_type: ``"class"`` (published) or ``"attributes"``: their sum takes the place of the class embedding and
            each attribute is a position of its own in front of the first scale.
        num_classes: labels without the null label ("class").
        num_condition_tokens: T, the number of slots ("attributes").
        num_attributes: attribute ids, 0 = unspecified included ("attributes").
        mlp_ratio: hidden width of the feed-forward in units of D.
        norm_eps: of the layer norms.
        shared_aln: one modulation for all blocks, corrected by a table in each (published for d36).
        attn_l2_norm: unit queries and keys with a learned scale.
        drop_path_rate: stochastic depth of the last block, linear from 0.
        class_dropout_prob: probability of training a sample without its condition.
        attribute_dropout_prob: mean rate of unspecifying single attributes in training.
        codebook_head: the head also guesses the features of the picture at a position and how sure it is; the codes near
            to what the guess and the input differ by gain in proportion. The tokenizer looks codes up in this very way, so
            a small model has it easier than with a free row for each code. Not in published models.
        residual: of the tokenizer, read with ``codebook_head``: codes stand for what the input of a position lacks.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _no_split_modules = ("VARBlock",)
    gradient_checkpointing = False

    @checked(VAR)
    @register_to_config
    def __init__(
        self,
        dim: int = 1024,
        num_layers: int = 16,
        num_heads: int = 16,
        codebook_size: int = 4096,
        codebook_dim: int = 32,
        scales: Sequence[int | Sequence[int]] = SCALES_256,
        condition_type: Literal["class", "attributes"] = "class",
        num_classes: int = 1000,
        num_condition_tokens: int = 0,
        num_attributes: int = 0,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        shared_aln: bool = False,
        attn_l2_norm: bool = True,
        drop_path_rate: float = 0.0,
        class_dropout_prob: float = 0.1,
        attribute_dropout_prob: float = 0.0,
        codebook_head: bool = False,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.scales = tuple(map(pair_of, scales))  # type: ignore[arg-type]  # checked: a side or a pair
        self.sizes = [h * w for h, w in self.scales]  # n_k
        self.word_embed = nn.Linear(codebook_dim, dim)
        if condition_type == "class":
            self.class_emb = LabelEmbedding(num_classes, dim)
        else:
            self.attribute_emb = AttributeEmbedding(num_attributes, num_condition_tokens, dim)
        self.pos_start = nn.Parameter(torch.empty(1, self.sizes[0], dim))
        self.pos_1LC = nn.Parameter(torch.empty(1, sum(self.sizes), dim))
        self.lvl_embed = nn.Embedding(len(self.sizes), dim)
        levels = torch.cat([torch.full((n,), k) for k, n in enumerate(self.sizes)])
        self.register_buffer("lvl_1L", levels[None], persistent=False)
        self.shared_ada_lin = modulation(dim, 6) if shared_aln else None
        hidden = round(dim * mlp_ratio)
        rates = torch.linspace(0, drop_path_rate, num_layers, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            VARBlock(dim, num_heads, hidden, norm_eps, shared_aln, attn_l2_norm, rate) for rate in rates
        )
        self.head_nm = HeadNorm(dim, norm_eps)
        self.head = nn.Linear(dim, codebook_size)
        if codebook_head:
            self.guess = nn.Linear(dim, codebook_dim + 1)  # features, and the logarithm of the inverse variance
            self.register_buffer("code_vectors", torch.zeros(codebook_size, codebook_dim))
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self, gate_scale: float = 1e-3) -> None:
        """Draw weights as the official training does: truncated normal, small head, nearly closed gates."""
        c = self.config
        std = (1 / c.dim / 3) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(table, std=std)
        self.head.weight.mul_(0.02)
        self.head_nm.ada_lin[1].weight.mul_(0.5)  # type: ignore[operator]
        tables = [block.ada_lin for block in self.blocks if hasattr(block, "ada_lin")]
        for ada in [*tables, *([] if self.shared_ada_lin is None else [self.shared_ada_lin])]:
            ada[1].weight[2 * c.dim :].mul_(0.5)  # type: ignore[index,union-attr]
            ada[1].weight[: 2 * c.dim].mul_(gate_scale)  # type: ignore[index,union-attr]
        if c.codebook_head:
            self.guess.weight.zero_()
            self.guess.bias.zero_()
            self.guess.bias[-1] = FIRST_SHARPNESS
        for block in self.blocks:
            for layer in (block.attn.proj, block.ffn.fc2):  # type: ignore[union-attr]
                layer.weight.div_((2 * c.num_layers) ** 0.5)  # type: ignore[union-attr,operator]
            if hasattr(block, "ada_gss"):
                block.ada_gss[:, :, 2:].mul_(0.5)  # type: ignore[index,operator]
                block.ada_gss[:, :, :2].mul_(gate_scale)  # type: ignore[index,operator]

    @torch.no_grad()
    def set_codebook_(self, codebook: Tensor) -> None:
        """Tell a model with ``codebook_head`` the code vectors [V, C] of its tokenizer."""
        self.code_vectors.copy_(codebook)

    @classmethod
    def from_size(cls, size: str, **config: Any) -> VARTransformer:
        """Build a published size with random weights: "d12" (unpublished weights), "d16", "d20", "d24", "d30" or "d36"."""
        return cls(**{**var_size_config(size), **config})

    @classmethod
    def from_original(cls, checkpoint: Any, **config: Any) -> VARTransformer:
        """Load an official checkpoint strictly.

        Files with and without the buffers (masks, level numbers) are accepted.

        Args:
            checkpoint: path or state dict, plain or a training container.
            config: ``scales`` where the file lacks ``lvl_1L``, ``num_heads`` where there are neither attention scales nor
                a published width; anything else overrides what the shapes tell.
        """
        model = load_family(cls, checkpoint, config, infer_var_config, family="var", ignore=BUFFERS)
        model.reset_buffers()
        return model

    def reset_buffers(self) -> None:
        """Make the buffers that checkpoints need not hold, on the device of the weights."""
        device = self.pos_1LC.device
        levels = torch.cat([torch.full((n,), k, device="cpu") for k, n in enumerate(self.sizes)])
        self.lvl_1L = levels[None].to(device)
        for block in self.blocks:
            block.attn.zero_k_bias = torch.zeros_like(block.attn.q_bias, requires_grad=False)  # type: ignore[union-attr,arg-type]

    @property
    def condition_embedding(self) -> LabelEmbedding | AttributeEmbedding:  # type: ignore[override]
        """The table of the condition."""
        return self.class_emb if self.config.condition_type == "class" else self.attribute_emb

    @property
    def codebook_size(self) -> int:
        """Codes of the codebook, V."""
        return self.head.out_features

    @property
    def grid_size(self) -> tuple[int, int]:
        """(height, width) of the last scale."""
        return self.scales[-1]

    def forward(
        self,
        features: Tensor,
        condition: Any,
        *,
        drop: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Predict the codes of every scale from the condition and the coarser scales.

        In training mode conditions are dropped: with ``drop`` as given, else drawn from ``generator`` (or the global one).
        Evaluation mode drops nothing unless ``drop`` is given (the official forward also drops then).

        Args:
            features: [B, L - n_0, C] float32, ``tokenizer.scale_inputs(codes)``; fewer whole scales predict fewer.
            condition: class ids [B], the null id allowed, or attribute ids [B, T].
            drop: [B] bool, True = train without condition; for attributes also [B, T], single slots.
            generator: for the drop decisions only.

        Returns:
            [B, L, V] float32 logits.
        """
        embedding = self.condition_embedding
        checked = embedding.check(condition, values=False)
        checked = drop_condition(embedding, checked, self.config, drop, generator, training=self.training)
        prepared = self._condition([checked])
        x = self._embed(prepared, features, 0)
        stamps = self._stamps(prepared, 0, self._num_scales(prepared, features, 0))
        attend = partial(attention, mask=stamps <= stamps[:, None])
        return self._score(self._run(x, prepared, [attend] * len(self.blocks)), prepared, features)

    def _condition(self, parts: Sequence[Tensor]) -> ScaleCondition:
        ids = torch.cat(list(parts))
        if self.config.condition_type == "class":
            vector, tokens = self.class_emb(ids), None
        else:
            vector = self.attribute_emb.embedding_table(ids).sum(1) / ids.shape[1] ** 0.5
            tokens = self.attribute_emb(ids)
        shared = None
        if self.shared_ada_lin is not None:
            shared = rearrange(self.shared_ada_lin(vector), "r (n d) -> r 1 n d", n=6)
        rows = [block.modulate(vector, shared) for block in self.blocks]  # type: ignore[operator]
        start = vector[:, None] + self.pos_start
        batch, sizes = len(ids) // len(parts), tuple(self.sizes)
        return ScaleCondition(start, tokens, rows, self.head_nm.modulate(vector), batch, len(parts), sizes)

    def _embed(self, condition: ScaleCondition, features: Tensor | None, first: int) -> Tensor:
        """Inputs ``[R, w, D]`` of the scales from ``first`` on, condition positions in front of the very first."""
        parts = [] if features is None else [self.word_embed(features.to(compute_dtype(self.word_embed)))]
        if first == 0:
            parts.insert(0, condition.start)
        x = torch.cat(parts, dim=1)
        offset = sum(self.sizes[:first])
        index = slice(offset, offset + x.shape[1])
        x = x + (self.lvl_embed(self.lvl_1L[:, index]) + self.pos_1LC[:, index])
        return x if first > 0 or condition.tokens is None else torch.cat([condition.tokens, x], dim=1)

    def _run(self, x: Tensor, condition: ScaleCondition, attends: Sequence[Attend], first: int = 0) -> Tensor:
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block, rows, attend in zip(self.blocks, condition.rows, attends, strict=True):
            x = checkpoint(block, x, rows, attend, use_reentrant=False) if recompute else block(x, rows, attend)
        return x

    def _score(self, x: Tensor, condition: ScaleCondition, features: Tensor | None, first: int = 0) -> Tensor:
        if first == 0 and condition.tokens is not None:
            x = x[:, condition.tokens.shape[1] :]
        h = self.head_nm(x, condition.head_rows)
        h = h.to(compute_dtype(self.head))
        if not self.config.codebook_head:
            return self.head(h).float()
        guess, sharpness = self.guess(h).split([self.config.codebook_dim, 1], dim=-1)
        if features is not None and self.config.residual:  # the first scale has no input: everything is missing
            guess = guess - F.pad(features.to(guess.dtype), (0, 0, guess.shape[1] - features.shape[1], 0))
        sharpness = sharpness.exp()
        # sharpness * (guess e - e^2 / 2), added to the free head
        codes = self.code_vectors.to(h.dtype)
        near = torch.cat([codes, codes.square().sum(-1, keepdim=True) / -2], dim=1)
        return (self.head(h) + F.linear(torch.cat([sharpness * guess, sharpness], dim=-1), near)).float()
