"""Attention over bf16 pages with products of bf16 pairs: AMX tiles, sixteen queries and one page (sixteen places) at a
time, or AVX-512 (attention_dots).

Same plan as attention.attend, with queries and weights rounded to bf16. A row's weighted sum runs over whole pages of
*positions*, in order. Pages that lie wholly in the committed prefix are read from the cache by all rows together; a
tree row's last pages, where its positions are scattered over the provisional region, are first gathered into position
order. So the sums are grouped the same way however the row was computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils

from .attention import row_span, to_position_order
from .attention_dots import scores_by_dots, values_by_dots
from .emit import I8, at, const, emit, i32x16, page_address, prefetch_page, splat_int
from .isa import AMX, HAS_AMX
from .simd import (
    hmax,
    hsum,
    iload,
    istore,
    load_f32,
    load_i32,
    store_bf16,
    store_f32,
    vadd,
    vexp,
    vload,
    vmax,
    vmul,
    vsplat,
    vstore,
    vsub,
)
from .tiles import amx_call, load_tile_config, tile_number, unavailable


@emit(types.void, *[types.int64] * 10)
def _scores(b, q, q_stride, width, pages, first, last, keys, page_stride, out, out_stride):
    """out[16 queries][places] = q . key for the pages first..last-1. A key page is width / 32 tiles."""
    if not HAS_AMX:
        unavailable(b)
        return
    pointer = I8.as_pointer()
    with cgutils.for_range(b, last, start=first) as pages_loop:
        p = pages_loop.index
        base = page_address(b, pages, p, keys, page_stride)
        prefetch_page(b, pages, p, last, keys, page_stride, b.mul(width, const(32)))
        amx_call(b, "llvm.x86.tilezero", tile_number(0))
        with cgutils.for_range(b, b.sdiv(width, const(32))) as loop:
            queries = b.inttoptr(at(b, q, b.mul(loop.index, const(64))), pointer)
            tile = b.inttoptr(at(b, base, b.mul(loop.index, const(1024))), pointer)
            amx_call(b, "llvm.x86.tileloadd64", tile_number(4), queries, q_stride)
            amx_call(b, "llvm.x86.tileloadd64", tile_number(6), tile, const(64))
            amx_call(b, "llvm.x86.tdpbf16ps", tile_number(0), tile_number(4), tile_number(6))
        target = b.inttoptr(at(b, out, b.mul(p, const(64))), pointer)
        amx_call(b, "llvm.x86.tilestored64", tile_number(0), target, out_stride)


def _values(vectors: int) -> Any:
    @emit(types.void, *[types.int64] * 10)
    def kernel(b, weights, w_stride, pages, first, last, values, page_stride, width, out, out_stride):
        """out[16 queries][16 * vectors channels] += weights . values, page by page. Needs the page tiles."""
        if not HAS_AMX:
            unavailable(b)
            return
        pointer = I8.as_pointer()
        row = b.mul(width, const(4))  # bytes of a pair of places

        def tiles(name: str) -> None:
            for v in range(vectors):
                target = b.inttoptr(at(b, out, 64 * v), pointer)
                amx_call(b, name, tile_number(v), target, out_stride)

        tiles("llvm.x86.tileloadd64")
        with cgutils.for_range(b, last, start=first) as loop:
            p = loop.index
            base = page_address(b, pages, p, values, page_stride)
            prefetch_page(b, pages, p, last, values, page_stride, b.mul(width, const(32)))
            source = b.inttoptr(at(b, weights, b.mul(p, const(32))), pointer)
            amx_call(b, "llvm.x86.tileloadd64", tile_number(5), source, w_stride)
            for v in range(vectors):
                amx_call(b, "llvm.x86.tileloadd64", tile_number(7), b.inttoptr(at(b, base, 64 * v), pointer), row)
                amx_call(b, "llvm.x86.tdpbf16ps", tile_number(v), tile_number(5), tile_number(7))
        tiles("llvm.x86.tilestored64")

    return kernel


_values_4, _values_2 = _values(4), _values(2)


@emit(i32x16, i32x16, types.int64, i32x16, types.int64)
def _pair(b, even, even_lane, odd, odd_lane):
    """Sixteen pairs from halves of others: the low halves from `even`, the high ones from `odd`; lanes say which."""
    one = const(1)
    from_high = b.icmp_signed("==", b.and_(even_lane, one), one)
    to_high = b.icmp_signed("==", b.and_(odd_lane, one), one)
    low = b.select(from_high, b.lshr(even, splat_int(16)), b.and_(even, splat_int(0xFFFF)))
    high = b.select(to_high, b.and_(odd, splat_int(-65536)), b.shl(odd, splat_int(16)))
    return b.or_(low, high)


@njit
def _all_scores(level, q, n, width, pages, first, last, keys, page_stride, out, out_stride):
    if level != AMX:
        scores_by_dots(q, n, width, pages, first, last, keys, page_stride, out, out_stride)
        return
    for i in range(0, n, 16):
        qi, oi = q + 2 * i * width, out + i * out_stride
        _scores(qi, 2 * width, width, pages, first, last, keys, page_stride, oi, out_stride)


@njit
def _all_values(level, weights, w_stride, n, pages, first, last, values, page_stride, width, out):
    if level != AMX:
        values_by_dots(weights, w_stride, n, pages, first, last, values, page_stride, width, out)
        return
    for i in range(0, n, 16):
        c = 0
        w = weights + i * w_stride
        while c < width:
            base, oi = values + c * 4, out + (i * width + c) * 4
            if width - c >= 64:
                _values_4(w, w_stride, pages, first, last, base, page_stride, width, oi, width * 4)
                c += 64
            else:
                _values_2(w, w_stride, pages, first, last, base, page_stride, width, oi, width * 4)
                c += 32


@njit
def _softmax(s, low, end, first, last):
    """Scores low..end-1 to bf16 exponentials in place, zeros elsewhere in pages first..last-1; returns 1 / their sum.

    Sixteen bf16 take half the space of the sixteen scores they come from, so nothing is overwritten before it is read.
    """
    begin, stop = low // 16, (end + 15) // 16
    for i in range(begin * 16, low):
        store_f32(s + 4 * i, np.float32(-np.inf))
    for i in range(end, stop * 16):
        store_f32(s + 4 * i, np.float32(-np.inf))
    peak = vload(s + 64 * begin)
    for i in range(begin + 1, stop):
        peak = vmax(vload(s + 64 * i), peak)
    top = vsplat(hmax(peak))
    zero = vsplat(np.float32(0.0))
    total = zero
    for i in range(first, begin):
        store_bf16(s + 32 * i, zero)
    for i in range(begin, stop):
        e = vexp(vsub(vload(s + 64 * i), top))
        store_bf16(s + 32 * i, e)
        total = vadd(e, total)
    for i in range(stop, last):
        store_bf16(s + 32 * i, zero)
    return np.float32(1.0) / hsum(total)


@njit(inline="always")
def _place(position, committed, end, path):
    """Where a position of a tree row lies in the cache; past the row's end any written place will do."""
    if position < committed:
        return position
    return committed + load_i32(path + 4 * (min(position, end - 1) - committed))


@njit
def _gather_page(p, committed, end, path, pages, values, page_stride, width, out):
    """Page p of a tree row's values in position order."""
    for pair in range(8):
        a = _place(16 * p + 2 * pair, committed, end, path)
        b = _place(16 * p + 2 * pair + 1, committed, end, path)
        source_a = values + load_i32(pages + 4 * (a // 16)) * page_stride + 4 * width * (a % 16 // 2)
        source_b = values + load_i32(pages + 4 * (b // 16)) * page_stride + 4 * width * (b % 16 // 2)
        target = out + 4 * width * pair
        for c in range(0, width, 16):
            istore(target + 4 * c, _pair(iload(source_a + 4 * c), a, iload(source_b + 4 * c), b))


@njit
def _add_path(level, weights, w_stride, group, committed, end, path, pages, values, page_stride, width, acc, spare):
    """acc += weights . values over the pages from the committed prefix's last, whole one on, for one tree row."""
    gathered, tile, table = spare, spare + 32 * width, spare + 32 * width + 64 * width
    for p in range(committed // 16, (end + 15) // 16):
        _gather_page(p, committed, end, path, pages, values, page_stride, width, gathered)
        for i in range(0, group, 16):
            rows = min(16, group - i)
            for j in range(0, rows * width, 16):
                vstore(tile + 4 * j, vload(acc + 4 * (i * width + j)))
            # one page, at index 0 of a table that holds 0
            _all_values(level, weights + i * w_stride + 32 * p, w_stride, rows, table, 0, 1, gathered, 0, width, tile)
            for j in range(0, rows * width, 16):
                vstore(acc + 4 * (i * width + j), vload(tile + 4 * j))


@njit
def attend_pairs(
    level, group, width, queries, q_stride, row, rows, offsets, positions, causal, visible_start, visible, committed,
    window, pages, keys, values, page_stride, out, out_stride, q, s, s_stride, acc, spare, tiles, page_tiles,
):  # fmt: skip
    """As attention.attend, on bf16 pages; `q` and `acc` have space for sixteen queries more than rows * group.

    `spare`: 100 * width bytes whose last four are zero. `tiles`, `page_tiles`: the two tile configurations; the first
    is in force at entry and at exit.
    """
    n = rows * group
    first, last = 1 << 40, 0
    for r in range(rows):
        t = row + r
        low, _, _, _, reach = row_span(t, offsets, positions, causal, visible_start, visible, committed, window)
        first, last = min(first, min(low, committed) // 16), max(last, (reach + 15) // 16)
        for g in range(group):
            i = r * group + g
            for c in range(0, width, 16):
                store_bf16(q + 2 * (i * width + c), vload(queries + t * q_stride + 4 * (g * width + c)))
    _all_scores(level, q, n, width, pages, first, last, keys, page_stride, s, s_stride)

    shared = last if causal else max(first, committed // 16)
    zero = vsplat(np.float32(0.0))
    for r in range(rows):
        t = row + r
        low, end, start, count, _ = row_span(t, offsets, positions, causal, visible_start, visible, committed, window)
        for g in range(group):
            i = r * group + g
            si = s + i * s_stride
            to_position_order(si, start, count, visible, committed)
            store_f32(si - 64, _softmax(si, low, end, first, shared))
            for c in range(0, width, 16):
                vstore(acc + 4 * (i * width + c), zero)
    if level == AMX:
        load_tile_config(page_tiles)
    _all_values(level, s, s_stride, n, pages, first, shared, values, page_stride, width, acc)
    for r in range(rows):
        t = row + r
        first_query = r * group
        if not causal:
            start = load_i32(visible_start + 4 * t)
            end = committed + load_i32(visible_start + 4 * (t + 1)) - start
            _add_path(
                level, s + first_query * s_stride, s_stride, group, committed, end, visible + 4 * start, pages, values,
                page_stride, width, acc + 4 * first_query * width, spare,
            )  # fmt: skip
        for g in range(group):
            i = first_query + g
            scale = vsplat(load_f32(s + i * s_stride - 64))
            for c in range(0, width, 16):
                vstore(out + t * out_stride + 4 * (g * width + c), vmul(vload(acc + 4 * (i * width + c)), scale))
    if level == AMX:
        load_tile_config(tiles)
