"""Which known phrases an unknown word may have meant: difflib's answer, for all words in one pass over the phrases.

`difflib.get_close_matches` compares every word with every phrase in Python, 2 ms a word. Here numpy counts the characters
that all words share with all phrases, which bounds difflib's ratio from above, and the ratio itself is computed only
where the bound leaves a phrase among the best.
"""

# w words · p phrases · c characters that occur in a phrase

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray

MAX_COMPARED = 64  # phrases whose ratio is computed for one word


class NearestPhrases:
    """Known phrases that can be searched for the nearest of unknown words.

    Args:
        phrases: at least one.
    """

    def __init__(self, phrases: Iterable[str]) -> None:
        self.phrases = tuple(dict.fromkeys(phrases))
        self._column = {character: i for i, character in enumerate(sorted(set("".join(self.phrases))))}
        self._counts = self._count(self.phrases)  # p c
        self._lengths = np.array([len(phrase) for phrase in self.phrases])  # p

    def search(self, words: Sequence[str], *, n: int = 3, cutoff: float = 0.6) -> list[list[str]]:
        """Find the nearest phrases of every word, best first.

        Args:
            words: any text.
            n: phrases a word at most.
            cutoff: difflib's ratio that a phrase must reach, in [0, 1].

        Returns:
            One list a word, as `difflib.get_close_matches` returns it.
        """
        if not words:
            return []
        shared = np.minimum(self._count(words)[:, None], self._counts).sum(-1)  # w p
        lengths = np.array([len(word) for word in words])
        bounds = 2.0 * shared / np.maximum(lengths[:, None] + self._lengths, 1)
        return [self._best(word, row, n, cutoff) for word, row in zip(words, bounds, strict=True)]

    def _count(self, texts: Sequence[str]) -> NDArray[np.int64]:
        counts = np.zeros((len(texts), len(self._column)), dtype=np.int64)
        for row, text in zip(counts, texts, strict=True):
            for character in text:
                if character in self._column:
                    row[self._column[character]] += 1
        return counts

    def _best(self, word: str, bounds: NDArray[np.float64], n: int, cutoff: float) -> list[str]:
        matcher = SequenceMatcher()
        matcher.set_seq2(word)
        best: list[tuple[float, str]] = []
        for index in np.argsort(-bounds, kind="stable")[:MAX_COMPARED].tolist():
            if bounds[index] < (best[-1][0] if len(best) == n else cutoff):
                break
            matcher.set_seq1(self.phrases[index])
            ratio = matcher.ratio()
            if ratio >= cutoff:
                best = sorted([*best, (ratio, self.phrases[index])], reverse=True)[:n]
        return [phrase for _, phrase in best]
