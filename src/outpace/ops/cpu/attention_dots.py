"""Products of attention over bf16 pages with AVX-512's dot product of bf16 pairs: queries . keys, weights . values.

The instruction adds both products of a pair to a float32 and takes denormal numbers for zero, so its bits are not those
of a chain of float32 multiply-adds. Pairs are summed in rising order, whatever the number of queries.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import njit, types
from numba.core import cgutils

from .emit import (
    I32,
    LANES,
    VF,
    VI,
    Accumulators,
    at,
    call,
    const,
    emit,
    load,
    page_address,
    prefetch_page,
    splat,
    store,
)
from .isa import HAS_BF16
from .tiles import unavailable


def _dot(b: ir.IRBuilder, acc: ir.Value, pairs: ir.Value, pair: ir.Value) -> ir.Value:
    """acc[16] += both products of `pairs`[16] with one pair."""
    return call(b, "llvm.x86.avx512bf16.dpbf16ps.512", VF, acc, pairs, splat(b, pair))


def _scores(queries: int) -> Any:
    @emit(types.void, *[types.int64] * 10)
    def kernel(b, q, q_stride, width, pages, first, last, keys, page_stride, out, out_stride):
        """out[queries][places] = q . key for the pages first..last-1."""
        if not HAS_BF16:
            unavailable(b)
            return
        acc = Accumulators(b, queries)
        qs = [at(b, q, b.mul(q_stride, const(i))) for i in range(queries)]
        outs = [at(b, out, b.mul(out_stride, const(i))) for i in range(queries)]
        with cgutils.for_range(b, last, start=first) as pages_loop:
            p = pages_loop.index
            base = page_address(b, pages, p, keys, page_stride)
            prefetch_page(b, pages, p, last, keys, page_stride, b.mul(width, const(32)))
            acc.zero()
            with cgutils.for_range(b, b.sdiv(width, const(2))) as loop:
                pairs = load(b, at(b, base, b.mul(loop.index, const(4 * LANES))), VI)
                for i in range(queries):
                    acc[i] = _dot(b, acc[i], pairs, load(b, at(b, qs[i], b.mul(loop.index, const(4))), I32))
            for i in range(queries):
                store(b, at(b, outs[i], b.mul(p, const(4 * LANES))), acc[i])

    return kernel


def _values(queries: int, vectors: int) -> Any:
    @emit(types.void, *[types.int64] * 10)
    def kernel(b, weights, w_stride, pages, first, last, values, page_stride, width, out, out_stride):
        """out[queries][16 * vectors channels] += weights . values, page by page."""
        if not HAS_BF16:
            unavailable(b)
            return
        acc = Accumulators(b, queries * vectors)
        ws = [at(b, weights, b.mul(w_stride, const(i))) for i in range(queries)]
        outs = [at(b, out, b.mul(out_stride, const(i))) for i in range(queries)]
        for i in range(queries):
            for v in range(vectors):
                acc[i * vectors + v] = load(b, at(b, outs[i], 4 * LANES * v), VF)
        with cgutils.for_range(b, last, start=first) as pages_loop:
            p = pages_loop.index
            base = page_address(b, pages, p, values, page_stride)
            prefetch_page(b, pages, p, last, values, page_stride, b.mul(width, const(32)))
            with cgutils.for_range(b, const(LANES // 2)) as loop:
                row = at(b, base, b.mul(b.mul(loop.index, width), const(4)))
                pairs = [load(b, at(b, row, 4 * LANES * v), VI) for v in range(vectors)]
                place = b.add(b.mul(p, const(2 * LANES)), b.mul(loop.index, const(4)))
                for i in range(queries):
                    weight = load(b, at(b, ws[i], place), I32)
                    for v in range(vectors):
                        acc[i * vectors + v] = _dot(b, acc[i * vectors + v], pairs[v], weight)
        for i in range(queries):
            for v in range(vectors):
                store(b, at(b, outs[i], 4 * LANES * v), acc[i * vectors + v])

    return kernel


_scores_16, _scores_8, _scores_4 = (_scores(n) for n in (16, 8, 4))
_values_8x2, _values_4x4 = _values(8, 2), _values(4, 4)


@njit
def scores_by_dots(q, n, width, pages, first, last, keys, page_stride, out, out_stride):
    """out[n queries][places] = q . key for the pages first..last-1; may write up to fifteen rows more."""
    i = 0
    while i < n:
        qi, oi, qs = q + 2 * i * width, out + i * out_stride, 2 * width
        if n - i > 8:
            _scores_16(qi, qs, width, pages, first, last, keys, page_stride, oi, out_stride)
            i += 16
        elif n - i > 4:
            _scores_8(qi, qs, width, pages, first, last, keys, page_stride, oi, out_stride)
            i += 8
        else:
            _scores_4(qi, qs, width, pages, first, last, keys, page_stride, oi, out_stride)
            i += 4


@njit
def values_by_dots(weights, w_stride, n, pages, first, last, values, page_stride, width, out):
    """out[n queries][width] += weights . values; may change up to seven rows more. `width`: a multiple of 32."""
    i = 0
    while i < n:
        w, few, c = weights + i * w_stride, n - i <= 4, 0
        while c < width:
            base, oi, os = values + c * 4, out + (i * width + c) * 4, width * 4
            if few and width - c >= 64:
                _values_4x4(w, w_stride, pages, first, last, base, page_stride, width, oi, os)
                c += 64
            else:
                _values_8x2(w, w_stride, pages, first, last, base, page_stride, width, oi, os)
                c += 32
        i += 4 if few else 8
