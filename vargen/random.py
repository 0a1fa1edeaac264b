"""Counter-based noise: Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3").

Every random number of a decode is a pure function of the image's 64-bit seed and of where it is used, so an image does
not depend on the batch around it. The key is the seed; the counter is (position, lane, stream, iteration), where lane
``l`` carries the four words of codes ``4l .. 4l + 3``. The Triton kernels compute the same bits on chip.

Letters: B images, W positions, V codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from enum import IntEnum
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vargen.validation.checks import shown

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # the constants of the paper's reference code (Random123)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
TWO_NEG_32 = 2.0**-32
TWO_NEG_24 = 2.0**-24
BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 below 1: keeps log1p(-x) finite after r is rounded to float32
MAX_SEEDS = 1 << 16  # of one call
_CHUNK = 1 << 15  # lanes a pass: the working set stays inside a core's cache


class Stream(IntEnum):
    """What a number is used for. Numbers of different streams are independent."""

    GUMBEL = 0  # draw of a position; has no iteration, so every iteration that looks at the position sees the same row
    ACCEPT = 1  # uniform of the acceptance test
    FRESH = 2  # draw from the target distribution
    RESIDUAL = 3  # draw from the residual after a rejection
    INIT = 4  # new draft tokens at the end of the window
    DRAFT = 5  # draws of a draft model
    NORMAL = 6  # Gaussian noise of continuous heads
    ORDER = 7  # random generation orders
    MASK = 8  # confidence noise of masked decoding


def philox4x32(key: Tensor, counter: Tensor) -> Tensor:
    """Encrypt counters with Philox4x32-10.

    Args:
        key: ``[..., 2]`` int64 words in [0, 2^32), low word of the seed first.
        counter: ``[..., 4]`` int64 words in [0, 2^32); leading dimensions broadcast against those of ``key``.

    Returns:
        ``[..., 4]`` int64 words in [0, 2^32).
    """
    words = _philox(key[..., 0], key[..., 1], *counter.unbind(-1))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1)


def _philox(k0: Tensor, k1: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    # A 32 x 32 bit product wraps in int64, but its 64 bits are right: the high word is (product >> 32) and the low word
    # is the product itself, and the bits above 31 of both are masked once, where the next product needs it.
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = _mix(p1, c1, k0)
        c2 = _mix(p0, c3, k1)
        c1, c3 = p1, p0
        k0, k1 = k0 + WEYL[0], k1 + WEYL[1]
    return c0, c1 & MASK, c2, c3 & MASK


def _mix(product: Tensor, word: Tensor, key: Tensor) -> Tensor:
    return ((product >> 32) ^ word ^ key) & MASK


def random_bits(
    seeds: Tensor, positions: Tensor, num: int, stream: Stream | int | Tensor, iteration: Tensor | None = None
) -> Tensor:
    """Random words of every position.

    Args:
        seeds: ``[B]`` int64, the 64-bit seeds (two's complement).
        positions: ``[B, W]`` int64 code positions.
        num: how many words a position needs.
        stream: a :class:`Stream`, or ``[B, W]`` int64 streams.
        iteration: ``[B]`` int64, or ``None`` where the rule has no iteration (0).

    Returns:
        ``[B, W, num]`` int64 words in [0, 2^32).
    """
    batch, window = positions.shape
    lanes = -(-num // 4)
    out = torch.empty(batch * window, lanes, 4, dtype=torch.int64, device=positions.device)
    for rows, words in _lanes(seeds, positions, lanes, stream, iteration):
        for i, word in enumerate(words):
            out[rows, :, i] = word
    return out.view(batch, window, 4 * lanes)[..., :num]


def _lanes(
    seeds: Tensor, positions: Tensor, lanes: int, stream: int | Tensor, iteration: Tensor | None
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield (row slice, four words ``[rows, lanes]``) over the flattened rows, a cache-sized piece at a time."""
    batch, window = positions.shape
    size, device = batch * window, positions.device
    seed = seeds.to(device)[:, None].expand(batch, window).reshape(size, 1)
    streams = stream if isinstance(stream, Tensor) else torch.full((1,), int(stream), device=device)
    steps = torch.zeros(1, dtype=torch.int64, device=device) if iteration is None else iteration.to(device)[:, None]
    streams, steps = (value.expand(batch, window).reshape(size, 1) & MASK for value in (streams, steps))
    counter = (positions.reshape(size, 1) & MASK, torch.arange(lanes, device=device)[None], streams, steps)
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    if device.type != "cpu" or torch.compiler.is_compiling():
        yield slice(0, size), list(_philox(k0, k1, *counter))
        return
    step = max(1, _CHUNK // max(lanes, 1))
    for start in range(0, size, step):
        rows = slice(start, min(start + step, size))
        words = [value[rows].expand(rows.stop - rows.start, lanes) if len(value) > 1 else value for value in counter]
        yield rows, _philox_numpy(k0[rows], k1[rows], words, (rows.stop - rows.start, lanes))


def _philox_numpy(k0: Tensor, k1: Tensor, counter: list[Tensor], shape: tuple[int, int]) -> list[Tensor]:
    """``_philox`` on the CPU: numpy's loops over unsigned integers are two to three times faster, buffers are reused."""
    words = [np.empty(shape, dtype=np.uint64) for _ in range(6)]
    for word, value in zip(words, counter, strict=False):
        word[...] = value.numpy()
    c0, c1, c2, c3, p0, p1 = words
    keys = [key.numpy().astype(np.uint64) for key in (k0, k1)]
    mask, half = np.uint64(MASK), np.uint64(32)
    for _ in range(ROUNDS):
        np.multiply(c0, np.uint64(MULTIPLIERS[0]), out=p0)
        np.multiply(c2, np.uint64(MULTIPLIERS[1]), out=p1)
        for word, product, other, key in ((c0, p1, c1, keys[0]), (c2, p0, c3, keys[1])):
            np.right_shift(product, half, out=word)
            np.bitwise_xor(word, other, out=word)
            np.bitwise_xor(word, key, out=word)
            np.bitwise_and(word, mask, out=word)
        c1, p1, c3, p0 = p1, c1, p0, c3
        keys = [key + np.uint64(weyl) for key, weyl in zip(keys, WEYL, strict=True)]
    np.bitwise_and(c1, mask, out=c1)
    np.bitwise_and(c3, mask, out=c3)
    return [torch.from_numpy(word.view(np.int64)) for word in (c0, c1, c2, c3)]


def uniform(
    seeds: Tensor, positions: Tensor, num: int, stream: Stream | int | Tensor, iteration: Tensor | None = None
) -> Tensor:
    """Uniform numbers in [0, 1) on the grid of 2^-24; arguments of :func:`random_bits`. ``[B, W, num]`` float32."""
    return (random_bits(seeds, positions, num, stream, iteration) >> 8).float() * TWO_NEG_24


def gumbel(
    seeds: Tensor,
    positions: Tensor,
    num_codes: int,
    stream: Stream | int | Tensor = Stream.GUMBEL,
    iteration: Tensor | None = None,
) -> Tensor:
    """Standard Gumbel noise ``g = -log(-log1p(-(r + 1/2) 2^-32))``, fine-grained in the upper tail (at most 22.9).

    Args:
        seeds, positions, stream, iteration: as in :func:`random_bits`.
        num_codes: V.

    Returns:
        ``[B, W, V]`` float32; ``argmax(logits + noise)`` is a draw from ``softmax(logits)``.
    """
    batch, window = positions.shape
    lanes = -(-num_codes // 4)
    out = torch.empty(batch * window, lanes, 4, dtype=torch.float32, device=positions.device)
    for rows, words in _lanes(seeds, positions, lanes, stream, iteration):
        piece = out[rows]
        for i, word in enumerate(words):
            piece[..., i] = word  # int64 -> float32, rounded to nearest even
        piece.add_(0.5).mul_(-TWO_NEG_32).clamp_(min=-BELOW_ONE)
        piece.log1p_().neg_().log_().neg_()
    return out.view(batch, window, 4 * lanes)[..., :num_codes]


def normal(
    seeds: Tensor,
    positions: Tensor,
    num: int,
    stream: Stream | int | Tensor = Stream.NORMAL,
    iteration: Tensor | None = None,
) -> Tensor:
    """Standard normal numbers (Box and Muller, 1958); arguments of :func:`random_bits`. ``[B, W, num]`` float32."""
    bits = random_bits(seeds, positions, num + num % 2, stream, iteration).unflatten(-1, (-1, 2))
    radius = ((bits[..., 0].double() + 0.5) * TWO_NEG_32).log_().mul_(-2.0).sqrt_()
    angle = bits[..., 1].double() * (2.0 * math.pi * TWO_NEG_32)
    pair = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pair.flatten(-2)[..., :num].float()


class GumbelCache:
    """Gumbel rows of the positions last looked at.

    The rows of ``Stream.GUMBEL`` do not change between the iterations of a decode, so a window decoder that looks at a
    position several times pays for its row once. Rows live in a ring over positions: memory is
    ``B * capacity * V`` float32.

    Args:
        seeds: ``[B]`` int64.
        capacity: positions held per image; at least the window.
        num_codes: V.
    """

    def __init__(self, seeds: Tensor, capacity: int, num_codes: int) -> None:
        self.seeds = seeds
        self.capacity = capacity
        self.num_codes = num_codes
        self._held = torch.full((len(seeds), capacity), -1, dtype=torch.int64, device=seeds.device)
        self._rows = torch.empty(len(seeds), capacity, num_codes, dtype=torch.float32, device=seeds.device)

    def rows(self, positions: Tensor) -> Tensor:
        """Noise ``[B, W, V]`` float32 of ``positions [B, W]``; at most ``capacity`` consecutive positions an image."""
        if positions.shape[1] > self.capacity:
            raise ValueError(f"a cache of {self.capacity} positions cannot serve a window of {positions.shape[1]}")
        slot = positions % self.capacity
        missing = self._held.gather(1, slot) != positions
        image, column = missing.nonzero(as_tuple=True)
        if len(image):
            where = positions[image, column]
            fresh = gumbel(self.seeds[image], where[:, None], self.num_codes)
            self._rows[image, slot[image, column]] = fresh[:, 0]
            self._held[image, slot[image, column]] = where
        return self._rows[torch.arange(len(self.seeds), device=slot.device)[:, None], slot]

    def fresh(self, positions: Tensor) -> Tensor:
        """The same rows of any number of positions, made anew and not kept."""
        return gumbel(self.seeds, positions, self.num_codes)

    def select(self, rows: Tensor) -> None:
        """Keep the images ``rows`` (int64 indices), in that order."""
        self.seeds, self._held, self._rows = self.seeds[rows], self._held[rows], self._rows[rows]


# images [A], positions [A, W], of masked decoding also the number of the pass -> Gumbel numbers [A, W, V]
GivenNoise = Callable[..., Tensor]


class NoiseRows:
    """What a call gives instead of the Gumbel rows of its seeds, under the methods of ``GumbelCache``.

    Args:
        noise: ``noise(images [A], positions [A, W]) -> [A, W, V]``; the same numbers whenever a position is asked for.
        num_images: B.
        capacity: most positions asked for at once.
        num_codes: V.
        device: of the tensors.
    """

    def __init__(
        self, noise: GivenNoise, num_images: int, capacity: int, num_codes: int, device: torch.device
    ) -> None:
        self.noise, self.capacity, self.num_codes = noise, capacity, num_codes
        self.images = torch.arange(num_images, device=device)

    def rows(self, positions: Tensor) -> Tensor:
        """Noise ``[A, W, V]`` float32 of ``positions [A, W]``."""
        return given_rows(self.noise, self.images, positions, self.num_codes)

    fresh = rows

    def select(self, rows: Tensor) -> None:
        """Keep the images ``rows`` (int64 indices), in that order."""
        self.images = self.images[rows]


def given_rows(noise: GivenNoise, images: Tensor, positions: Tensor, num_codes: int, *place: int) -> Tensor:
    """Ask a call's own noise, and check what it returns.

    Raises:
        ValueError: something else than floating-point numbers ``[A, W, V]``.
    """
    rows = noise(images, positions, *place)
    wanted = (*positions.shape, num_codes)
    if not isinstance(rows, Tensor) or tuple(rows.shape) != wanted or not rows.is_floating_point():
        got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(
            f"noise must return Gumbel numbers {list(wanted)} for positions {list(positions.shape)}, got {got}"
        )
    return rows.to(positions.device, torch.float32)


def seed_tensor(seeds: list[int], device: torch.device | str | None = None) -> Tensor:
    """``[B]`` int64 of seeds given as integers in [0, 2^64) (two's complement above 2^63)."""
    wrapped = [seed - (1 << 64) if seed >= 1 << 63 else seed for seed in seeds]
    return torch.tensor(wrapped, dtype=torch.int64, device=device)


def image_seeds(seed: Any, generator: torch.Generator | list[torch.Generator] | None, num_images: int) -> list[int]:
    """The 64-bit seed of every image.

    Image ``i`` uses ``seed + i``; a list of seeds is taken as given; a generator gives one 64-bit draw per image (a
    list of generators one each); with neither, torch's global generator is asked once.

    Returns:
        ``num_images`` integers in [0, 2^64).

    Raises:
        ValueError: as ``check_seeds``.
    """
    seed = plain_seed(seed)
    check_seeds(seed, generator, num_images)
    if isinstance(generator, list | tuple):
        return [_draw_seed(one) for one in generator]
    if generator is not None:
        return [_draw_seed(generator) for _ in range(num_images)]
    if isinstance(seed, list | tuple):
        return [index(one) for one in seed]
    base = int(torch.randint(1 << 62, ())) if seed is None else index(seed)
    return [(base + i) % (1 << 64) for i in range(num_images)]


def check_seeds(seed: Any, generator: Any, num_images: int) -> None:
    """Check the seeds of a call without drawing any.

    Raises:
        ValueError: seed and generator together, a list of the wrong length, a seed that is no integer in [0, 2^64),
            something else than generators.
    """
    seed = plain_seed(seed)
    if seed is not None and generator is not None:
        raise ValueError("give seed or generator, not both")
    for name, given in (("generator", generator), ("seed", seed)):
        if isinstance(given, list | tuple) and len(given) != num_images:
            raise ValueError(f"{name} is a list of {len(given)}, but {num_images} images are asked for")
    for one in generator if isinstance(generator, list | tuple) else [] if generator is None else [generator]:
        if not isinstance(one, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {type(one).__name__}")
    for one in seed if isinstance(seed, list | tuple) else [] if seed is None else [seed]:
        _check_seed(one)


def plain_seed(seed: Any) -> Any:
    """A seed, or several as an array, a tensor or a range, as Python's own integers; anything else as it is."""
    if isinstance(seed, range):
        return list(seed[: MAX_SEEDS + 1])
    if isinstance(seed, np.generic):
        return seed.item()
    if isinstance(seed, np.ndarray | Tensor) and not getattr(seed, "is_meta", False):
        return seed.tolist() if seed.ndim == 0 or len(seed) <= MAX_SEEDS else seed
    return seed


def _draw_seed(generator: torch.Generator) -> int:
    draw = torch.randint(-(1 << 63), (1 << 63) - 1, (), generator=generator, device=generator.device)
    return int(draw) % (1 << 64)


def _check_seed(seed: Any) -> None:
    try:
        whole = -1 if isinstance(seed, bool) else index(seed)
    except TypeError:  # arrays have __index__ too
        whole = -1
    if not 0 <= whole < 1 << 64:
        raise ValueError(f"seed must be an integer in [0, 2**64), got {shown(seed)}")
