"""Which noise a decode reads, and which of the readings matter.

Every number of a decode belongs to a (seed, position, stream, iteration). The recorder stands where all of them are made, in
``vargen.random``, counts how often each is read, and can answer single readings with other numbers. A number that is read
twice serves one purpose only if the decode comes out the same when all readings of it but one are answered with other
numbers: the others were thrown away. That needs no knowledge of who reads.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vargen import random
from vargen.random import Stream

SALT = 0x5DEECE66D  # odd: other readings get other seeds


class Number(NamedTuple):
    """What noise is keyed by."""

    seed: int
    position: int
    stream: int
    iteration: int


class Reading(NamedTuple):
    """When a number was read: in which step of the sampler, and how often there before."""

    step: int
    before: int


class Recorder:
    """Counts readings.

    Args:
        changed: answers a reading with another number where it returns True; None changes nothing.
    """

    def __init__(self, changed: Callable[[Number, Reading], bool] | None = None) -> None:
        self.changed, self.step = changed, 0
        self.readings: dict[Number, list[Reading]] = defaultdict(list)
        self.readers: dict[Number, list[str]] = defaultdict(list)

    @property
    def streams(self) -> set[Stream]:
        """Streams that were read."""
        return {Stream(number.stream) for number in self.readings}

    def repeated(self) -> dict[Number, list[Reading]]:
        """Numbers that were read more than once."""
        return {number: found for number, found in self.readings.items() if len(found) > 1}

    def note(self, number: Number, reader: str) -> Reading:
        """Count one reading."""
        found = self.readings[number]
        reading = Reading(self.step, sum(other.step == self.step for other in found))
        found.append(reading)
        self.readers[number].append(reader)
        return reading

    @contextmanager
    def listening(self) -> Iterator[Recorder]:
        """Record what is read inside."""
        lanes, rows = random._lanes, random.GumbelCache.rows

        def recorded(
            seeds: Tensor, positions: Tensor, count: int, stream: int | Tensor, iteration: Tensor | None
        ) -> Iterator[Any]:
            batch, width = positions.shape
            steps = torch.zeros(batch, dtype=torch.int64) if iteration is None else iteration
            parts = (seeds[:, None], positions, torch.as_tensor(stream), steps[:, None])
            flat = [part.expand(batch, width).flatten() for part in parts]
            keys, reader = [Number(*row) for row in zip(*(part.tolist() for part in flat), strict=True)], _reader()
            once = {key: self.note(key, reader) for key in dict.fromkeys(keys)}  # one call, one reading
            salts = [1 + len(self.readings[key]) if self._changes(key, once[key]) else 0 for key in keys]
            other = flat[0] ^ (torch.tensor(salts) * SALT)
            return lanes(other, flat[1][:, None], count, flat[2][:, None], flat[3])

        random._lanes = recorded
        # every look at a row counts, kept or not
        random.GumbelCache.rows = lambda cache, positions: random.gumbel(cache.seeds, positions, cache.num_codes)  # type: ignore[method-assign]
        try:
            yield self
        finally:
            random._lanes, random.GumbelCache.rows = lanes, rows  # type: ignore[method-assign]

    def _changes(self, number: Number, reading: Reading) -> bool:
        return self.changed is not None and self.changed(number, reading)


def _reader() -> str:
    """Who reads: the functions of the library on the way to ``vargen.random``, inner ones first."""
    names, frame = [], sys._getframe(2)
    while frame is not None and len(names) < 3:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("vargen.") and module != random.__name__:
            names.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(names)


def follow(recorder: Recorder, sampler: Any, backbone: Any, condition: Any, **options: Any) -> Tensor:
    """Run a sampler under the recorder; its codes or tokens."""

    def next_step(*_: Any) -> None:
        recorder.step += 1

    with recorder.listening():
        output = sampler.sample(backbone, condition, callback=next_step, **options)
    if output.codes is None:
        return output.latents
    return torch.cat(output.codes, dim=1) if isinstance(output.codes, list) else output.codes
