"""Backbones small enough to know everything about: tables with a token cache, and a flat spatial model.

Their caches hold token ids and are overwritten in place, exactly like a key-value cache with a length pointer, so that
a wrong commit, position, rollback or selection changes the law and does not pass unseen.

Letters: B images, N code positions, V codes, W window, G guidance branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from vargen.protocols import Layout, StepOut


@dataclass
class ToyCondition:
    labels: Tensor  # [B]
    branches: int

    @property
    def batch(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        return torch.ones(self.branches * self.batch, dtype=torch.int64)


@dataclass
class ToySession:
    labels: Tensor  # [B]
    branches: int
    cache: Tensor  # [B, capacity] fed token ids; beyond `length` there is whatever the last windows left behind
    length: Tensor  # [B]
    fed: int = 0  # entries of the last window, 0 once committed

    @property
    def capacity(self) -> int:
        return self.cache.shape[1]


class ToyBackbone:
    """The session protocol over a law ``(labels, branch, cache, slot) -> logits`` given by a subclass."""

    features = frozenset({"window", "ragged"})
    hidden_size = 1
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, codebook_size: int, grid_size: tuple[int, int]) -> None:
        self.codebook_size, self.grid_size = codebook_size, grid_size
        self.num_codes = grid_size[0] * grid_size[1]
        self.num_forwards = 0
        self.num_rows = 0

    def layout(self, height: int | None = None, width: int | None = None) -> Layout:
        return Layout.raster(self.grid_size)

    def prepare(self, condition: Tensor, *, guidance_scale: float = 1.0, negative: None = None) -> ToyCondition:
        return ToyCondition(torch.as_tensor(condition), 1 if guidance_scale == 1 else 2)

    def open(self, condition: ToyCondition, *, max_window: int = 1) -> tuple[ToySession, StepOut]:
        batch = condition.batch
        cache = torch.full((batch, self.layout().length + max_window), -1, dtype=torch.int64)
        session = ToySession(condition.labels, condition.branches, cache, torch.zeros(batch, dtype=torch.int64))
        self.num_forwards += 1
        return session, StepOut(self._score(session, torch.zeros(batch, 1, dtype=torch.int64)))

    def step(self, session: ToySession, codes: Tensor, *, slots=None, mask=None, hidden: bool = False) -> StepOut:
        assert slots is None
        assert mask is None
        batch, width = codes.shape
        assert batch == len(session.length), "the session and the window hold different images"
        place = session.length[:, None] + torch.arange(width)
        assert int(place.max()) < session.capacity, "the window leaves the cache"
        session.cache.scatter_(1, place, codes)
        session.fed = width
        self.num_forwards += 1
        self.num_rows += batch * width
        return StepOut(self._score(session, place + 1))

    def commit(self, session: ToySession, n: int | Tensor, path: None = None) -> None:
        n = torch.as_tensor(n).expand(len(session.length))
        assert bool(((n >= 0) & (n <= session.fed)).all()), "more committed than fed"
        session.length = session.length + n
        session.fed = 0

    def rewind(self, session: ToySession, n: int | Tensor) -> None:
        session.length = session.length - n
        assert bool((session.length >= 0).all()), "more taken back than committed"

    def select(self, session: ToySession, rows: Tensor) -> None:
        session.cache, session.length, session.labels = session.cache[rows], session.length[rows], session.labels[rows]

    def embed(self, codes: Tensor) -> Tensor:
        return codes[..., None].float()

    def _score(self, session: ToySession, slots: Tensor) -> Tensor:
        """Logits ``[G, B, W, V]`` that predict ``slots [B, W]`` from the cache before them."""
        inside = slots.clamp(max=self.layout().length - 1)
        rows = [self.law(session.labels, branch, session.cache, inside) for branch in range(session.branches)]
        logits = torch.stack(rows)
        beyond = (slots > inside)[None, ..., None]  # rows past the end hold nonsense that nobody may read
        return torch.where(beyond, torch.arange(self.codebook_size) * 100.0, logits).float()

    def law(self, labels: Tensor, branch: int, cache: Tensor, slots: Tensor) -> Tensor:
        raise NotImplementedError


class TabularBackbone(ToyBackbone):
    """An independent random law for every class, branch and prefix.

    Args:
        codebook_size: V. grid_size: (h, w). spread: standard deviation of the logits. digits: round logits to so many
            decimals, which makes ties.
    """

    def __init__(
        self, codebook_size: int = 3, grid_size=(1, 4), num_classes: int = 2, *, spread=1.2, digits=None, seed=0
    ) -> None:
        super().__init__(codebook_size, grid_size)
        num_codes = self.num_codes
        generator = torch.Generator().manual_seed(seed)
        self.first = [
            (codebook_size**t - 1) // (codebook_size - 1) for t in range(num_codes)
        ]  # of prefixes of length t
        contexts = (codebook_size**num_codes - 1) // (codebook_size - 1)
        table = torch.randn(num_classes, 2, contexts, codebook_size, generator=generator) * spread
        self.table = table if digits is None else table.mul(10**digits).round() / 10**digits

    def law(self, labels: Tensor, branch: int, cache: Tensor, slots: Tensor) -> Tensor:
        return self.table[labels[:, None], branch, self.context(cache, slots)]

    def context(self, cache: Tensor, slots: Tensor) -> Tensor:
        """Number of the prefix before every slot, ``[B, W]``."""
        number = torch.zeros_like(slots)
        for t in range(self.num_codes):
            number = torch.where(t < slots, number * self.codebook_size + cache[:, t, None].clamp(min=0), number)
        return number + torch.tensor(self.first)[slots]

    def prefixes(self, length: int) -> list[tuple[int, ...]]:
        return list(product(range(self.codebook_size), repeat=length))

    def logits_after(self, label: int, prefix: tuple[int, ...]) -> Tensor:
        """``[2, V]`` logits of both branches after a prefix."""
        number = 0
        for token in prefix:
            number = number * self.codebook_size + token
        return self.table[label, :, self.first[len(prefix)] + number]


class SpatialBackbone(ToyBackbone):
    """A flat law of the left, upper and upper-left neighbours: the synthetic image model of the step counts.

    Codes have random positions in a feature space; a code is likely when it lies in the direction that its neighbours
    point to. With ``top_k=128`` of 256 codes and the default sharpness the laws hold 4.3 nats on average.
    """

    def __init__(
        self, codebook_size: int = 256, grid_size: tuple[int, int] = (16, 16), *, dim: int = 8, sharpness=0.37, seed=0
    ) -> None:
        super().__init__(codebook_size, grid_size)
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(codebook_size, dim, generator=generator)
        self.sharpness = sharpness

    def law(self, labels: Tensor, branch: int, cache: Tensor, slots: Tensor) -> Tensor:
        width = self.grid_size[1]
        inner = slots % width > 0
        pull = torch.zeros(*slots.shape, self.embedding.shape[1])
        for weight, distance, there in (
            (0.6, 1, inner),
            (0.6, width, slots >= width),
            (-0.2, width + 1, inner & (slots >= width)),
        ):
            code = cache.gather(1, (slots - distance).clamp(min=0)).clamp(min=0)
            pull += weight * self.embedding[code] * there[..., None]
        if branch == 1:
            pull = 0.5 * pull
        return self.sharpness * pull @ self.embedding.T


class LinedBackbone(TabularBackbone):
    """The same laws in a stream with an end-of-line slot behind every row, as in Lumina-mGPT or Emu3."""

    def layout(self, height: int | None = None, width: int | None = None) -> Layout:
        height, width = self.grid_size
        slots = torch.arange(height * (width + 1))
        row, column = slots // (width + 1), slots % (width + 1)
        is_code = column < width
        slot_grid = torch.where(is_code, torch.stack([torch.zeros_like(row), row, column]), -1).T
        return Layout(len(slots), torch.where(is_code, -1, 99), (self.grid_size,), slot_grid, len(slots) - 2)

    def law(self, labels: Tensor, branch: int, cache: Tensor, slots: Tensor) -> Tensor:
        is_code = self.layout().forced < 0
        code_slots = is_code.nonzero().flatten()
        before = (is_code.long().cumsum(0) - is_code.long())[slots]  # codes before each slot
        inside = before.clamp(max=self.num_codes - 1)
        logits = super().law(labels, branch, cache[:, code_slots], inside)
        return torch.where(is_code[slots][..., None], logits, float("nan"))  # nobody may read a forced slot's law


def perturbed(backbone: SpatialBackbone, noise: float, seed: int = 5) -> SpatialBackbone:
    """A worse model of the same law: ``noise`` 0.15 / 0.3 / 0.6 is a total variation of 0.10 / 0.19 / 0.36."""
    drafter = SpatialBackbone(backbone.codebook_size, backbone.grid_size, sharpness=backbone.sharpness)
    shape = backbone.embedding.shape
    generator = torch.Generator().manual_seed(seed)
    drafter.embedding = backbone.embedding + noise * torch.randn(shape, generator=generator)
    return drafter
