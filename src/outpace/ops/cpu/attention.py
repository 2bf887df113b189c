"""Attention of packed rows over paged keys and values, causal or along a tree's paths.

A work item is one sequence, one KV head and a block of rows: `Q` = rows x group query vectors that read the same keys.
Scores of a query lie in *position order*, whatever order the cache holds the keys in: a tree row's scores of its own
path are gathered behind those of the prefix. Maximum, exponentials, sum and the weighted sum of values then run over
positions in one fixed order, so a token gets the same result as a chain, in a tree, in a chunk or in a batch.

Key pages are stored transposed (sixteen places to a vector), value pages by place; see rows.write_key, write_value.
Shapes: `C` head width padded to sixteen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils

from .emit import (
    F32,
    I32,
    I64,
    LANES,
    VF,
    VI,
    Accumulators,
    at,
    const,
    emit,
    fma,
    high_bf16,
    load,
    low_bf16,
    splat,
    store,
)
from .isa import DOT, VNNI
from .simd import (
    hmax,
    hsum,
    load_bf16_even,
    load_bf16_odd,
    load_f32,
    load_i32,
    store_f32,
    vadd,
    vexp,
    vfma,
    vload,
    vmax,
    vmul,
    vsplat,
    vstore,
    vsub,
)

MAX_QUERIES = 32  # query vectors of one work item
MANY = DOT == VNNI  # registers of sixteen lanes; elsewhere one takes two or four
VALUE_LANES = 4 if MANY else 1  # vectors of channels that one pass of the value kernel keeps in registers


def _scores(queries: int, bf16: bool) -> Callable[..., Any]:
    """scores[q][place] = sum_c query[q][c] key[place][c] for the pages first..last-1, c in rising order."""

    @emit(types.void, *[types.int64] * 10)
    def kernel(b, q, q_stride, width, pages, first, last, keys, page_stride, out, out_stride):
        acc = Accumulators(b, queries)
        qs = [at(b, q, b.mul(q_stride, const(i))) for i in range(queries)]
        outs = [at(b, out, b.mul(out_stride, const(i))) for i in range(queries)]
        step = 2 if bf16 else 1
        with cgutils.for_range(b, last, start=first) as pages_loop:
            p = pages_loop.index
            page = b.sext(load(b, at(b, pages, b.mul(p, const(4))), I32), I64)
            base = at(b, keys, b.mul(page, page_stride))
            acc.zero()
            with cgutils.for_range(b, b.sdiv(width, const(step))) as loop:
                row = at(b, base, b.mul(loop.index, const(4 * LANES)))
                if bf16:
                    pairs = load(b, row, VI)
                    parts = [low_bf16(b, pairs), high_bf16(b, pairs)]
                else:
                    parts = [load(b, row, VF)]
                c = b.mul(loop.index, const(4 * step))
                for i in range(queries):
                    for j, part in enumerate(parts):
                        factor = splat(b, load(b, at(b, at(b, qs[i], c), 4 * j), F32))
                        acc[i] = fma(b, factor, part, acc[i])
            column = b.mul(p, const(4 * LANES))
            for i in range(queries):
                store(b, at(b, outs[i], column), acc[i])

    return kernel


def _values(queries: int, vectors: int, bf16: bool) -> Callable[..., Any]:
    """out[q][c] += sum over places of weights[q][place] value[place][c], places in rising order, 16 * vectors c's."""

    @emit(types.void, *[types.int64] * 10)
    def kernel(b, weights, w_stride, pages, first, last, values, page_stride, width, out, out_stride):
        acc = Accumulators(b, queries * vectors)
        ws = [at(b, weights, b.mul(w_stride, const(i))) for i in range(queries)]
        outs = [at(b, out, b.mul(out_stride, const(i))) for i in range(queries)]
        for i in range(queries):
            for v in range(vectors):
                acc[i * vectors + v] = load(b, at(b, outs[i], 4 * LANES * v), VF)
        step = 2 if bf16 else 1
        with cgutils.for_range(b, last, start=first) as pages_loop:
            p = pages_loop.index
            page = b.sext(load(b, at(b, pages, b.mul(p, const(4))), I32), I64)
            base = at(b, values, b.mul(page, page_stride))
            with cgutils.for_range(b, const(LANES // step)) as loop:
                row = at(b, base, b.mul(b.mul(loop.index, width), const(4)))
                place = b.add(b.mul(p, const(4 * LANES)), b.mul(loop.index, const(4 * step)))
                for v in range(vectors):
                    if bf16:
                        pairs = load(b, at(b, row, 4 * LANES * v), VI)
                        parts = [low_bf16(b, pairs), high_bf16(b, pairs)]
                    else:
                        parts = [load(b, at(b, row, 4 * LANES * v), VF)]
                    for i in range(queries):
                        for j, part in enumerate(parts):
                            factor = splat(b, load(b, at(b, at(b, ws[i], place), 4 * j), F32))
                            acc[i * vectors + v] = fma(b, factor, part, acc[i * vectors + v])
        for i in range(queries):
            for v in range(vectors):
                store(b, at(b, outs[i], 4 * LANES * v), acc[i * vectors + v])

    return kernel


_scores_8b, _scores_4b, _scores_8f, _scores_4f = (_scores(n, h) for h in (True, False) for n in (8, 4))
_values_44b, _values_41b, _values_44f, _values_41f = (_values(4, n, h) for h in (True, False) for n in (4, 1))


@njit
def _all_scores(bf16, q, n, width, pages, first, last, keys, page_stride, out, out_stride):
    i = 0
    while i < n:
        qi, oi, qs = q + i * width * 4, out + i * out_stride, width * 4
        if MANY and n - i > 4:
            if bf16:
                _scores_8b(qi, qs, width, pages, first, last, keys, page_stride, oi, out_stride)
            else:
                _scores_8f(qi, qs, width, pages, first, last, keys, page_stride, oi, out_stride)
            i += 8
        else:
            if bf16:
                _scores_4b(qi, qs, width, pages, first, last, keys, page_stride, oi, out_stride)
            else:
                _scores_4f(qi, qs, width, pages, first, last, keys, page_stride, oi, out_stride)
            i += 4


@njit
def _all_values(bf16, weights, w_stride, n, pages, first, last, values, page_stride, width, out):
    for i in range(0, n, 4):
        c = 0
        w, os = weights + i * w_stride, width * 4
        while c < width:
            base, oi = values + c * 4, out + (i * width + c) * 4
            if MANY and width - c >= 16 * VALUE_LANES:
                if bf16:
                    _values_44b(w, w_stride, pages, first, last, base, page_stride, width, oi, os)
                else:
                    _values_44f(w, w_stride, pages, first, last, base, page_stride, width, oi, os)
                c += 16 * VALUE_LANES
            else:
                if bf16:
                    _values_41b(w, w_stride, pages, first, last, base, page_stride, width, oi, os)
                else:
                    _values_41f(w, w_stride, pages, first, last, base, page_stride, width, oi, os)
                c += 16


@njit
def _fill(address, first, last, value):
    for i in range(first, last):
        store_f32(address + 4 * i, value)


@njit
def _softmax(s, low, end):
    """Turn scores low..end-1 into exponentials in place, zero their vectors' other lanes; returns 1 / their sum.

    Lanes are positions modulo sixteen, so the sum's order does not depend on how the row was computed.
    """
    first, last = low // 16, (end + 15) // 16
    _fill(s, first * 16, low, np.float32(-np.inf))
    _fill(s, end, last * 16, np.float32(-np.inf))
    peak = vload(s + 64 * first)
    for i in range(first + 1, last):
        peak = vmax(vload(s + 64 * i), peak)
    top = vsplat(hmax(peak))
    total = vsplat(np.float32(0.0))
    for i in range(first, last):
        e = vexp(vsub(vload(s + 64 * i), top))
        vstore(s + 64 * i, e)
        total = vadd(e, total)
    return np.float32(1.0) / hsum(total)


@njit
def _add_path(bf16, weights, path, count, committed, pages, values, page_stride, width, out):
    """out[c] += weights[d] * value[path[d]][c], one position after the other."""
    for d in range(count):
        place = committed + load_i32(path + 4 * d)
        page, lane = values + load_i32(pages + 4 * (place // 16)) * page_stride, place % 16
        w = vsplat(load_f32(weights + 4 * d))
        for c in range(0, width, 16):
            if bf16:
                row = page + 4 * ((lane // 2) * width + c)
                v = load_bf16_odd(row) if lane % 2 else load_bf16_even(row)
            else:
                v = vload(page + 4 * (lane * width + c))
            vstore(out + 4 * c, vfma(w, v, vload(out + 4 * c)))


@njit
def row_span(t, offsets, positions, causal, visible_start, visible, committed, window):
    """What row t sees: positions low..end-1; its path visible[start : start + count] (0 when causal); and the number of
    the sequence's places up to the last one it looks at.
    """
    low = max(0, load_i32(positions + 4 * t) + 1 - window) if window > 0 else 0
    if causal:
        end = committed + load_i32(offsets + 4 * t) + 1
        return low, end, 0, 0, end
    start = load_i32(visible_start + 4 * t)
    count = load_i32(visible_start + 4 * (t + 1)) - start
    reach = committed + load_i32(visible + 4 * (start + count - 1)) + 1
    return low, committed + count, start, count, reach


@njit
def to_position_order(scores, start, count, visible, committed):
    """Bring a row's scores of its own path behind those of the prefix. Visible offsets rise, so nothing is overwritten
    before it is read.
    """
    for d in range(count):
        place = committed + load_i32(visible + 4 * (start + d))
        store_f32(scores + 4 * (committed + d), load_f32(scores + 4 * place))


@njit
def attend(
    bf16, group, width, queries, q_stride, row, rows, offsets, positions, causal, visible_start, visible, committed,
    window, pages, keys, values, page_stride, out, out_stride, q, s, s_stride, acc,
):  # fmt: skip
    """Rows row..row+rows-1 of one sequence against one KV head.

    `queries` f32 [T][group heads][C] at the head's first column, already scaled and rotated; `out` likewise.
    `q`, `s`, `acc` are this thread's buffers for rows * group queries, padded to a multiple of eight.
    """
    n = rows * group
    first, last = 1 << 40, 0
    for r in range(rows):
        t = row + r
        low, _, _, _, reach = row_span(t, offsets, positions, causal, visible_start, visible, committed, window)
        first, last = min(first, min(low, committed) // 16), max(last, (reach + 15) // 16)
        for g in range(group):
            for c in range(0, width, 16):
                vstore(q + 4 * ((r * group + g) * width + c), vload(queries + t * q_stride + 4 * (g * width + c)))
    _all_scores(bf16, q, n, width, pages, first, last, keys, page_stride, s, s_stride)

    shared = last if causal else (committed + 15) // 16  # pages whose places are positions for every row
    tail = 16 * shared + 16
    for r in range(rows):
        t = row + r
        low, end, start, count, _ = row_span(t, offsets, positions, causal, visible_start, visible, committed, window)
        for g in range(group):
            i = r * group + g
            si = s + i * s_stride
            to_position_order(si, start, count, visible, committed)
            scale = _softmax(si, low, end)
            _fill(si, first * 16, low // 16 * 16, np.float32(0.0))
            _fill(si, (end + 15) // 16 * 16, 16 * shared, np.float32(0.0))
            if not causal:
                for d in range(count - 1, -1, -1):
                    w = load_f32(si + 4 * (committed + d))
                    store_f32(si + 4 * (tail + d), w if committed + d >= low else np.float32(0.0))
                _fill(si, committed, 16 * shared, np.float32(0.0))
            store_f32(si - 64, scale)  # kept in front of the row
            for c in range(0, width, 16):
                vstore(acc + 4 * (i * width + c), vsplat(np.float32(0.0)))
    _all_values(bf16, s, s_stride, n, pages, first, shared, values, page_stride, width, acc)
    for r in range(rows):
        t = row + r
        for g in range(group):
            i = r * group + g
            si, ai = s + i * s_stride, acc + 4 * i * width
            if not causal:
                start = load_i32(visible_start + 4 * t)
                count = load_i32(visible_start + 4 * (t + 1)) - start
                path = visible + 4 * start
                _add_path(bf16, si + 4 * tail, path, count, committed, pages, values, page_stride, width, ai)
            scale = vsplat(load_f32(si - 64))
            for c in range(0, width, 16):
                vstore(out + t * out_stride + 4 * (g * width + c), vmul(vload(ai + 4 * c), scale))
