"""What the target named as next tokens after a token, or a pair of tokens, when it last answered there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...types import IntArray

NOTHING = -1  # an empty entry of the matrix
EDGES = np.array([0.01, 0.03, 0.07, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95], dtype=np.float32)
SEEDED = len(EDGES) + 1  # the bin of entries that come from the prompt's bigrams
SLOTS = 1 << 16  # of pairs
_MIX, _WORD, _SHIFT = 0x9E3779B97F4A7C15, (1 << 64) - 1, 64 - 16  # multiplicative hash to 16 bits


class Adjacency:
    """The k most likely successors of each token, and of each pair of tokens, when the target last answered there.

    A row is one context: rows 0..V-1 are the single tokens, the other SLOTS rows are pairs, placed by a hash; the
    latest pair takes the place. ids i32[V + SLOTS, k] in falling order of probability, bins u8[V + SLOTS, k] which
    EDGES that probability passed.
    """

    def __init__(self, vocab_size: int, k: int) -> None:
        self.vocab_size = vocab_size
        self.ids = np.full((vocab_size + SLOTS, k), NOTHING, dtype=np.int32)
        self.bins = np.zeros((vocab_size + SLOTS, k), dtype=np.uint8)
        self._pair = np.full(SLOTS, NOTHING, dtype=np.int64)  # which pair a hashed row belongs to

    def find(self, before: int, token: int) -> int:
        """The row of the pair (before, token) if it is known, else that of the token."""
        pair = before * self.vocab_size + token
        slot = (pair * _MIX & _WORD) >> _SHIFT
        return self.vocab_size + slot if self._pair[slot] == pair else token

    def record(self, before: IntArray, tokens: IntArray, values: NDArray[np.float32], ids: IntArray) -> None:
        """Answers after `tokens` [n], each preceded by `before` [n]: top logits and their ids [n, k].

        Of equal contexts the last one stays.
        """
        weights = np.exp(values - values[:, :1])
        bins = np.searchsorted(EDGES, weights / weights.sum(axis=1, keepdims=True))
        pairs = before * self.vocab_size + tokens
        slots = ((pairs.astype(np.uint64) * np.uint64(_MIX)) >> np.uint64(_SHIFT)).astype(np.int64)
        self._pair[slots] = pairs
        for rows in (tokens, self.vocab_size + slots):
            self.bins[rows] = bins
            self.ids[rows] = ids

    def seed(self, tokens: IntArray) -> None:
        """Fill empty rows of single tokens with the successors in a text, the most frequent first."""
        if len(tokens) < 2:
            return
        size, k = self.vocab_size, self.ids.shape[1]
        pairs, counts = np.unique(tokens[:-1] * size + tokens[1:], return_counts=True)
        first, second = np.divmod(pairs, size)
        order = np.lexsort((-counts, first))
        first, second = first[order], second[order]
        starts = np.flatnonzero(np.diff(first, prepend=-1))
        rank = np.arange(len(first)) - np.repeat(starts, np.diff(starts, append=len(first)))
        kept = (rank < k) & (self.ids[first, 0] == NOTHING)
        self.ids[first[kept], rank[kept]] = second[kept]
        self.bins[first[kept], rank[kept]] = SEEDED
