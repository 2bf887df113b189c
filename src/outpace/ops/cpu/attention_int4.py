"""Attention of a draft's rows that reads old pages from their compact copy (kv_int4) and recent ones as they are.

The plan is that of attention.attend, with two more loops over pages. Codes are bytes of an integer dot product, queries
and weights its signed other side:

    query . key     = gain[t] sum_c (query[c] spread[c]) (u[c] - 7.5) + sum_c query[c] mid[c]
    sum_t w[t] v[t] = sum_t (w[t] scale[t]) (u[t] - 7.5) + sum_t w[t] mid[t]

The spread-out query is rounded to eight bits once for all pages, the scaled weights of a page with a scale of their
own. The result of a row does not depend on the others', but it is not that of the exact pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils

from . import dots
from .attention import _add_path, _all_scores, _all_values, _fill, _softmax, row_span, to_position_order
from .emit import F32, I8, LANES, at, const, emit, fma, load, prefetch, splat, store
from .kv_int4 import NOTHING, key_codes, key_mids, value_codes, value_scales
from .simd import (
    hmax,
    hsum,
    iload,
    load_bf16,
    load_f32,
    load_i32,
    load_i64,
    store_f32,
    store_i8,
    to_float,
    vabs,
    vadd,
    vfma,
    vload,
    vmax,
    vmul,
    vrint,
    vsplat,
    vstore,
    vsub,
)

QUERIES = 8  # that one pass over a page serves
SCRATCH_FIXED = 2048  # bytes, and C + 8 more for each query of a work item


_PARTS = range(0, 4 * LANES, 4 * dots.LANES)  # where the outputs of a register begin in a vector of codes, in bytes


class _Codes:
    """`count` sums of code bytes times signed bytes, for the outputs of one register. Codes are nibbles, or bytes where
    there are lower nibbles too: processors that multiply signed bytes alone then sum both nibbles apart."""

    def __init__(self, b: ir.IRBuilder, count: int, with_lower: bool) -> None:
        self._b, self._count, self._bytes = b, count, with_lower and dots.Totals.excess > 0
        self._upper = dots.Totals(b, 8 if self._bytes else 5, count)
        self._below = dots.Totals(b, 5, count) if with_lower and not self._bytes else None
        self._upper.begin()
        if self._below:
            self._below.begin()

    def add(self, codes: Sequence[Any], lower: Sequence[Any], signed: Callable[[int], Sequence[Any]]) -> None:
        """`codes`: at most two vectors, each with the codes of two; `lower`: their lower nibbles, or nothing. `signed`:
        what meets each of these in a sum."""
        b, ty = self._b, ir.VectorType(I8, 4 * dots.LANES)
        nibble, four = (ir.Constant(ty, [n] * ty.count) for n in (15, 4))
        upper, below = ([half for x in v for half in (b.and_(x, nibble), b.lshr(x, four))] for v in (codes, lower))
        if self._bytes:
            upper = [b.or_(b.shl(u, four), v) for u, v in zip(upper, below, strict=True)]
        for i in range(self._count):
            self._upper.add(i, upper, signed(i))
            if self._below:
                self._below.add(i, below, signed(i))

    def sum(self, i: int) -> Any:
        total = self._upper.sum(i)
        if not self._below:
            return total
        return self._b.add(self._b.shl(total, ir.Constant(total.type, [4] * dots.LANES)), self._below.sum(i))


def _key_page(queries: int, with_lower: bool) -> Any:
    @emit(types.void, *[types.int64] * 6)
    def kernel(b, q, q_stride, width, codes, lower, out):
        """out i32[queries][16 places] = sum over channels of query bytes times code bytes."""
        qs = [at(b, q, b.mul(q_stride, const(i))) for i in range(queries)]
        for part in _PARTS:
            sums = _Codes(b, queries, with_lower)
            with cgutils.for_range(b, b.sdiv(width, const(8))) as loop:
                row, eight = at(b, b.mul(loop.index, const(64)), part), b.mul(loop.index, const(8))
                signed = [[dots.load_activations(b, at(b, at(b, x, eight), 4 * h)) for h in range(2)] for x in qs]
                found = [[dots.load_weights(b, at(b, x, row))] for x in ((codes, lower) if with_lower else (codes,))]
                sums.add(found[0], found[1] if with_lower else [], signed.__getitem__)
            for i in range(queries):
                store(b, at(b, out, 64 * i + part), sums.sum(i))

    return kernel


def _value_page(queries: int, with_lower: bool) -> Any:
    @emit(types.void, *[types.int64] * 6)
    def kernel(b, w, factors, width, codes, lower, out):
        """out f32[queries][C] += factor times the sum over places of weight bytes [queries][16] times code bytes."""
        floats = ir.VectorType(F32, dots.LANES)
        factor = [splat(b, load(b, at(b, factors, 4 * i), F32), dots.LANES) for i in range(queries)]
        outs = [at(b, out, b.mul(width, const(4 * i))) for i in range(queries)]
        with cgutils.for_range(b, b.sdiv(width, const(16))) as loop:
            block, column = b.mul(loop.index, const(128)), b.mul(loop.index, const(64))
            for part in _PARTS:
                sums = _Codes(b, queries, with_lower)
                found = [
                    [dots.load_weights(b, at(b, at(b, x, block), 64 * pair + part)) for pair in range(2)]
                    for x in ((codes, lower) if with_lower else (codes,))
                ]
                signed = [
                    [dots.load_activations(b, at(b, w, 16 * i + 4 * d)) for d in range(4)] for i in range(queries)
                ]
                sums.add(found[0], found[1] if with_lower else [], signed.__getitem__)
                for i in range(queries):
                    target = at(b, at(b, outs[i], column), part)
                    store(b, target, fma(b, b.sitofp(sums.sum(i), floats), factor[i], load(b, target, floats)))

    return kernel


_keys_8, _keys_6, _keys_4 = (_key_page(n, False) for n in (8, 6, 4))
_keys_8_both, _keys_4_both = (_key_page(n, True) for n in (8, 4))
_values_8, _values_6, _values_4 = (_value_page(n, False) for n in (8, 6, 4))
_values_8_both, _values_4_both = (_value_page(n, True) for n in (8, 4))


@emit(types.void, types.int64, types.int64)
def _prefetch(b, address, size):
    with cgutils.for_range(b, b.sdiv(size, const(64))) as loop:
        prefetch(b, at(b, address, b.mul(loop.index, const(64))))


@njit
def _dot_keys(n, q, width, codes, lower, out):
    if lower:
        if n > 4:
            _keys_8_both(q, width, width, codes, lower, out)
        else:
            _keys_4_both(q, width, width, codes, lower, out)
    elif n > 6:
        _keys_8(q, width, width, codes, 0, out)
    elif n > 4:
        _keys_6(q, width, width, codes, 0, out)
    else:
        _keys_4(q, width, width, codes, 0, out)


@njit
def _add_values(n, w, factors, width, codes, lower, out):
    if lower:
        if n > 4:
            _values_8_both(w, factors, width, codes, lower, out)
        else:
            _values_4_both(w, factors, width, codes, lower, out)
    elif n > 6:
        _values_8(w, factors, width, codes, 0, out)
    elif n > 4:
        _values_6(w, factors, width, codes, 0, out)
    else:
        _values_4(w, factors, width, codes, 0, out)


@njit
def _query_bytes(n, width, q, spread, out, scales, centre, factor):
    """Queries times the spread in eight bits; for each of them (scale, scale * centre * sum of the bytes)."""
    for i in range(n):
        qi, oi = q + 4 * i * width, out + i * width
        top = vsplat(NOTHING)
        for c in range(0, width, 16):
            top = vmax(top, vabs(vmul(vload(qi + 4 * c), vload(spread + 4 * c))))
        scale = hmax(top) * np.float32(1.0 / 127.0)
        inverse, total = vsplat(np.float32(1.0) / scale), vsplat(np.float32(0.0))
        for c in range(0, width, 16):
            y = vrint(vmul(vmul(vload(qi + 4 * c), vload(spread + 4 * c)), inverse))
            store_i8(oi + c, y)
            total = vadd(total, y)
        store_f32(scales + 8 * i, scale * factor)
        store_f32(scales + 8 * i + 4, scale * factor * centre * hsum(total))


@njit
def _page_scores(n, width, q, bytes_, scales, record, lower, s, s_stride, totals):
    """Scores of n <= 8 queries, f32 in `q`, for one page."""
    _dot_keys(n, bytes_, width, record + key_codes(width), lower, totals)
    gain = vload(record)
    for i in range(n):
        shift = vsplat(np.float32(0.0))
        for c in range(0, width, 16):
            shift = vfma(vload(q + 4 * (i * width + c)), load_bf16(record + key_mids() + 2 * c), shift)
        scaled = vmul(to_float(iload(totals + 64 * i)), vsplat(load_f32(scales + 8 * i)))
        scaled = vsub(scaled, vsplat(load_f32(scales + 8 * i + 4)))
        vstore(s + i * s_stride, vfma(scaled, gain, vsplat(hsum(shift))))


@njit
def _page_values(n, width, record, lower, w, w_stride, out, bytes_, factors, shifts, centre, factor):
    """out f32[n <= 8][C] += weights . codes of one page; shifts f32[n][16]: what else goes to every channel."""
    scale, mid = vload(record + value_scales(width)), vload(record + value_scales(width) + 64)
    for i in range(n):
        x = vload(w + i * w_stride)
        y = vmul(x, scale)
        top = max(hmax(y), NOTHING)
        whole = vrint(vmul(y, vsplat(np.float32(127.0) / top)))
        store_i8(bytes_ + 16 * i, whole)
        f = top * factor * np.float32(1.0 / 127.0)
        store_f32(factors + 4 * i, f)
        shift = vfma(x, mid, vload(shifts + 64 * i))
        vstore(shifts + 64 * i, vfma(whole, vsplat(-f * centre), shift))
    _add_values(n, bytes_, factors, width, record + value_codes(width), lower, out)


@njit
def _read_keys(n, width, q, pages, first, last, record, stride, lower, lower_stride, spread, s, s_stride, scratch):
    centre, factor = (np.float32(128.0), np.float32(1.0 / 16.0)) if lower else (np.float32(7.5), np.float32(1.0))
    scales, bytes_ = scratch + SCRATCH_FIXED, scratch + SCRATCH_FIXED + 8 * n
    _query_bytes(n, width, q, spread, bytes_, scales, centre, factor)
    for p in range(first, last):
        page, following = load_i32(pages + 4 * p), load_i32(pages + 4 * min(p + 1, last - 1))
        _prefetch(record + following * stride, value_scales(width))
        below = 0
        if lower:
            below = lower + page * lower_stride
            _prefetch(lower + following * lower_stride, 8 * width)
        for i in range(0, n, QUERIES):
            _page_scores(
                min(QUERIES, n - i), width, q + 4 * i * width, bytes_ + i * width, scales + 8 * i,
                record + page * stride, below, s + i * s_stride + 64 * p, s_stride, scratch,
            )  # fmt: skip


@njit
def _read_values(n, width, pages, first, last, record, stride, lower, lower_stride, s, s_stride, acc, scratch):
    """acc of n <= 8 queries += their weights . values of the pages first..last-1."""
    centre, factor = (np.float32(128.0), np.float32(1.0 / 16.0)) if lower else (np.float32(7.5), np.float32(1.0))
    shifts, bytes_, factors = scratch, scratch + 64 * QUERIES, scratch + 80 * QUERIES
    for i in range(n):
        vstore(shifts + 64 * i, vsplat(np.float32(0.0)))
    for p in range(first, last):
        page, following = load_i32(pages + 4 * p), load_i32(pages + 4 * min(p + 1, last - 1))
        _prefetch(record + following * stride + value_scales(width), 8 * width + 128)
        below = 0
        if lower:
            below = lower + page * lower_stride + 8 * width
            _prefetch(lower + following * lower_stride + 8 * width, 8 * width)
        _page_values(
            n, width, record + page * stride, below, s + 64 * p, s_stride, acc, bytes_, factors, shifts, centre, factor
        )
    for i in range(n):
        shift = vsplat(hsum(vload(shifts + 64 * i)))
        for c in range(0, width, 16):
            a = acc + 4 * (i * width + c)
            vstore(a, vadd(vload(a), shift))


@njit
def attend_int4(
    group, width, queries, q_stride, row, rows, offsets, positions, causal, visible_start, visible, committed,
    window, pages, keys, values, page_stride, out, out_stride, q, s, s_stride, acc, layout, layer, kv, kv_heads,
    compact, scratch,
):  # fmt: skip
    """As attention.attend on bf16 pages, with the first `compact` pages of the sequence from the copy in `layout`.

    `layout` int64 [address, layer, page and head stride of the records; the same of the lower bits, or zeros; address
    of spread f32 [layers, kv heads, C]]. `scratch`: SCRATCH_FIXED bytes and C + 8 for each query.
    """
    record = load_i64(layout) + layer * load_i64(layout + 8) + kv * load_i64(layout + 24)
    stride, lower, lower_stride = load_i64(layout + 16), load_i64(layout + 32), load_i64(layout + 48)
    if lower:
        lower += layer * load_i64(layout + 40) + kv * load_i64(layout + 56)
    spread = load_i64(layout + 64) + 4 * width * (layer * kv_heads + kv)
    n = rows * group
    first, last = 1 << 40, 0
    for r in range(rows):
        t = row + r
        low, _, _, _, reach = row_span(t, offsets, positions, causal, visible_start, visible, committed, window)
        first, last = min(first, min(low, committed) // 16), max(last, (reach + 15) // 16)
        for g in range(group):
            for c in range(0, width, 16):
                vstore(q + 4 * ((r * group + g) * width + c), vload(queries + t * q_stride + 4 * (g * width + c)))
    exact = max(first, compact)
    _read_keys(n, width, q, pages, first, exact, record, stride, lower, lower_stride, spread, s, s_stride, scratch)
    _all_scores(True, q, n, width, pages, exact, last, keys, page_stride, s, s_stride)

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
    for i in range(0, n, QUERIES):
        _read_values(
            min(QUERIES, n - i), width, pages, first, exact, record, stride, lower, lower_stride, s + i * s_stride,
            s_stride, acc + 4 * i * width, scratch,
        )  # fmt: skip
    _all_values(True, s, s_stride, n, pages, exact, shared, values, page_stride, width, acc)
    for r in range(rows):
        t = row + r
        for g in range(group):
            i = r * group + g
            si, ai = s + i * s_stride, acc + 4 * i * width
            if not causal:
                start = load_i32(visible_start + 4 * t)
                count = load_i32(visible_start + 4 * (t + 1)) - start
                path = visible + 4 * start
                _add_path(True, si + 4 * tail, path, count, committed, pages, values, page_stride, width, ai)
            scale = vsplat(load_f32(si - 64))
            for c in range(0, width, 16):
                vstore(out + t * out_stride + 4 * (g * width + c), vmul(vload(ai + 4 * c), scale))
