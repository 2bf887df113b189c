"""Drawing a token from a row of logits: temperature, top-k, top-p, min-p, then the inverse of the cumulative sum.

Everything is decided by thresholds on weights, in vocabulary order: nothing is sorted but the few candidates that are
left near a cut. A row is read twice or three times, sixteen lanes at a time; weights are summed in float64 in one fixed
order (blocks of 256, lanes within a block), so the token depends on the row and the key alone.

Shapes: `V` vocabulary; `m` candidates, the ids that may be drawn.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .barrier import J_ARRIVED, J_THREADS, get, meet
from .candidates import (
    add_high,
    add_low,
    all_lanes,
    append_from,
    count_from,
    keep_from,
    nothing,
    nucleus_cut,
    numbers,
    pad,
    select,
)
from .emit import LANES
from .simd import (
    hmax,
    load_f32,
    load_f64,
    load_i32,
    load_i64,
    store_f32,
    store_f64,
    store_i64,
    vexp,
    vload,
    vmax,
    vmul,
    vsplat,
    vstore,
    vsub,
)

_BLOCK = 256  # weights that are summed together
ASKED = np.dtype(  # one draw: the row's address, how to draw, and room for the token
    [
        ("row", "<i8"), ("by", "<f4"), ("top_k", "<i4"), ("top_p", "<f4"), ("min_p", "<f4"), ("token", "<i8"),
        ("key_low", "<u8"), ("key_high", "<u8"), ("position", "<u8"),
    ]
)  # fmt: skip
_BYTES = ASKED.itemsize
S_ROWS, S_VOCABULARY, S_ASKED, S_SPACE, S_SPACE_STRIDE = range(3, 8)


@njit(inline="always")
def _block_at(row, block, whole, tail):
    """The address of a block; the last one, if it is not whole, has been copied."""
    return row + 4 * _BLOCK * block if block < whole else tail


@njit(inline="always")
def _weight(address, highest, by):
    return vexp(vmul(vsub(vload(address), highest), by))


@njit
def _inside(address, n, goal):
    """The index in f32[n] at which the running sum passes `goal`; of the last weight if it never does."""
    running, last = 0.0, 0
    for i in range(n):
        w = load_f32(address + 4 * i)
        if w > 0:
            running += w
            last = i
            if running > goal:
                break
    return last


@njit
def _find(sums, blocks, u):
    """The block in which the running sum passes `u` times the total, and what is left of that goal inside it."""
    goal = 0.0
    for b in range(blocks):
        goal += load_f64(sums + 8 * b)
    goal *= u
    running, before, found = 0.0, 0.0, 0
    for b in range(blocks):
        if load_f64(sums + 8 * b) > 0:
            found, before = b, running
            running += load_f64(sums + 8 * b)
            if running > goal:
                break
    return found, goal - before


@njit
def _block_sums(weights, m, sums):
    """Of f32[m], zeros behind it: fills f64[blocks]; how many blocks."""
    blocks = (m + _BLOCK - 1) // _BLOCK
    for b in range(blocks):
        low, high = nothing(), nothing()
        for i in range(b * _BLOCK, min((b + 1) * _BLOCK, m), LANES):
            v = vload(weights + 4 * i)
            low, high = add_low(low, v), add_high(high, v)
        store_f64(sums + 8 * b, all_lanes(low, high))
    return blocks


@njit
def _peaks(row, blocks, whole, tail, peaks):
    """The largest logit of each block; returns that of all."""
    highest = np.float32(-np.inf)
    for b in range(blocks):
        at = _block_at(row, b, whole, tail)
        top, other = vmax(vload(at), vload(at + 64)), vmax(vload(at + 128), vload(at + 192))
        for i in range(256, 4 * _BLOCK, 256):
            top = vmax(top, vmax(vload(at + i), vload(at + i + 64)))
            other = vmax(other, vmax(vload(at + i + 128), vload(at + i + 192)))
        peak = hmax(vmax(top, other))
        store_f32(peaks + 4 * b, peak)
        highest = max(highest, peak)
    return highest


@njit
def _all_sums(row, blocks, whole, tail, highest, by, sums):
    """Weights of every block, summed: fills f64[blocks], returns their sum."""
    top, scale, total = vsplat(highest), vsplat(by), 0.0
    for b in range(blocks):
        at, low, high = _block_at(row, b, whole, tail), nothing(), nothing()
        for i in range(0, 4 * _BLOCK, 64):
            v = _weight(at + i, top, scale)
            low, high = add_low(low, v), add_high(high, v)
        store_f64(sums + 8 * b, all_lanes(low, high))
        total += load_f64(sums + 8 * b)
    return total


@njit
def _most_likely(row, blocks, whole, tail, peaks, highest, by, k, values, ids, spare):
    """Candidates of top-k, ties with the last one kept: their weights and ids; how many.

    At least k logits reach the k-th largest of the blocks' peaks, so only what reaches that is looked at.
    """
    bound = np.float32(-np.inf)
    if k <= blocks:
        for b in range(blocks):
            store_f32(spare + 4 * b, load_f32(peaks + 4 * b))
        bound = (select(spare, blocks, k) - highest) * by
    top, scale, least, m = vsplat(highest), vsplat(by), vsplat(bound), 0
    for b in range(blocks):
        if (load_f32(peaks + 4 * b) - highest) * by >= bound:
            at = _block_at(row, b, whole, tail)
            for i in range(0, _BLOCK, LANES):
                v = vmul(vsub(vload(at + 4 * i), top), scale)
                if count_from(v, least) > 0:
                    m += append_from(values + 4 * m, ids + 4 * m, v, numbers(b * _BLOCK + i), least)
    for i in range(m):
        store_f32(spare + 4 * i, load_f32(values + 4 * i))
    m = keep_from(values, ids, m, select(spare, m, k))
    for i in range(0, m, LANES):
        vstore(values + 4 * i, vexp(vload(values + 4 * i)))
    pad(values, m)
    return m


@njit
def _heavy(row, blocks, whole, tail, peaks, highest, by, floor, values, ids):
    """Candidates whose weight is at least `floor`: their weights and ids; how many."""
    top, scale, least, m = vsplat(highest), vsplat(by), vsplat(floor), 0
    lowest = np.log(max(floor, np.float32(1e-38))) - np.float32(1e-3)  # a margin for the rounding of both
    for b in range(blocks):
        if (load_f32(peaks + 4 * b) - highest) * by >= lowest:
            at = _block_at(row, b, whole, tail)
            for i in range(0, _BLOCK, LANES):
                v = _weight(at + 4 * i, top, scale)
                if count_from(v, least) > 0:
                    m += append_from(values + 4 * m, ids + 4 * m, v, numbers(b * _BLOCK + i), least)
    pad(values, m)
    return m


@njit
def _draw(row, vocabulary, by, top_k, top_p, min_p, u, space):
    """The id drawn from f32[vocabulary] by `u`; -1 if nothing can be, because the logits are no numbers.

    `by`: one over the temperature; `top_k` 0: all. `space`: space_bytes of memory.
    """
    whole, blocks = vocabulary // _BLOCK, (vocabulary + _BLOCK - 1) // _BLOCK
    sums, tail = space, space + 8 * (blocks + LANES)
    peaks = tail + 4 * _BLOCK
    values = peaks + 4 * (blocks + LANES)
    ids = values + 4 * (vocabulary + _BLOCK + LANES)
    spare = ids + 4 * (vocabulary + _BLOCK + LANES)
    other = spare + 4 * (vocabulary + _BLOCK + LANES)
    for i in range(_BLOCK):
        at = whole * _BLOCK + i
        store_f32(tail + 4 * i, load_f32(row + 4 * at) if at < vocabulary else np.float32(-np.inf))
    highest = _peaks(row, blocks, whole, tail, peaks)
    if not -np.inf < highest < np.inf:
        return -1
    floor = np.float32(0.0)
    if 0 < top_k < vocabulary:
        m = _most_likely(row, blocks, whole, tail, peaks, highest, by, top_k, values, ids, spare)
        total = 0.0
        for b in range(_block_sums(values, m, sums)):
            total += load_f64(sums + 8 * b)
    else:
        total = _all_sums(row, blocks, whole, tail, highest, by, sums)
        if not 0 < total < np.inf:
            return -1
        if top_p >= 1 and min_p <= 0:
            block, goal = _find(sums, blocks, u)
            at = _block_at(row, block, whole, tail)
            for i in range(0, 4 * _BLOCK, 64):
                vstore(values + i, _weight(at + i, vsplat(highest), vsplat(by)))
            return block * _BLOCK + _inside(values, _BLOCK, goal)
        # all that are lighter weigh less than half of what top-p leaves out
        floor = np.float32(0.5 * (1.0 - top_p) * total / vocabulary) if top_p < 1 else min_p
        m = _heavy(row, blocks, whole, tail, peaks, highest, by, floor, values, ids)
    if top_p < 1:
        m = keep_from(values, ids, m, nucleus_cut(values, m, floor, np.float64(top_p) * total, spare, other))
    if min_p > 0:
        m = keep_from(values, ids, m, min_p)
    if m == 0:
        return -1
    pad(values, m)
    block, goal = _find(sums, _block_sums(values, m, sums), u)
    first = block * _BLOCK
    return load_i32(ids + 4 * (first + _inside(values + 4 * first, min(_BLOCK, m - first), goal)))


@njit(inline="always")
def _mul64(a, b):
    """Low and high halves of a 128-bit product, by halves of 32 bits."""
    mask = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    a0, a1, b0, b1 = a & mask, a >> half, b & mask, b >> half
    low, middle, other, high = a0 * b0, a1 * b0, a0 * b1, a1 * b1
    carry = (low >> half) + (middle & mask) + (other & mask)
    return a * b, high + (middle >> half) + (other >> half) + (carry >> half)


@njit
def keyed_uniform(key_low, key_high, draw, position, stream):
    """sampling.uniform: Philox 4x64 of ten rounds (Salmon et al., SC 2011), as numpy's generator counts it."""
    c0, c1, c2, c3 = np.uint64(draw) + np.uint64(1), np.uint64(position), np.uint64(stream), np.uint64(0)
    k0, k1 = np.uint64(key_low), np.uint64(key_high)
    for _ in range(10):
        low0, high0 = _mul64(np.uint64(0xD2E7470EE14C6C93), c0)
        low2, high2 = _mul64(np.uint64(0xCA5A826395121157), c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 += np.uint64(0x9E3779B97F4A7C15)
        k1 += np.uint64(0xBB67AE8584CAA73B)
    return np.float64(c0 >> np.uint64(11)) * 2.0**-53


@njit
def _sample_rows(c, me):
    """Thread `me`'s share of a batch of draws; see `Draws` for what `c` points to."""
    threads, n, vocabulary = get(c, J_THREADS), get(c, S_ROWS), get(c, S_VOCABULARY)
    space, asked = get(c, S_SPACE) + me * get(c, S_SPACE_STRIDE), get(c, S_ASKED)
    for i in range(me, n, threads):
        one = asked + i * _BYTES
        u = keyed_uniform(load_i64(one + 32), load_i64(one + 40), 0, load_i64(one + 48), 0)
        token = _draw(
            load_i64(one), vocabulary, load_f32(one + 8), load_i32(one + 12), load_f32(one + 16), load_f32(one + 20), u,
            space,
        )  # fmt: skip
        store_i64(one + 24, token)
    meet(c, threads, get(c, J_ARRIVED) + threads)


def sample_rows(c: int, me: int) -> None:
    """A job (see team.py): thread `me`'s share of a batch of draws."""
    _sample_rows(c, me)


def space_bytes(vocabulary: int) -> int:
    """Scratch memory of one thread: sums of blocks, a last block, peaks, and four arrays of candidates."""
    blocks = -(-vocabulary // _BLOCK)
    return -(-(12 * (blocks + LANES) + 4 * _BLOCK + 16 * (vocabulary + _BLOCK + LANES)) // 64) * 64
