"""Python's side of sample.py: a batch of draws, on the threads of a team."""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .barrier import J_THREADS
from .sample import ASKED, S_ASKED, S_ROWS, S_SPACE, S_SPACE_STRIDE, S_VOCABULARY, space_bytes
from .team import SAMPLE, team

_local = threading.local()
_CONTROL = 8
_ONE = struct.Struct("<qfiffqQQQ")  # a draw, as in ASKED
assert _ONE.size == ASKED.itemsize


class Draws:
    """Draws from rows of one vocabulary on `threads` threads, with the memory that they need."""

    def __init__(self, vocabulary: int, threads: int) -> None:
        self._threads = threads
        stride = space_bytes(vocabulary)
        self._space = np.empty(threads * stride, dtype=np.uint8)
        self._asked = np.zeros(8, dtype=ASKED)
        self._control = np.zeros(_CONTROL, dtype=np.int64)
        self._control[S_VOCABULARY] = vocabulary
        self._control[S_SPACE], self._control[S_SPACE_STRIDE] = self._space.ctypes.data, stride

    def __call__(self, asked: Sequence[tuple[int | float, ...]]) -> NDArray[np.int64]:
        """Ids i64[n] of draws, each (address of f32[V], 1 / temperature, top-k or 0, top-p, min-p, 0, lower and upper
        half of the seed, position). The rows must stay where they are until it returns."""
        n = len(asked)
        if n > len(self._asked):
            self._asked = np.zeros(2 * n, dtype=ASKED)
        for i, one in enumerate(asked):
            _ONE.pack_into(self._asked, i * _ONE.size, *one)
        threads = self._threads if n > 1 else 1
        self._control[J_THREADS], self._control[S_ROWS] = threads, n
        self._control[S_ASKED] = self._asked.ctypes.data
        team(threads).run(self._control, SAMPLE)
        found: NDArray[np.int64] = self._asked["token"][:n].copy()
        return found


def draws(vocabulary: int, threads: int = 1) -> Draws:
    """This thread's own for that vocabulary."""
    kept: dict[tuple[int, int], Draws] = _local.__dict__.setdefault("kept", {})
    if (vocabulary, threads) not in kept:
        if len(kept) >= 4:  # of models that are gone
            kept.clear()
        kept[vocabulary, threads] = Draws(vocabulary, threads)
    return kept[vocabulary, threads]
