"""Decode schedules: which codes of a grid each forward pass draws, from which items, and who sees whom.

One data model covers raster, next-block (NBP), neighboring (NAR), parallel groups (PAR), any-order (RandAR, ARPG, LPD)
and masked decoding (MaskGIT). The mask rule is the cache's: an item sees a slot iff the stamp written there is not later
than its view. Running a schedule is in samplers/schedule/decoder.py.

Letters: N codes, T condition positions, w items and g targets of a step, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from vargen.protocols import Item, Step
from vargen.samplers.schedule.builders import ScheduleBuilders

WEIGHT_TOLERANCE = 1e-5  # on the sum of a target's weights: thirds do not add up exactly


@dataclass(frozen=True)
class DecodeSchedule(ScheduleBuilders):
    """A fixed sequence of forward passes; make one with a builder such as ``DecodeSchedule.nar2d((16, 16))``.

    Example:
        >>> schedule = DecodeSchedule.nar2d((16, 16))
        >>> schedule.num_forwards, schedule.group_sizes[:4]
        (31, (1, 2, 3, 4))
    """

    kind: str  # the builder's name; backbones say which kinds they were trained for
    grid_size: tuple[int, ...]
    num_condition: int  # T
    num_slots: int  # cache slots; 0 = no cache, every pass recomputes everything
    steps: tuple[Step, ...]
    group_size: int = 1  # M of "par" and of blocks
    prefix: int = 0  # codes that must be given beforehand, the first ones in raster order
    revising: bool = False  # every pass scores all codes and the sampler decides which to keep (MaskGIT)

    @property
    def num_codes(self) -> int:
        """N."""
        return math.prod(self.grid_size)

    @property
    def num_forwards(self) -> int:
        """Forward passes, at most."""
        return len(self.steps)

    @cached_property
    def group_sizes(self) -> tuple[int, ...]:
        """g of every step."""
        return tuple(len(step.targets) for step in self.steps)

    @cached_property
    def order(self) -> Tensor:
        """[N - prefix] raster position of the k-th code drawn."""
        return torch.cat([step.targets for step in self.steps[: 1 if self.revising else None]])

    def inverse(self) -> Tensor:
        """[N] number of each raster position in the order, -1 for the prefix."""
        places = torch.full((self.num_codes,), -1)
        places[self.order] = torch.arange(len(self.order))
        return places

    def to(self, device: torch.device | str) -> DecodeSchedule:
        """The schedule with its tensors on a device."""
        if self.steps[0].slots.device == torch.device(device):
            return self
        moved: dict[int, Step] = {}
        for step in self.steps:
            if id(step) not in moved:
                tensors = {f.name: getattr(step, f.name) for f in fields(step)}
                places = {name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)}
                moved[id(step)] = replace(step, **places)  # type: ignore[arg-type]
        return replace(self, steps=tuple(moved[id(step)] for step in self.steps))

    def validate(self) -> None:
        """Raise ``ValueError`` (one line: step, what is wrong) unless every code is drawn once and only from what is known."""
        if not self.steps:
            raise ValueError(f"schedule {self.kind!r} has no steps")
        drawn = torch.arange(self.num_codes) < self.prefix
        stamped: dict[int, int] = {}  # slot -> stamp of what stays there
        latest = -1
        for number, step in enumerate(self.steps):
            self._check_shapes(number, step)
            self._check_items(number, step, drawn)
            latest = self._check_slots(number, step, stamped, latest)
            again = step.targets[drawn[step.targets]].tolist()
            if (again and not self.revising) or len(step.targets.unique()) < len(step.targets):
                self._refuse(number, f"draws code {again[0] if again else 'positions'} twice")
            drawn[step.targets] = True
        if not bool(drawn.all()):
            raise ValueError(
                f"schedule {self.kind!r} never draws code {int((~drawn).nonzero()[0])}; every position needs a step"
            )
        first = self.steps[0]
        conditions = first.index[first.kinds == Item.CONDITION]
        if sorted(conditions.tolist()) != list(range(self.num_condition)):
            self._refuse(0, f"must hold all {self.num_condition} condition positions, it holds {len(conditions)}")

    def _refuse(self, number: int, what: str) -> None:
        raise ValueError(f"schedule {self.kind!r}, step {number}: {what}")

    def _check_shapes(self, number: int, step: Step) -> None:
        width = len(step.kinds)
        for name in ("index", "slots", "tau", "nu", "commit"):
            if getattr(step, name).shape != (width,):
                self._refuse(number, f"{name} must have {width} entries, got {tuple(getattr(step, name).shape)}")
        if step.mix.ndim != 3 or step.mix.shape[1:] != (len(step.targets), width):
            wanted = f"[heads, {len(step.targets)}, {width}]"
            self._refuse(number, f"mix must have shape {wanted}, got {tuple(step.mix.shape)}")
        off = (step.mix.sum((0, 2)) - 1).abs() > WEIGHT_TOLERANCE
        if bool(off.any()):
            self._refuse(number, f"the weights of code {int(step.targets[off][0])} do not sum to 1")
        if len(step.targets) == 0 or int(step.targets.min()) < 0 or int(step.targets.max()) >= self.num_codes:
            self._refuse(number, f"targets must lie in 0..{self.num_codes - 1} and be at least one")

    def _check_items(self, number: int, step: Step, drawn: Tensor) -> None:
        if int(step.kinds.min()) < 0 or int(step.kinds.max()) > max(Item):
            self._refuse(number, f"kinds must lie in 0..{int(max(Item))}")
        for kind, _, index in step.parts:
            limit = {Item.CONDITION: self.num_condition, Item.CODE: self.num_codes, Item.QUERY: self.num_codes}
            if int(index.min()) < 0 or int(index.max()) >= limit.get(kind, int(index.max()) + 1):
                self._refuse(number, f"{kind.name.lower()} items must lie in 0..{limit[kind] - 1}")
            if kind == Item.CODE and not self.revising and not bool(drawn[index].all()):
                self._refuse(number, f"reads code {int(index[~drawn[index]][0])}, which is not drawn yet")

    def _check_slots(self, number: int, step: Step, stamped: dict[int, int], latest: int) -> int:
        if self.num_slots == 0:
            if bool((step.slots >= 0).any()):
                self._refuse(number, "writes slots, but the schedule has no cache (num_slots=0)")
            return latest
        kept = step.commit & (step.slots >= 0)
        slots, tau = step.slots[kept].tolist(), step.tau[kept].tolist()
        if int(step.slots.max()) >= self.num_slots:
            self._refuse(number, f"slot {int(step.slots.max())} is outside 0..{self.num_slots - 1}")
        written = step.slots[step.slots >= 0].tolist()
        twice = [s for s in written if s in stamped] or (len(set(written)) < len(written) and written)
        if twice:
            self._refuse(number, f"slot {twice[0]} is written twice; a slot keeps what was committed to it")
        if bool((step.nu < step.tau)[step.slots >= 0].any()):
            self._refuse(number, "an item does not see its own stamp (nu < tau)")
        if tau and min(tau) < latest:
            self._refuse(number, f"stamp {min(tau)} is earlier than {latest}, which an earlier step committed")
        stamped.update(zip(slots, tau, strict=True))
        return max([latest, *tau])
