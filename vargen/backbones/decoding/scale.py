"""The scale session: condition in, scale after scale scored, over the library's one key-value cache.

A slot is stamped with its scale and sees every slot of its own and of coarser scales; condition positions carry -1 and see
one another only. Nothing is ever rolled back.

Letters: B images, G guidance branches, R = G * B rows, branch-major, K scales, n_k codes of scale k, L all codes,
T condition positions, V codes of the codebook, C code channels, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vargen.backbones.layers.cache.kv_cache import Attend, KVCache, attention
from vargen.features import Feature
from vargen.hooks import HookedModel, runs_as_forward
from vargen.protocols import StepOut


@dataclass(frozen=True)
class ScaleCondition:
    """A prepared condition: everything that does not change from scale to scale, conditional branch first."""

    start: Tensor  # [R, n_0, D] input of the first scale, without its position
    tokens: Tensor | None  # [R, T, D] condition positions in front of it
    rows: list[Tensor]  # of every block, [6, R, 1, D]
    head_rows: Tensor  # [2, R, 1, D]
    batch: int
    branches: int
    sizes: tuple[int, ...]  # n_k of this decode, which models of many picture sizes choose anew

    def first_branch(self) -> ScaleCondition:
        """The conditional rows alone."""
        return replace(
            self,
            start=self.start[: self.batch],
            tokens=None if self.tokens is None else self.tokens[: self.batch],
            rows=[table[:, : self.batch] for table in self.rows],
            head_rows=self.head_rows[:, : self.batch],
            branches=1,
        )

    @property
    def lengths(self) -> Tensor:
        """[R] int64 condition positions in the cache."""
        return torch.full((self.batch * self.branches,), self.num_tokens, device=self.start.device)

    @property
    def num_tokens(self) -> int:
        """Condition positions in the cache, of every row."""
        return 0 if self.tokens is None else self.tokens.shape[1]


class ScaleSession:
    """The state of one decode: the cache and how many scales are in it."""

    def __init__(self, cache: KVCache, condition: ScaleCondition) -> None:
        self.cache, self.condition = cache, condition
        self.scale = 0  # scales fed so far
        self.used = 0  # slots written


class ScaleBackbone(HookedModel):
    """Mixin: decoding scale by scale.

    The module provides ``blocks``, ``sizes`` (n_k), ``condition_embedding`` with ``check`` and ``null``, and the parts of its
    forward declared below.
    """

    features = frozenset({Feature.SCALES})
    sees_coarser = True  # whether a scale attends to coarser ones; else to itself alone, without a cache
    blocks: nn.ModuleList
    sizes: list[int]
    condition_embedding: Any
    training: bool
    device: torch.device

    @property
    def num_codes(self) -> int:
        """Codes of all scales together, L."""
        return sum(self.sizes)

    def _condition(self, parts: Sequence[Any]) -> ScaleCondition:
        raise NotImplementedError

    def _embed(self, condition: ScaleCondition, features: Tensor | None, first: int) -> Tensor:
        raise NotImplementedError

    def _run(self, x: Tensor, condition: ScaleCondition, attends: Sequence[Attend], first: int = 0) -> Tensor:
        raise NotImplementedError

    def _score(self, x: Tensor, condition: ScaleCondition, features: Tensor | None, first: int = 0) -> Tensor:
        raise NotImplementedError

    def null_condition(self, num_images: int) -> Tensor:
        """The condition that says nothing, ``[B]`` or ``[B, T]`` int64."""
        embedding = self.condition_embedding
        slots = getattr(embedding, "num_tokens", None)
        blank = torch.zeros(num_images, *([] if slots is None else [slots]), dtype=torch.int64)
        return embedding.null(blank.to(self.device))

    @runs_as_forward
    @torch.no_grad()
    def prepare(self, condition: Any, *, guidance_scale: float | Tensor = 1.0, negative: Any = None) -> ScaleCondition:
        """Check and embed a batch of conditions.

        Args:
            condition: class ids [B], attribute ids [B, T] or captions (features [B, T, C], mask [B, T]), as the model takes.
            guidance_scale: 1 = one branch; anything else adds the unconditional branch.
            negative: a condition for the second branch instead of the null condition; needs guidance.

        What this returned may be given again, to samplers too: it passes unchanged, negative condition and all.
        """
        if isinstance(condition, ScaleCondition):
            return condition
        embedding = self.condition_embedding
        parts = [embedding.check(condition)]
        if bool((torch.as_tensor(guidance_scale) != 1).any()):
            parts.append(embedding.null(parts[0]) if negative is None else embedding.check(negative))
            if _num_rows(parts[1]) != _num_rows(parts[0]):
                raise ValueError("the negative condition must have as many rows as the condition")
        return self._condition(parts)

    @runs_as_forward
    @torch.no_grad()
    def open(
        self, condition: ScaleCondition, *, features: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[ScaleSession, StepOut]:
        """Run the condition and return a session with the logits of the first scale.

        Args:
            condition: from ``prepare``.
            features: [B, n_1 + ..., C] inputs of the next few scales, run in the same pass; their logits follow.
            dtype: dtype of cached keys and values (None = the model's).

        Returns:
            The session and logits [G, B, n_0 + ..., V].
        """
        if self.training:
            raise ValueError("the model is in training mode and its dropout would disturb decoding; call model.eval()")
        count = condition.num_tokens
        rows = condition.start.shape[0]
        cache = KVCache(
            rows, count + sum(condition.sizes), len(self.blocks), device=condition.start.device, dtype=dtype
        )
        session = ScaleSession(cache, condition)
        return session, self._feed(session, features)

    @runs_as_forward
    @torch.no_grad()
    def step(self, session: ScaleSession, features: Tensor) -> StepOut:
        """Score the next scale: its input [B, n_k, C] to logits [G, B, n_k, V]; several scales may be fed at once."""
        return self._feed(session, features)

    @torch.no_grad()
    def drop_guidance(self, session: ScaleSession) -> None:
        """Forget the unconditional branch: the next scales return logits of one branch."""
        c = session.condition
        if c.branches == 1:
            return
        rows = torch.arange(c.batch, device=c.start.device)
        session.cache.select(rows)
        session.condition = c.first_branch()

    def _feed(self, session: ScaleSession, features: Tensor | None) -> StepOut:
        condition = session.condition
        first = session.scale
        num_scales = self._num_scales(condition, features, first)
        if features is not None:
            features = features.repeat(condition.branches, 1, 1)
        x = self._embed(condition, features, first)
        attends = self._attends(session, self._numbers(condition, first, num_scales))
        h = self._run(x, condition, attends, first)
        session.scale, session.used = first + num_scales, session.used + x.shape[1]
        return StepOut(self._score(h, condition, features, first).unflatten(0, (condition.branches, -1)))

    def _attends(self, session: ScaleSession, stamps: Tensor) -> Sequence[Attend]:
        """What attends in every block, for items with these stamps ``[w]`` on the CPU: a GPU is not waited for."""
        if not self.sees_coarser:
            one = bool((stamps == stamps[0]).all())
            mask = None if one else self._sees(stamps).to(session.condition.start.device)
            return [partial(attention, mask=mask)] * len(self.blocks)
        plan = session.cache.plan_block(session.used, stamps)
        return [session.cache.layer(i, plan) for i in range(len(self.blocks))]

    def _sees(self, stamps: Tensor) -> Tensor:
        """``[w, w]`` bool: which items an item attends to."""
        return stamps <= stamps[:, None] if self.sees_coarser else stamps == stamps[:, None]

    def _num_scales(self, condition: ScaleCondition, features: Tensor | None, first: int) -> int:
        """How many scales are fed: the first one has no features."""
        sizes = condition.sizes
        length = 0 if features is None else features.shape[1]
        count, total = (1, 0) if first == 0 else (0, 0)
        while total < length and first + count < len(sizes):
            total += sizes[first + count]
            count += 1
        if total != length or count == 0:
            raise ValueError(
                f"features must hold whole scales of {list(sizes[max(first, 1) :])} positions, got {length} positions"
            )
        return count

    def _stamps(self, condition: ScaleCondition, first: int, num_scales: int) -> Tensor:
        """[w] block number of every item fed, on the model's device."""
        return self._numbers(condition, first, num_scales).to(condition.start.device)

    def _numbers(self, condition: ScaleCondition, first: int, num_scales: int) -> Tensor:
        """[w] block number of every item fed, on the CPU: -1 for condition positions, which only see one another."""
        scales = range(first, first + num_scales)
        chosen = torch.cat([torch.full((condition.sizes[k],), k, device="cpu") for k in scales])
        if first == 0 and condition.tokens is not None:
            chosen = torch.cat([chosen.new_full((condition.tokens.shape[1],), -1), chosen])
        return chosen


def _num_rows(condition: Any) -> int:
    return len(condition[0] if isinstance(condition, tuple) else condition)
