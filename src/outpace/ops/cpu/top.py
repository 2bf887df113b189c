"""Python's side of search.py: the largest logits of some rows, on the threads of a team.

Shapes: `R` rows of `V` logits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .address import address
from .barrier import J_THREADS
from .search import T_LOGITS, TOP_SIZE
from .team import TOP, team


def top(logits: NDArray[np.float32], k: int, threads: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """f32[R, V], rows without gaps -> values f32[R, k] falling, ids i64[R, k]; `k` is at most V."""
    rows, vocabulary = logits.shape
    values, ids = np.empty((rows, k), dtype=np.float32), np.empty((rows, k), dtype=np.int64)
    threads = threads if rows > 1 else 1
    control = np.zeros(TOP_SIZE, dtype=np.int64)
    control[J_THREADS] = threads
    where = address(logits[:1]), logits.strides[0]
    control[T_LOGITS:] = *where, rows, vocabulary, k, address(values), address(ids)
    team(threads).run(control, TOP)
    return values, ids
