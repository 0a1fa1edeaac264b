"""Philox4x32-10 (Salmon et al., 2011) over numpy arrays: random words as a pure function of key and counter."""

# b keys · n words per key

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox_words(
    keys: NDArray[np.uint64], counters: NDArray[np.uint64], stream: int, count: int
) -> NDArray[np.uint64]:
    """Draw 32-bit words.

    Args:
        keys: (b,) 64-bit keys.
        counters: (b,) 64-bit counters, the two low words of the Philox counter.
        stream: third counter word; different streams are independent.
        count: n, words per key.

    Returns:
        (b, n) words in [0, 2^32), as uint64 so that products do not overflow.
    """
    lanes = -(-count // 4)
    lane = np.arange(lanes, dtype=np.uint64)
    shape = (keys.shape[0], lanes)
    x0 = np.broadcast_to((counters & _LOW)[:, None], shape)
    x1 = np.broadcast_to((counters >> _SHIFT)[:, None], shape)
    x2 = np.full(shape, stream, dtype=np.uint64)
    x3 = np.broadcast_to(lane, shape)
    k0, k1 = (keys & _LOW)[:, None], (keys >> _SHIFT)[:, None]
    for _ in range(_ROUNDS):
        first, second = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (second >> _SHIFT) ^ x1 ^ k0, second & _LOW, (first >> _SHIFT) ^ x3 ^ k1, first & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([x0, x1, x2, x3], axis=-1).reshape(shape[0], -1)[:, :count]
