"""Largest entries of long rows of logits. Ties go to the smaller index.

Shapes: `R` rows of `V` logits, of which the `k` largest are wanted.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .barrier import J_ARRIVED, J_THREADS, get, meet
from .simd import hmax, load_f32, load_i64, store_f32, store_i64, vload, vmax

_BLOCK = 64  # logits looked at together: most blocks hold nothing large and cost one comparison
# address of the logits, bytes from row to row, R, V, k, addresses of values f32[R, k] and ids i64[R, k]
T_LOGITS, T_STRIDE, T_ROWS, T_VOCABULARY, T_WANTED, T_VALUES, T_IDS, TOP_SIZE = range(3, 11)


@njit(inline="always")
def _block_peak(address):
    a = vmax(vload(address), vload(address + 64))
    b = vmax(vload(address + 128), vload(address + 192))
    return hmax(vmax(a, b))


@njit
def _place(value, index, values, ids, k):
    """Insert behind every entry that is not smaller; returns the smallest entry then."""
    i = k - 1
    while i > 0 and load_f32(values + 4 * (i - 1)) < value:
        store_f32(values + 4 * i, load_f32(values + 4 * (i - 1)))
        store_i64(ids + 8 * i, load_i64(ids + 8 * (i - 1)))
        i -= 1
    store_f32(values + 4 * i, value)
    store_i64(ids + 8 * i, index)
    return load_f32(values + 4 * (k - 1))


@njit
def _top_row(row, vocabulary, values, ids, k):
    least, whole = np.float32(-np.inf), vocabulary // _BLOCK * _BLOCK
    for i in range(k):
        store_f32(values + 4 * i, least)
        store_i64(ids + 8 * i, 0)
    for start in range(0, whole, _BLOCK):
        if _block_peak(row + 4 * start) > least:
            for i in range(start, start + _BLOCK):
                x = load_f32(row + 4 * i)
                if x > least:
                    least = _place(x, i, values, ids, k)
    for i in range(whole, vocabulary):
        x = load_f32(row + 4 * i)
        if x > least:
            least = _place(x, i, values, ids, k)


def top_rows(c: int, me: int) -> None:
    """Thread `me`'s rows: fills their values, falling, and ids."""
    threads, k = get(c, J_THREADS), get(c, T_WANTED)
    for r in range(me, get(c, T_ROWS), threads):
        row = get(c, T_LOGITS) + r * get(c, T_STRIDE)
        _top_row(row, get(c, T_VOCABULARY), get(c, T_VALUES) + 4 * k * r, get(c, T_IDS) + 8 * k * r, k)
    meet(c, threads, get(c, J_ARRIVED) + threads)
