"""Next-scale models that read captions: what Switti and Infinity share.

Every block attends to the caption, whose keys and values are made once a decode; captions of a batch may have different lengths.
Scales are chosen anew for every picture size.

Letters: B images, G guidance branches, R = G * B rows, branch-major, K scales, n_k positions of scale k, L all positions,
T text positions, H heads, D width, c head width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vargen.backbones.decoding.scale import ScaleBackbone, ScaleCondition, ScaleSession
from vargen.backbones.layers.cache.kv_cache import Attend, attention
from vargen.hooks import compute_dtype
from vargen.protocols import StepOut
from vargen.validation.checks import check_integer, check_scales, pair_of

TextPair = tuple[Tensor, Tensor]
Grid = tuple[int, int]


@dataclass(frozen=True)
class TextScaleCondition(ScaleCondition):
    """Adds the caption, as every block attends to it, and where the positions of all scales lie."""

    text: list[TextPair]  # of every block, keys and values [R, H, T, c]
    text_mask: Tensor  # [R, 1, 1, T] bool, True = a word
    rope: Tensor | None  # [L, 2, c]; None = positions are learned
    mix: tuple[int, Tensor] | None = (
        None  # block behind which hidden states are guided, and how much at each scale [K], on the CPU
    )

    def first_branch(self) -> TextScaleCondition:
        """The conditional rows alone."""
        shared = super().first_branch()
        assert isinstance(shared, TextScaleCondition)
        text = [(key[: self.batch], value[: self.batch]) for key, value in self.text]
        return replace(shared, text=text, text_mask=self.text_mask[: self.batch], mix=None)


class TextScaleBackbone(ScaleBackbone):
    """Mixin: decoding scale by scale from captions.

    The module provides ``text`` (checks, joins, drops and reads captions), ``word_embed``, ``lvl_embed``, ``pos_start``,
    ``blocks``, ``head_nm``, ``head``, and the parts declared below.
    """

    config: Any
    text: Any
    word_embed: nn.Linear
    lvl_embed: nn.Embedding
    pos_start: nn.Parameter
    head_nm: Any
    head: nn.Linear
    scales: tuple[Grid, ...]
    gradient_checkpointing: bool

    def _rows(self, pooled: Tensor) -> list[Tensor]:
        """Modulation ``[6, R, 1, D]`` of every block from the pooled caption ``[R, D]``."""
        raise NotImplementedError

    def _rope(self) -> Tensor | None:
        """Rotations ``[L, 2, c]`` of all positions."""
        raise NotImplementedError

    def _set_scales(self, scales: Any) -> None:
        self.scales = tuple(map(pair_of, scales))
        self.sizes = [h * w for h, w in self.scales]  # n_k

    def with_scales(self, scales: Sequence[int | Sequence[int]]) -> Self:
        """The same model for another picture size: a light view that shares all weights.

        Args:
            scales: sides, or (height, width) pairs, of the grids of positions, coarse to fine.

        Raises:
            ValueError: more scales than the model has levels for.
        """
        listed = check_scales("scales", scales, longest=self.lvl_embed.num_embeddings)
        view = copy.copy(self)
        view._set_scales(listed)
        return view

    @property
    def condition_embedding(self) -> Any:  # type: ignore[override]
        """What reads captions."""
        return self.text

    @property
    def grid_size(self) -> Grid:
        """(height, width) of the last scale."""
        return self.scales[-1]

    @torch.no_grad()
    def prepare(
        self,
        condition: Any,
        *,
        guidance_scale: float | Tensor = 1.0,
        negative: Any = None,
        guidance_layer: int | None = None,
    ) -> ScaleCondition:
        """Check and embed captions; see ``ScaleBackbone.prepare``.

        Args:
            condition: what the conditioner of the model returns, rows [B, ...].
            guidance_scale: 1 = one branch; anything else adds the unconditional branch; with ``guidance_layer`` also [K], one a
                scale.
            negative: a caption for the second branch instead of the null one; its rows may have another length.
            guidance_layer: guide hidden states behind this block (negative from the last) in place of logits: the blocks behind
                it run the mix, and logits come from the conditional branch alone.

        Raises:
            ValueError: captions of a wrong shape or without words, a block that is none of the model's.
        """
        prepared = super().prepare(condition, guidance_scale=guidance_scale, negative=negative)
        if guidance_layer is None or prepared.branches == 1:
            return prepared
        depth = len(self.blocks)
        layer = check_integer("guidance_layer", guidance_layer, low=-depth, high=depth - 1) % depth
        assert isinstance(prepared, TextScaleCondition)
        scales = torch.as_tensor(guidance_scale, dtype=torch.float32, device="cpu").expand(len(prepared.sizes))
        return replace(prepared, mix=(layer, scales))

    def forward(
        self,
        features: Tensor,
        condition: Any,
        *,
        drop: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Predict the tokens of every scale from the caption and the coarser scales.

        In training mode captions are dropped: with ``drop`` as given, else drawn from ``generator`` (or the global one).
        Evaluation mode drops nothing unless ``drop`` is given, and the caller's features are never written to.

        Args:
            features: [B, L - n_0, C] float32, ``tokenizer.scale_inputs(codes)``; fewer whole scales predict fewer.
            condition: as in ``prepare``.
            drop: [B] bool, True = without caption.
            generator: for the drop decisions only.

        Returns:
            [B, L, V] float32 logits; of bits [B, L, 2 d], two a bit: of 0 and of 1.
        """
        caption = self.text.check(condition, values=False)
        if drop is None and self.training and self.config.class_dropout_prob > 0:
            where = caption[-1].device if generator is None else generator.device
            drop = torch.rand(len(caption[-1]), generator=generator, device=where) < self.config.class_dropout_prob
        if drop is not None:
            caption = self.text.drop(caption, drop.to(caption[-1].device))
        prepared = self._condition([caption])
        stamps = self._stamps(prepared, 0, self._num_scales(prepared, features, 0))
        attend = partial(attention, mask=self._sees(stamps))
        x = self._embed(prepared, features, 0)
        return self._score(self._run(x, prepared, [attend] * len(self.blocks)), prepared, features)

    def _condition(self, parts: Sequence[Any]) -> TextScaleCondition:
        joined = join_captions(parts)
        pooled, context = self.text(*joined)
        rope = self._rope()
        return TextScaleCondition(
            start=pooled[:, None] + self.pos_start,
            tokens=None,
            rows=self._rows(pooled),
            head_rows=self.head_nm.modulate(pooled),
            batch=len(pooled) // len(parts),
            branches=len(parts),
            sizes=tuple(self.sizes),
            text=[block.read_text(context) for block in self.blocks],  # type: ignore[union-attr,operator]
            text_mask=joined[-1][:, None, None],
            rope=None if rope is None else rope.to(context.device),
        )

    def _embed(self, condition: ScaleCondition, features: Tensor | None, first: int) -> Tensor:
        """Inputs ``[R, w, D]`` of the scales from ``first`` on."""
        parts = [] if features is None else [self.word_embed(features.to(compute_dtype(self.word_embed)))]
        if first == 0:
            parts.insert(0, condition.start.expand(-1, condition.sizes[0], -1))
        x = torch.cat(parts, dim=1)
        return x + self.lvl_embed(self._stamps(condition, first, self._num_scales(condition, features, first)))

    def _run(
        self,
        x: Tensor,
        condition: TextScaleCondition,  # type: ignore[override]
        attends: Sequence[Attend],
        first: int = 0,
    ) -> Tensor:
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        offset, mask = sum(condition.sizes[:first]), condition.text_mask
        rope = None if condition.rope is None else condition.rope[offset : offset + x.shape[1]]
        layers = zip(self.blocks, condition.rows, attends, condition.text, strict=True)
        for i, (block, rows, attend, text) in enumerate(layers):
            arguments = (x, rows, attend, text, mask, rope)
            x = checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
            if condition.mix is not None and i == condition.mix[0]:
                x = self._mixed(x, condition, first).repeat(2, 1, 1)
        return x

    def _mixed(self, x: Tensor, condition: TextScaleCondition, first: int) -> Tensor:
        """Guided hidden states ``[B, w, D]`` from those of both branches."""
        assert condition.mix is not None
        given, other = x.chunk(2)
        counts = torch.tensor(condition.sizes[first:], device="cpu")
        scale = condition.mix[1][first:].repeat_interleave(counts)[: x.shape[1], None].to(x)
        return other + scale * (given - other)

    def _feed(self, session: ScaleSession, features: Tensor | None) -> StepOut:
        out = super()._feed(session, features)
        mixed = getattr(session.condition, "mix", None) is not None
        return StepOut(out.logits[:1]) if mixed else out

    def _score(self, x: Tensor, condition: ScaleCondition, features: Tensor | None, first: int = 0) -> Tensor:
        h = self.head_nm(x, condition.head_rows)
        return self.head(h.to(compute_dtype(self.head))).float()


def check_words(features: Any, mask: Any, width: int, longest: int, device: torch.device, values: bool) -> TextPair:
    """Return text features ``[B, T, width]`` and their mask ``[B, T]`` bool on a device, or say what is wrong with them.

    ``values=False`` does not look for captions without words: it stops a GPU.
    """
    features, mask = (torch.as_tensor(part, device=device) for part in (features, mask))
    if features.ndim != 3 or features.shape[2] != width or not 1 <= features.shape[1] <= longest:
        allowed = f"[batch, 1..{longest}, {width}]"
        raise ValueError(f"caption features must have shape {allowed}, got {list(features.shape)}")
    if mask.shape != features.shape[:2]:
        raise ValueError(f"caption mask must have shape {list(features.shape[:2])}, got {list(mask.shape)}")
    mask = mask.bool()
    if values and not mask.is_meta and not bool(mask.any(1).all()):
        empty = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"caption {empty} has no words: its mask is False everywhere; even '' has an end token")
    return features, mask


def join_captions(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Captions of all branches as one batch: (features [R, T, C], ..., mask [R, T]), padded to the longest."""
    longest = max(part[-1].shape[1] for part in parts)
    features = [F.pad(part[0], (0, 0, 0, longest - part[0].shape[1])) for part in parts]
    masks = [F.pad(part[-1], (0, longest - part[-1].shape[1])) for part in parts]
    between = (torch.cat(column) for column in zip(*(part[1:-1] for part in parts), strict=True))
    return torch.cat(features), *between, torch.cat(masks)
