"""Candidates of a draw: kept by a cut, by number (top-k) or by mass (top-p); sixteen lanes at a time.

Candidates are two arrays, weights f32[m] and ids i32[m], with room for a vector behind them.
"""

from __future__ import annotations

import llvmlite.ir as ir
import numpy as np
from numba import njit, types

from .emit import F32, I16, I32, I64, LANES, VF, VI, call, const, emit, f32x16, i32x16, splat, store, vector_type
from .isa import HAS_VNNI
from .simd import iload, load_f32, store_f32, vload, vsplat, vstore

_FEW = 64  # candidates between two cuts that are worth sorting
_ONE = 0x3F800000  # bits of 1.0
_VD = ir.VectorType(ir.DoubleType(), 8)
f64x8 = vector_type("f64x8", _VD)


@emit(f64x8)
def nothing(b):
    return ir.Constant(_VD, None)


@emit(f64x8, f64x8, f32x16)
def add_low(b, total, v):
    """total + the lower eight lanes of v, in float64"""
    half = b.shuffle_vector(v, v, ir.Constant(ir.VectorType(I32, 8), list(range(8))))
    return b.fadd(total, b.fpext(half, _VD))


@emit(f64x8, f64x8, f32x16)
def add_high(b, total, v):
    half = b.shuffle_vector(v, v, ir.Constant(ir.VectorType(I32, 8), list(range(8, 16))))
    return b.fadd(total, b.fpext(half, _VD))


@emit(types.float64, f64x8, f64x8)
def all_lanes(b, low, high):
    """All lanes, by halves in a fixed order."""
    total = b.fadd(low, high)
    for width in (4, 2, 1):
        order = ir.Constant(ir.VectorType(I32, 8), [i ^ width for i in range(8)])
        total = b.fadd(total, b.shuffle_vector(total, total, order))
    return b.extract_element(total, const(0, I32))


@emit(types.int64, f32x16, f32x16)
def count_from(b, v, cut):
    """How many lanes are at least `cut`."""
    mask = b.bitcast(b.fcmp_ordered(">=", v, cut), I16)
    return b.zext(call(b, "llvm.ctpop.i16", I16, mask), I64)


@emit(f32x16, f32x16, f32x16)
def only_from(b, v, cut):
    """Lanes below `cut` become zero."""
    return b.select(b.fcmp_ordered(">=", v, cut), v, ir.Constant(VF, None))


@emit(i32x16, types.int64)
def numbers(b, first):
    """first, first + 1, ..."""
    return b.add(splat(b, b.trunc(first, I32)), ir.Constant(VI, list(range(LANES))))


def _compress(b: ir.IRBuilder, target: ir.Value, v: ir.Value, mask: ir.Value, kind: str) -> None:
    """Write the lanes of the mask one behind the other. A whole vector is written: what lies behind is lost."""
    if HAS_VNNI:  # to a register and then to memory: at once is slow on some processors
        store(b, target, call(b, f"llvm.x86.avx512.mask.compress.v16{kind}", v.type, v, v, mask))
    else:
        pointer = b.inttoptr(target, v.type.element.as_pointer())
        call(b, f"llvm.masked.compressstore.v16{kind}", ir.VoidType(), v, pointer, mask)


@emit(types.int64, types.int64, types.int64, f32x16, i32x16, f32x16)
def append_from(b, values, ids, v, numbers, cut):
    """Write the lanes of v that are at least `cut` to `values`, and those of `numbers` to `ids`. How many."""
    mask = b.fcmp_ordered(">=", v, cut)
    _compress(b, values, v, mask, "f32")
    _compress(b, ids, numbers, mask, "i32")
    return b.zext(call(b, "llvm.ctpop.i16", I16, b.bitcast(mask, I16)), I64)


@emit(types.int64, types.int64, types.int64, f32x16, f32x16)
def part(b, above, below, v, cut):
    """Write the lanes of v that are at least `cut` to `above`, the others to `below`. How many are above."""
    mask = b.fcmp_ordered(">=", v, cut)
    for target, chosen in ((above, mask), (below, b.not_(mask))):
        _compress(b, target, v, chosen, "f32")
    return b.zext(call(b, "llvm.ctpop.i16", I16, b.bitcast(mask, I16)), I64)


@emit(types.float32, types.int64)
def float_of(b, bits):
    return b.bitcast(b.trunc(bits, I32), F32)


@emit(types.int64, types.float32)
def bits_of(b, value):
    return b.zext(b.bitcast(value, I32), I64)


@njit
def select(x, n, k):
    """The k-th largest (from 1) of x f32[n], which is reordered."""
    low, high, wanted = 0, n - 1, k - 1
    while low < high:
        pivot = load_f32(x + 4 * ((low + high) // 2))
        i, j = low, high
        while i <= j:
            while load_f32(x + 4 * i) > pivot:
                i += 1
            while load_f32(x + 4 * j) < pivot:
                j -= 1
            if i <= j:
                a, b = load_f32(x + 4 * i), load_f32(x + 4 * j)
                store_f32(x + 4 * i, b)
                store_f32(x + 4 * j, a)
                i += 1
                j -= 1
        if wanted <= j:
            high = j
        elif wanted >= i:
            low = i
        else:
            break
    return load_f32(x + 4 * wanted)


@njit
def pad(x, n):
    """Zeros behind x[n], up to the next vector."""
    for i in range(n, (n + LANES) // LANES * LANES):
        store_f32(x + 4 * i, np.float32(0.0))


@njit
def keep_from(weights, ids, m, cut):
    """Of m candidates those whose weight is at least `cut`, moved to the beginning: how many."""
    kept, by = 0, vsplat(cut)
    for i in range(m, (m + LANES) // LANES * LANES):  # the last vector's other lanes must not pass
        store_f32(weights + 4 * i, np.float32(-np.inf))
    for i in range(0, m, LANES):
        v = vload(weights + 4 * i)
        if count_from(v, by) > 0:
            kept += append_from(weights + 4 * kept, ids + 4 * kept, v, iload(ids + 4 * i), by)
    return kept


@njit
def nucleus_cut(weights, m, floor, goal, spare, other):
    """The weight of the last of the fewest heaviest candidates that together reach `goal`; `weights` f32[m], between
    `floor` and 1.

    Candidates are parted by the middle of the interval of float32 bit patterns in which the cut must lie, and those on
    the wrong side are dropped, until few are left.
    """
    low, high, above, n = bits_of(floor), _ONE + 1, 0.0, m
    for i in range(0, m, LANES):
        vstore(spare + 4 * i, vload(weights + 4 * i))
    while high - low > 1 and n > _FEW:
        middle = (low + high) // 2
        cut, heavy, light = vsplat(float_of(middle)), 0, 0
        low_mass, high_mass = nothing(), nothing()
        for i in range(n, (n + LANES) // LANES * LANES):  # the last vector's other lanes are light, and not counted
            store_f32(spare + 4 * i, np.float32(-1.0))
        for i in range(0, n, LANES):
            v = vload(spare + 4 * i)
            mass = only_from(v, cut)
            low_mass, high_mass = add_low(low_mass, mass), add_high(high_mass, mass)
            more = part(spare + 4 * heavy, other + 4 * light, v, cut)
            heavy += more
            light += LANES - more
        found = above + all_lanes(low_mass, high_mass)
        if found >= goal:
            low, n = middle, heavy
        else:
            high, above, n = middle, found, n - heavy
            spare, other = other, spare
    if high - low <= 1:
        return float_of(low)
    for i in range(1, n):  # insertion sort, falling
        w, j = load_f32(spare + 4 * i), i
        while j > 0 and load_f32(spare + 4 * (j - 1)) < w:
            store_f32(spare + 4 * j, load_f32(spare + 4 * (j - 1)))
            j -= 1
        store_f32(spare + 4 * j, w)
    cut = float_of(low)
    for i in range(n):
        cut = load_f32(spare + 4 * i)
        above += cut
        if above >= goal:
            break
    return cut
