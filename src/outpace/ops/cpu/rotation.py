"""`ops.reference.rotate` for whole weight matrices, compiled: the same bits, by sums and differences."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .compiled import compiled

BLOCK = 64  # of the Walsh-Hadamard transform


@compiled
def _rotate_rows(x, out, first, last):
    """Rows first..last-1 of f32[N, K], K a multiple of BLOCK; sums in float64, exact but for their last rounding."""
    at, to = np.empty(BLOCK, dtype=np.float64), np.empty(BLOCK, dtype=np.float64)
    half = BLOCK // 2
    for n in range(first, last):
        for start in range(0, x.shape[1], BLOCK):
            for i in range(BLOCK):
                at[i] = x[n, start + i]
            for _ in range(6):  # neighbours to both halves: after six rounds everything is where it belongs
                for i in range(half):
                    to[i] = at[2 * i] + at[2 * i + 1]
                    to[half + i] = at[2 * i] - at[2 * i + 1]
                at, to = to, at
            for i in range(BLOCK):
                out[n, start + i] = at[i]


def rotate_weights(x: NDArray[np.float32], threads: int) -> NDArray[np.float32]:
    """f32[N, K] -> f32[N, K], K a multiple of 64, on that many threads."""
    out = np.empty_like(x)
    ends = [len(x) * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(_rotate_rows, x, out, a, b) for a, b in pairwise(ends)]:
            done.result()
    return out
