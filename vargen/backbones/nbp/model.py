"""NBP's transformer: code j of a block predicts code j of the next block (Ren et al., 2025, arXiv:2502.07737).

With a condition the first block is drawn code by code, then one pass reads its last code beside learned "middle" tokens,
then follows block by block ("hybrid", the released UCF-101 models). Without one the first frames are given (frame
prediction, the released Kinetics-600 models). Parameter names are the official ones without the leading ``transformer.``.

Letters: B clips, N codes, T condition positions (the last begins the picture), P codes of a block, V codes of the
codebook, D width, L = T + N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.backbones.decoding.condition import PreparedCondition
from vargen.backbones.decoding.schedule import ScheduledBackbone
from vargen.backbones.layers.code_table import CodeTable
from vargen.backbones.layers.conditions import AttributeEmbedding, ClassEmbedding
from vargen.backbones.layers.rope import constant_rows, grid_table
from vargen.backbones.layers.tables import DeviceTables
from vargen.backbones.nbp.layers import Beginning, NBPBlock, NoCondition, TextIds, training_layout
from vargen.backbones.nbp.sizes import infer_nbp_config, nbp_size_config, official_weights
from vargen.backbones.settings.discrete import NBP
from vargen.checkpoints.reader import load_family
from vargen.features import Feature
from vargen.hooks import runs_as_forward
from vargen.orders import block_order
from vargen.validation.checks import checked
from vargen.validation.folders import Stored

NBPConditionType = Literal["text", "none", "class", "attributes"]


class NBPTransformer(ScheduledBackbone, Stored, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Codes of a video block by block.

    The published models read one vocabulary (text, special tokens and codes) that is also what their head predicts; other
    conditions are embedded beside it and their head predicts codes only. Codes above V stand for what is not a code, as
    the official sampler may draw it: V + i is the i-th special token, then text.

    Args:
        dim: D.
        num_layers: blocks.
        num_heads: D / num_heads is a multiple of 6 with ``rope``.
        codebook_size: V.
        grid_size: (frames, height, width) or (height, width) in codes.
        block: sides of a block, which divide the grid: (1, 1, 16) is a row, (1, 16, 16) a frame, (1, 1, 1) next-token.
        condition_type: "text" (ids of the model's vocabulary), "none" (frame prediction), "class" or "attributes".
        num_condition_tokens: positions of the condition without the one that begins the picture ("text", "attributes").
        text_vocabulary: ids of the text tokenizer ("text").
        num_classes: labels without the null label ("class").
        num_attributes: ids, 0 = unspecified included ("attributes").
        max_positions: rows of the position table; None = as many as are needed.
        restrict_head: leave text and special tokens out of the distribution of a code ("text"); the official code does not.
        rope: also rotate queries and keys by the place on the grid.
        code_rank: width of one code table that input and head share through linear maps, for small models.
        dropout_p: on embeddings, behind attention and feed-forward, in training.
        class_dropout_prob: probability of training a sample without its condition.
        attribute_dropout_prob: mean rate of unspecifying single attributes in training.
    """

    features = frozenset({Feature.BLOCKS})
    schedules = ("next_block",)
    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _no_split_modules = ("NBPBlock",)
    _repeated_blocks = ("NBPBlock",)
    uncond_embedding: Tensor

    @checked(NBP)
    @register_to_config
    def __init__(
        self,
        dim: int = 1536,
        num_layers: int = 24,
        num_heads: int = 16,
        codebook_size: int = 64000,
        grid_size: Sequence[int] = (5, 16, 16),
        block: Sequence[int] = (1, 1, 16),
        condition_type: NBPConditionType = "text",
        num_condition_tokens: int = 8,
        text_vocabulary: int = 32000,
        num_classes: int = 101,
        num_attributes: int = 0,
        max_positions: int | None = 5120,
        restrict_head: bool = False,
        rope: bool = False,
        code_rank: int | None = None,
        dropout_p: float = 0.1,
        class_dropout_prob: float = 0.1,
        attribute_dropout_prob: float = 0.0,
    ) -> None:
        super().__init__()
        self.grid_size = tuple(grid_size)  # type: ignore[assignment]
        self.group_size = math.prod(block)  # P
        official = condition_type in ("text", "none")
        special = {"text": self.group_size + text_vocabulary, "none": 0}.get(condition_type, self.group_size)
        self.num_special = special  # rows of the input table in front of the codes
        if code_rank is None:
            self.tok_emb = nn.Embedding(special + codebook_size, dim)
        else:
            self.special_emb = nn.Embedding(special, dim)
            self.tok_emb = CodeTable(codebook_size, code_rank, dim)  # type: ignore[assignment]
        self.cls_embedding = self._condition()
        needed = self.num_condition_tokens + self.num_codes - 1
        self.pos_emb = nn.Parameter(torch.zeros(1, max(max_positions or 0, needed), dim))
        if official:
            rows = num_condition_tokens if condition_type == "text" else 0
            self.register_buffer("uncond_embedding", torch.randn(rows, dim) / dim**0.5)
        self.dropout = nn.Dropout(dropout_p)
        self.blocks = nn.ModuleList(NBPBlock(dim, num_heads, dropout_p) for _ in range(num_layers))
        self.ln_f = nn.LayerNorm(dim)
        width = code_rank or (codebook_size + special if official else codebook_size)
        self.head = nn.Linear(dim, width, bias=False)
        self._tables, self._rope = DeviceTables(), DeviceTables()
        self.make_tables(torch.device("cpu"))
        self.initialize_weights()

    def _condition(self) -> Any:
        c = self.config
        if c.condition_type == "none":
            return NoCondition(self)
        if c.condition_type == "text":
            return Beginning(TextIds(self), self)
        inner: Any = AttributeEmbedding(c.num_attributes, c.num_condition_tokens, c.dim)
        if c.condition_type == "class":
            inner = ClassEmbedding(c.num_classes, c.dim, c.class_dropout_prob)
        self.cond_emb = inner
        return Beginning(inner, self)

    def initialize_weights(self) -> None:
        """Draw weights from N(0, 0.02), biases zero, as minGPT."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.pos_emb, std=0.02)

    @classmethod
    def from_size(cls, size: str, **config: Any) -> NBPTransformer:
        """Build a published size with random weights: "XL" (script name base), "XXL" (xl) or "3B"."""
        return cls(**{**nbp_size_config(size), **config})

    @classmethod
    def from_original(cls, checkpoint: Any, **config: Any) -> NBPTransformer:
        """Load an official checkpoint strictly; the tokenizer inside the published files is left out.

        Args:
            checkpoint: path or state dict, any of the published containers.
            config: ``num_heads`` unless the width is that of a published size, ``codebook_size``, ``grid_size`` and
                ``block`` unless they are those of the published models; anything else overrides what the shapes tell.
        """
        return load_family(cls, checkpoint, config, infer_nbp_config, family="nbp", rename=official_weights)

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        """The blocks, as the item primitive calls them."""
        return self.blocks

    @property
    def needs_frames(self) -> bool:
        """Whether the first block must be given (frame prediction)."""
        return self.config.condition_type == "none"

    def special_rows(self, index: Tensor) -> Tensor:
        """Special tokens ``[w]`` to ``[w, D]``: 0 begins the picture, then P - 1 middle tokens."""
        return (self.tok_emb if self.config.code_rank is None else self.special_emb)(index)

    @runs_as_forward
    def embed(self, codes: Tensor) -> Tensor:
        """Input embeddings of codes, ``[...]`` to ``[..., D]``; V + i is the i-th special token."""
        if self.config.code_rank is not None:
            return self.tok_emb(codes)
        return self.tok_emb(
            torch.where(codes < self.codebook_size, codes + self.num_special, codes - self.codebook_size)
        )

    def special_embeddings(self, index: Tensor) -> Tensor:
        """Middle tokens: [w] to [w, D]."""
        return self.special_rows(1 + index)

    def check_schedule(self, schedule: Any) -> None:
        """Raise ``ValueError`` unless the weights were trained for these blocks."""
        super().check_schedule(schedule)
        order = block_order(self.grid_size, self.config.block)[schedule.prefix :]
        if schedule.group_size != self.group_size or not torch.equal(schedule.order.cpu(), order):
            raise ValueError(
                f"the schedule draws other blocks of {schedule.group_size} codes; the model was trained for blocks of "
                f"{tuple(self.config.block)}"
            )

    def item_inputs(self, condition: PreparedCondition, step: Any, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Embed the items, with the learned position of their place in the sequence."""
        x, positions = super().item_inputs(condition, step, codes)
        return x + self.pos_emb[0, step.slots], positions

    def head_norm(self, head: int, states: Tensor) -> Tensor:
        """Normalise states for the head."""
        return self.ln_f(states)

    def head_output(self, head: int, states: Tensor) -> Tensor:
        """[R, g, D] to logits of the codes, then of special tokens and text where the head has them."""
        c, first = self.config, self.num_special
        if c.code_rank is not None:
            return self.tok_emb(self.head(states), score=True)
        if c.condition_type != "text":
            return self.head(states)
        if c.restrict_head:
            return self.head(states)[..., first:]
        return torch.roll(self.head(states), -first, dims=-1)

    def rope_table(self, device: torch.device | None = None) -> Tensor | None:
        """[T + N + 1, d / 2, 2]: condition rows and the last one turn nothing; None without ``rope``."""
        return (
            self._rope.get(self.device if device is None else device, self._rotations)[0] if self.config.rope else None
        )

    def _rotations(self) -> tuple[Tensor, ...]:
        width = self.config.dim // self.config.num_heads
        null = constant_rows(self.num_condition_tokens + 1, width, "identity")
        return (torch.cat([null[1:], grid_table(self.grid_size, width), null[:1]]),)

    def make_tables(self, device: torch.device) -> None:
        """Make rotations and orders."""
        super().make_tables(device)
        self._order_tables(device)

    def forward(
        self,
        codes: Tensor,
        condition: Any = None,
        *,
        drop: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Predict every code from the condition and the blocks before its own.

        Args:
            codes: [B, N] int64 in raster order.
            condition: as the model takes; None for "none".
            drop: [B] bool, True = train without condition; for attributes also [B, T - 1], single slots.
            generator: of the drops, so that a resumed run draws the same.

        Returns:
            [B, N, V] float32 logits, row p for code p of the raster order; more than V columns where the head also
            predicts text. Without a condition [B, N - P, V]: nothing predicts the first block, row k is for the
            (P + k)-th code in block order.
        """
        given = len(codes) if self.needs_frames else condition
        rows, _ = self.training_condition(codes, given, drop, generator)
        order, stamps, places = self._order_tables(codes.device)
        size, offset = self.group_size, self.num_condition_tokens
        fed = self.embed(codes[:, order[:-size]]) if self.num_codes > size else None
        parts: list[Any] = [rows]
        if self.needs_frames:
            parts.append(fed)
        else:
            # all but the last code of the first block predict their successor, then the middle tokens fill its place
            first = self.embed(codes[:, order[:size]])
            middle = self.special_embeddings(torch.arange(size - 1, device=codes.device)).expand(len(codes), -1, -1)
            parts += [first, middle, fed[:, size:]] if fed is not None else [first[:, :-1]]
        x = torch.cat(parts, dim=1)
        x = self.dropout(x + self.pos_emb[:, : x.shape[1]])
        h = self.forward_full(x, positions=places, mask=stamps <= stamps[:, None])
        logits = self.head_output(0, self.ln_f(h[:, max(offset - 1, 0) :])).float()
        return logits if self.needs_frames else torch.empty_like(logits).index_copy(1, order, logits)

    def _order_tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """[N] raster position of the k-th code; stamps and rotary rows of the training input."""
        return self._tables.get(device, self._orders)  # type: ignore[return-value]

    def _orders(self) -> tuple[Tensor, ...]:
        order = block_order(self.grid_size, self.config.block)
        return order, *training_layout(order, self.group_size, self.num_condition_tokens, self.needs_frames)
