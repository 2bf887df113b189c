"""Matrix products with weights that stay in their file's blocks: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K.

Two panels of sixteen outputs are unpacked (unpack.py), up to 256 depths at a time, and multiplied by all rows before
the next 256. Activations are int8 with a scale for 32 depths; with the sums that formats with an offset or a minimum
need, a block of a row is X_BLOCK bytes: 256 int8, then

  negated sums of 16 depths, i32[16]    negated sums of 32, i32[8]    scales of 32, f32[8]    scale x sum of 32, f32[8]

A row's blocks lie apart by a stride, the rows of one block one behind the other.

A product is exact in integers within a group of 16 or 32 depths; groups are added in float32 in rising order. The same
order for every number of rows, on every processor, so the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils

from . import dots
from .arguments import (
    A_FIRST,
    A_FIRST_ROW,
    A_LAST,
    A_MODE,
    A_OTHER,
    A_OUT,
    A_OUT_STRIDE,
    A_ROW_SCALES,
    A_ROWS,
    A_SCRATCH,
    A_X,
    A_X_STRIDE,
    EMBED,
    S_BIAS,
    S_STEPS,
    S_W,
)
from .barrier import get
from .compiled import made_for
from .emit import F32, LANES, Accumulators, at, const, emit, fma, load, rolled, splat, store
from .linear import KIND_F32, epilogue
from .simd import (
    hmax,
    hsum,
    kept_apart,
    load_f32,
    load_u8,
    store_f32,
    store_i8,
    store_i32,
    vabs,
    vload,
    vmax,
    vmul,
    vrint,
    vsplat,
    vstore,
)
from .unpack import (
    MINIMA,
    SCALES,
    UNPACKED,
    unpack_q4_0,
    unpack_q4_1,
    unpack_q4_k,
    unpack_q5_0,
    unpack_q5_1,
    unpack_q5_k,
    unpack_q6_k,
    unpack_q8_0,
)

TINY = np.float32(1e-30)  # values below it count as zero: 127 over a denormal number is infinite
X_BLOCK = 448
X_SUMS_16, X_SUMS_32, X_SCALES, X_FLOAT_SUMS = 256, 320, 352, 384
DEPTHS = 256
ACC_ROW = 128  # bytes: a row's 2 x 16 sums
FOUR_ROWS = dots.LANES == LANES  # with fewer lanes there are no registers for four rows
ROWS = 64  # that are multiplied before the next panels

BLOCK_SCRATCH = ROWS * ACC_ROW + 2 * UNPACKED


def _dots(rows: int, group: int, bits: int, minima: bool) -> Callable[..., Any]:
    """(x, steps, unpacked, acc): `rows` rows x two panels over `steps` x 64 depths, added to `acc`.

    `group`: depths that share a scale; `bits`: of the file's integers, whose offset is half their range unless they
    have minima.
    """

    @emit(types.void, *[types.int64] * 4)
    def kernel(b, x, steps, unpacked, acc):
        lanes = dots.LANES
        floats, parts = ir.VectorType(F32, lanes), LANES // lanes * 2
        part = Accumulators(b, rows * parts, floats)
        xs = [at(b, x, X_BLOCK * r) for r in range(rows)]
        # a part: some outputs of one of the two panels
        us = [at(b, unpacked, UNPACKED * (n * lanes // LANES) + 4 * (n * lanes % LANES)) for n in range(parts)]
        sums_at = [at(b, acc, ACC_ROW * r + 4 * lanes * n) for r in range(rows) for n in range(parts)]
        for i, place in enumerate(sums_at):
            part[i] = load(b, place, floats)
        sums, per_32 = (X_SUMS_16 if group == 16 else X_SUMS_32), 32 // group
        totals = dots.Totals(b, bits, rows * parts)
        with cgutils.for_range(b, b.mul(steps, const(2))) as loop:  # 32 depths
            depth, vectors = b.mul(loop.index, const(32)), b.mul(loop.index, const(512))
            factors, small = b.mul(loop.index, const(64 * per_32)), b.mul(loop.index, const(4))
            scaled: list[ir.Value] = []
            for g in range(per_32):
                starts = []
                for x_r in xs:
                    negated = None if minima else at(b, at(b, x_r, b.mul(small, const(per_32))), sums + 4 * g)
                    starts += [dots.start(b, bits, negated)] * parts
                totals.begin(starts)
                step = dots.Totals.STEP[bits]
                vectors_at, depth_at = at(b, vectors, 16 * group * g), at(b, depth, group * g)
                with rolled(b, group // 4 // step) as turn:
                    first_v, first_x = (
                        at(b, p, b.mul(turn, const(n * step))) for p, n in ((vectors_at, 64), (depth_at, 4))
                    )
                    weights = [
                        [dots.load_weights(b, at(b, at(b, u, first_v), 64 * v)) for v in range(step)] for u in us
                    ]
                    for r, x_r in enumerate(xs):
                        x4 = [dots.load_activations(b, at(b, at(b, x_r, first_x), 4 * v)) for v in range(step)]
                        for n in range(parts):
                            totals.add(r * parts + n, weights[n], x4)
                whole = [b.sitofp(totals.sum(i), floats) for i in range(rows * parts)]
                if per_32 > 1:
                    scales = [load(b, at(b, at(b, u, factors), SCALES + 64 * g), floats) for u in us] * rows
                    whole = [b.fmul(w, s) for w, s in zip(whole, scales, strict=True)]
                    scaled = [b.fadd(s, w) for s, w in zip(scaled, whole, strict=True)] if scaled else whole
                else:
                    scaled = whole
            for r in range(rows):
                scale = splat(b, load(b, at(b, at(b, xs[r], small), X_SCALES), F32), lanes)
                for n in range(parts):
                    i = r * parts + n
                    if per_32 > 1:
                        part[i] = fma(b, scaled[i], scale, part[i])
                    else:
                        factor = load(b, at(b, at(b, us[n], factors), SCALES), floats)
                        part[i] = fma(b, b.fmul(scaled[i], scale), factor, part[i])
                if minima:
                    total = splat(b, load(b, at(b, at(b, xs[r], small), X_FLOAT_SUMS), F32), lanes)
                    for n in range(parts):
                        i = r * parts + n
                        part[i] = fma(b, total, load(b, at(b, at(b, us[n], factors), MINIMA), floats), part[i])
        for i, place in enumerate(sums_at):
            store(b, place, part[i])

    return kernel


_TILES = (1, 2, 4)  # rows of the micro-kernels
four_1, four_2, four_4 = (_dots(n, 32, 4, False) for n in _TILES)
five_1, five_2, five_4 = (_dots(n, 32, 5, False) for n in _TILES)
six_1, six_2, six_4 = (_dots(n, 16, 6, False) for n in _TILES)
eight_1, eight_2, eight_4 = (_dots(n, 32, 8, False) for n in _TILES)
four_minima_1, four_minima_2, four_minima_4 = (_dots(n, 32, 4, True) for n in _TILES)
five_minima_1, five_minima_2, five_minima_4 = (_dots(n, 32, 5, True) for n in _TILES)


def _rows(name: str, one: Any, two: Any, four: Any) -> Any:
    """All rows of a block by micro-kernels of four, two and one."""

    @made_for(name)
    def multiply(rows, x, steps, unpacked, acc):
        kept_apart()
        r = 0
        while FOUR_ROWS and rows - r >= 4:
            four(x + X_BLOCK * r, steps, unpacked, acc + ACC_ROW * r)
            r += 4
        while rows - r >= 2:
            two(x + X_BLOCK * r, steps, unpacked, acc + ACC_ROW * r)
            r += 2
        if rows > r:
            one(x + X_BLOCK * r, steps, unpacked, acc + ACC_ROW * r)

    return multiply


def _product(name: str, unpack: Any, unit_steps: int, unit_bytes: int, multiply: Any, offset: int) -> Any:
    """A kernel (see arguments.py): products with weights of one format, and rows of an embedding in it.

    `unit_steps` x 64 depths of a panel are `unit_bytes`; `offset` 0: the format has minima.
    """
    step_bytes, minus = unit_bytes // unit_steps, np.float32(offset)
    group = 16 if name == "Q6_K" else 32

    @made_for(name)
    def unpack_steps(w, steps, out):
        kept_apart()
        for s in range(0, steps, unit_steps):
            unpack(w + step_bytes * s, out + 1024 * s, out + SCALES + 128 * s)

    @made_for(name)
    def two_panels(rows, x, x_stride, w0, w1, steps, scratch):
        """Up to ROWS rows x two panels; the sums f32[rows][2][16] are at the beginning of `scratch` (BLOCK_SCRATCH
        bytes). `x`: the rows' first block; `x_stride` bytes from block to block."""
        kept_apart()
        zero = vsplat(np.float32(0.0))
        for r in range(rows):
            vstore(scratch + ACC_ROW * r, zero)
            vstore(scratch + ACC_ROW * r + 64, zero)
        unpacked = scratch + ROWS * ACC_ROW
        for s in range(0, steps, 4):
            now = min(4, steps - s)
            unpack_steps(w0 + step_bytes * s, now, unpacked)
            unpack_steps(w1 + step_bytes * s, now, unpacked + UNPACKED)
            multiply(rows, x + s // 4 * x_stride, now, unpacked, scratch)

    @made_for(name)
    def embed(w, steps, output, scale, width, out, spare):
        """Weights of one output x `scale`, f32[width]."""
        panel, lane = w + output // 16 * step_bytes * steps, output % 16
        for s in range(0, steps, 4):
            unpack_steps(panel + step_bytes * s, min(4, steps - s), spare)
            for d in range(min(256, width - 64 * s)):
                at = 64 * (d // group) + 4 * lane
                value = np.float32(load_u8(spare + 64 * (d // 4) + 4 * lane + d % 4)) - minus
                value *= load_f32(spare + SCALES + at)
                if offset == 0:
                    value += load_f32(spare + MINIMA + at)
                store_f32(out + 4 * (64 * s + d), value * scale)

    @made_for(name)
    def product(segment, a):
        other, mode, rows = get(a, A_OTHER), get(a, A_MODE), get(a, A_ROWS)
        x, stride, first_row = get(a, A_X), get(a, A_X_STRIDE), get(a, A_FIRST_ROW)
        w, bias, steps = get(segment, S_W), get(segment, S_BIAS), get(segment, S_STEPS)
        out, out_stride, scratch = get(a, A_OUT), get(a, A_OUT_STRIDE), get(a, A_SCRATCH)
        p, last, size = get(a, A_FIRST), get(a, A_LAST), step_bytes * steps
        if mode == EMBED:
            embed(w, steps, p, load_f32(get(a, A_ROW_SCALES)), out_stride // 4, out, scratch)
            return
        while p < last:
            panels = 2 if other != 0 else min(2, last - p)
            second = get(other, S_W) + p * size if other != 0 else w + (p + panels - 1) * size
            b_at = bias + 64 * p if bias != 0 else 0
            for m in range(0, rows, ROWS):
                n = min(ROWS, rows - m)
                two_panels(n, x + X_BLOCK * (first_row + m), stride, w + p * size, second, steps, scratch)
                target = out + m * out_stride + 64 * p
                epilogue(KIND_F32, mode, 0, n, panels, scratch, ACC_ROW, 0, 0, b_at, target, out_stride)
            p += 1 if other != 0 else panels

    return product


_four, _five = _rows("four", four_1, four_2, four_4), _rows("five", five_1, five_2, five_4)
_six, _eight = _rows("six", six_1, six_2, six_4), _rows("eight", eight_1, eight_2, eight_4)
_four_minima = _rows("four_minima", four_minima_1, four_minima_2, four_minima_4)
_five_minima = _rows("five_minima", five_minima_1, five_minima_2, five_minima_4)

_q4_0 = _product("Q4_0", unpack_q4_0, 1, 576, _four, 8)
_q4_1 = _product("Q4_1", unpack_q4_1, 1, 640, _four_minima, 0)
_q5_0 = _product("Q5_0", unpack_q5_0, 1, 704, _five, 16)
_q5_1 = _product("Q5_1", unpack_q5_1, 1, 768, _five_minima, 0)
_q8_0 = _product("Q8_0", unpack_q8_0, 1, 1088, _eight, 128)
_q4_k = _product("Q4_K", unpack_q4_k, 4, 2304, _four_minima, 0)
_q5_k = _product("Q5_K", unpack_q5_k, 4, 2816, _five_minima, 0)
_q6_k = _product("Q6_K", unpack_q6_k, 4, 3392, _six, 32)


def q4_0(segment: int, a: int) -> None:
    _q4_0(segment, a)


def q4_1(segment: int, a: int) -> None:
    _q4_1(segment, a)


def q5_0(segment: int, a: int) -> None:
    _q5_0(segment, a)


def q5_1(segment: int, a: int) -> None:
    _q5_1(segment, a)


def q8_0(segment: int, a: int) -> None:
    _q8_0(segment, a)


def q4_k(segment: int, a: int) -> None:
    _q4_k(segment, a)


def q5_k(segment: int, a: int) -> None:
    _q5_k(segment, a)


def q6_k(segment: int, a: int) -> None:
    _q6_k(segment, a)


#: Kernels by the names of formats; compiled.address_of compiles one
KERNELS = {
    "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k,
}  # fmt: skip


@njit(inline="always")
def _within(x, i, width):
    return vload(x + 4 * i) if i < width else vsplat(np.float32(0.0))


@njit
def pack_blocks(x, width, out, stride, row):
    """f32[width] at `x` as blocks; `out`: block 0 of row 0, `stride` bytes from block to block. Depths up to the next
    multiple of 64 are zero."""
    kept_apart()
    for i in range(0, (width + 63) // 64 * 64, 32):
        a, b = _within(x, i, width), _within(x, i + 16, width)
        largest = hmax(vmax(vabs(a), vabs(b)))
        factor = np.float32(0.0)
        if largest > TINY:
            factor = np.float32(127.0) / largest
        a, b = vrint(vmul(a, vsplat(factor))), vrint(vmul(b, vsplat(factor)))
        block, at = out + i // 256 * stride + X_BLOCK * row, i % 256
        store_i8(block + at, a)
        store_i8(block + at + 16, b)
        low, high = hsum(a), hsum(b)
        scale = largest / np.float32(127.0)
        store_i32(block + X_SUMS_16 + at // 4, np.int64(-low))
        store_i32(block + X_SUMS_16 + at // 4 + 4, np.int64(-high))
        store_i32(block + X_SUMS_32 + at // 8, np.int64(-(low + high)))
        store_f32(block + X_SCALES + at // 8, scale)
        store_f32(block + X_FLOAT_SUMS + at // 8, scale * (low + high))
