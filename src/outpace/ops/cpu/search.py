"""Largest entries of long rows of logits. Ties go to the smaller index.

Shapes: `R` rows of `V` logits, `stride` bytes apart.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .compiled import compiled
from .simd import hmax, load_f32, vload, vmax

_BLOCK = 64  # logits looked at together: most blocks hold nothing large and cost one comparison


@njit(inline="always")
def _block_peak(address):
    a = vmax(vload(address), vload(address + 64))
    b = vmax(vload(address + 128), vload(address + 192))
    return hmax(vmax(a, b))


@njit
def _place(value, index, values, ids, k):
    """Insert behind every entry that is not smaller."""
    i = k - 1
    while i > 0 and values[i - 1] < value:
        values[i], ids[i] = values[i - 1], ids[i - 1]
        i -= 1
    values[i], ids[i] = value, index


@compiled
def top_rows(logits, stride, vocabulary, values, ids):
    """Fill values f32[R, k] (falling) and ids i64[R, k]."""
    rows, k = values.shape
    whole = vocabulary // _BLOCK * _BLOCK
    for r in range(rows):
        row, v, n = logits + r * stride, values[r], ids[r]
        v[:] = np.float32(-np.inf)
        n[:] = 0
        for start in range(0, whole, _BLOCK):
            if _block_peak(row + 4 * start) > v[k - 1]:
                for i in range(start, start + _BLOCK):
                    x = load_f32(row + 4 * i)
                    if x > v[k - 1]:
                        _place(x, i, v, n, k)
        for i in range(whole, vocabulary):
            x = load_f32(row + 4 * i)
            if x > v[k - 1]:
                _place(x, i, v, n, k)
