"""Running the steps of a decode schedule on the item primitive: what NAR, PAR, any-order and masked models share.

A step lists items (condition positions, codes, learned tokens, queries) and how the logits of its targets mix head
outputs of these items, see ``vargen.protocols.Step``. The schedule and the draws are the sampler's.

Letters: B images, G guidance branches, R = G * B rows, T condition positions, N codes, w items, g targets, H heads,
D width, V codes of the codebook.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from vargen.backbones.decoding.condition import ConditionedBackbone, PreparedCondition, padding_mask
from vargen.backbones.layers.cache.kv_cache import UNWRITTEN, KVCache, Plan
from vargen.hooks import runs_as_forward
from vargen.protocols import Item, Step


@dataclass
class ItemSession:
    """The state of one scheduled decode."""

    condition: PreparedCondition
    cache: KVCache | None  # None where every pass recomputes everything
    padded: bool  # some condition positions are padding: every pass needs a mask

    @property
    def branches(self) -> int:
        """Guidance branches, G."""
        return self.condition.branches


class ScheduledBackbone(ConditionedBackbone):
    """Mixin of backbones that decode by schedules; families with several heads say how these norm and map states."""

    schedules: tuple[str, ...] = ()  # kinds of schedules that the weights were trained for

    @property
    def taps(self) -> tuple[int, ...] | None:
        """Numbers of layers after which the heads read, ascending; None = one head after the last layer."""
        return None

    def head_output(self, head: int, states: Tensor) -> Tensor:
        """Apply the linear map of one head: normalised states [R, g, D] to [R, g, V]."""
        return self.output(states)

    def to_logits(self, outputs: Tensor) -> Tensor:
        """Mixed outputs of the heads to [R, g, V] float32."""
        return outputs.float()

    def head_norm(self, head: int, states: Tensor) -> Tensor:
        """Normalise states [R, w, D] as one head reads them."""
        return self.norm(states)

    def special_embeddings(self, index: Tensor) -> Tensor:
        """Learned tokens: [w] to [w, D]."""
        raise ValueError(f"{type(self).__name__} has no learned tokens")

    def query_embeddings(self, positions: Tensor) -> Tensor:
        """Questions for the codes at ``positions [w]``: [w, D]."""
        raise ValueError(f"{type(self).__name__} has no query tokens")

    def unknown_embedding(self) -> Tensor | None:
        """[D] what stands for a code that is not drawn yet; None where the model knows no such thing."""
        return None

    def check_schedule(self, schedule: Any) -> None:
        """Raise ``ValueError`` unless the weights were trained for this kind of schedule on this grid."""
        if schedule.kind not in self.schedules:
            fitting = ", ".join(self.schedules) or "none"
            raise ValueError(
                f"{type(self).__name__} was not trained for the schedule {schedule.kind!r}; schedules that fit: {fitting}"
            )
        if tuple(schedule.grid_size) != tuple(self.grid_size):
            raise ValueError(
                f"the schedule is for a grid of {tuple(schedule.grid_size)} codes, the model for {tuple(self.grid_size)}"
            )
        if schedule.num_condition != self.num_condition_tokens:
            raise ValueError(
                f"the schedule has {schedule.num_condition} condition positions, the model {self.num_condition_tokens}"
            )

    @runs_as_forward
    @torch.no_grad()
    def begin(self, condition: PreparedCondition, schedule: Any, *, dtype: torch.dtype | None = None) -> ItemSession:
        """Open a decode: check the schedule and make a cache for its slots.

        Args:
            condition: from ``prepare``.
            schedule: a ``DecodeSchedule``.
            dtype: of cached keys and values (None = the model's).
        """
        if self.training:
            raise ValueError("the model is in training mode and its dropout would disturb decoding; call model.eval()")
        self.check_schedule(schedule)
        cache = None
        if schedule.num_slots > 0:
            rows, device = len(condition.embeddings), condition.embeddings.device
            cache = KVCache(rows, schedule.num_slots, len(self.layers), device=device, dtype=dtype)
        return ItemSession(condition, cache, condition.padded)

    @runs_as_forward
    @torch.no_grad()
    def run_items(self, session: ItemSession, step: Step, codes: Tensor) -> Tensor:
        """Run one step.

        Args:
            session: from ``begin``; its cache is written.
            step: on the model's device.
            codes: [B, N] int64 codes so far, -1 where not drawn.

        Returns:
            [G, B, g, V] float32 logits of the step's targets.
        """
        x, positions = self.item_inputs(session.condition, step, codes)
        if session.cache is None:
            states = self.forward_full(x, positions=positions, mask=self._full_mask(session), taps=self.taps)
        else:
            plan = self._plan(session, session.cache, step)
            states = self.forward_items(x, cache=session.cache, plan=plan, positions=positions, taps=self.taps)
            if step.forgotten is not None:
                session.cache.erase(step.forgotten)
        return self.item_logits(states, step).unflatten(0, (session.branches, -1))

    def select(self, session: ItemSession, rows: Tensor) -> None:
        """Keep the images ``rows`` [B'] int64, in this order."""
        old = session.condition
        places = (torch.arange(old.branches, device=rows.device)[:, None] * old.batch + rows).flatten()
        mask = None if old.mask is None else old.mask[places]
        session.condition = PreparedCondition(old.embeddings[places], mask, len(rows), old.branches)
        if session.cache is not None:
            session.cache.select(places)

    def item_inputs(self, condition: PreparedCondition, step: Step, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Embed the items [R, w, D] and name their rows in the rotary table [w], -1 = none."""
        offset, branches = self.num_condition_tokens, condition.branches
        rows = len(condition.embeddings)
        made: list[tuple[Tensor | None, Tensor, Tensor]] = []
        for kind, columns, index in step.parts:
            if kind == Item.CONDITION:
                made.append((columns, condition.embeddings[:, index], index))
            elif kind == Item.CODE:
                made.append((columns, self._embed_codes(codes[:, index]).repeat(branches, 1, 1), offset + index))
            elif kind == Item.SPECIAL:
                made.append((columns, self.special_embeddings(index).expand(rows, -1, -1), index * 0 - 1))
            else:
                made.append((columns, self.query_embeddings(index).expand(rows, -1, -1), offset + index))
        if made[0][0] is None:
            return made[0][1], made[0][2]
        x = condition.embeddings.new_empty(rows, len(step.kinds), condition.embeddings.shape[-1])
        positions = torch.empty_like(step.index)
        for columns, part, place in made:
            x[:, columns], positions[columns] = part.to(x.dtype), place
        return x, positions

    def item_logits(self, states: Tensor, step: Step) -> Tensor:
        """Mix head outputs: states [R, w, D], or [H, R, w, D] with taps, to [R, g, V] float32.

        A head is linear, so states are mixed in front of it.
        """
        outputs = []
        for head in step.heads:
            normed = self.head_norm(head, states if self.taps is None else states[head])
            outputs.append(self.head_output(head, step.mix[head].to(normed.dtype) @ normed))
        return self.to_logits(reduce(torch.add, outputs))

    def _embed_codes(self, codes: Tensor) -> Tensor:
        unknown = self.unknown_embedding()
        if unknown is None:
            return self.embed(codes)
        return torch.where((codes < 0)[..., None], unknown, self.embed(codes.clamp(min=0)))

    def _plan(self, session: ItemSession, cache: KVCache, step: Step) -> Plan:
        if step.start is not None and not session.padded:
            return cache.plan_block(step.start, step.tau)
        tau = step.tau
        if session.padded and any(kind == Item.CONDITION for kind, _, _ in step.parts):
            assert session.condition.mask is not None
            conditions = step.kinds == Item.CONDITION
            held = session.condition.mask[:, torch.where(conditions, step.index, 0)]  # R w
            tau = torch.where(held | ~conditions, tau, UNWRITTEN)
        return cache.plan(step.slots, tau=tau, nu=step.nu)

    def _full_mask(self, session: ItemSession) -> Tensor | None:
        """Padding hidden from everyone but itself: [R, 1, L, L]; None = all see all."""
        if not session.padded:
            return None
        assert session.condition.mask is not None
        return padding_mask(session.condition.mask, self.num_condition_tokens + self.num_codes)
