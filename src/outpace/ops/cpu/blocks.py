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

from . import dots, isa
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
from .emit import F32, LANES, Accumulators, at, const, emit, fma, load, opaque, splat, store
from .groups import groups, load_scale, start_word
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
    vadd,
    vload,
    vmax,
    vmul,
    vrint,
    vsplat,
    vstore,
)
from .unpack import (
    BYTES,
    INTEGERS,
    MINIMA,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    UNPACKED,
    WHOLE,
    Integers,
    Packing,
    factors_of,
    integers_of,
)

TINY = np.float32(1e-30)  # values below it count as zero: 127 over a denormal number is infinite
X_BLOCK = 448
X_SUMS_16, X_SUMS_32, X_SCALES, X_FLOAT_SUMS = 256, 320, 352, 384
ACC_ROW = 128  # bytes: a row's 2 x 16 sums
ROWS = 128  # that are multiplied before the next panels

BLOCK_SCRATCH = ROWS * ACC_ROW + 2 * UNPACKED

# A tile is some rows x one or two panels, as registers allow: there are 16 of 256 bits, or 32 of 512 or 128.
_PANELS = 1 if dots.LANES == 8 else 2
_MANY = 2 if dots.LANES == 4 else 1 if isa.DOT == isa.PORTABLE else 4  # rows of the tile for many rows
_UNPACK_FROM = {4: 32 if dots.LANES == 8 else 4}  # rows, by bits; fewer take integers out of the file's bits on the way
_TOGETHER_FROM = 32  # rows from which activations are read once for two panels, where a tile has one


def _tile(form: Packing, rows: int, integers: Integers) -> Callable[..., Any]:
    """(x, steps, w0, w1, unpacked, acc): `rows` rows x _PANELS panels over `steps` x 64 depths, added to `acc`.

    `w0`, `w1`: the panels' integers; `unpacked`: their scales and minima.
    """

    @emit(types.void, *[types.int64] * 6)
    def kernel(b, x, steps, w0, w1, unpacked, acc):
        lanes, floats = dots.LANES, ir.VectorType(F32, dots.LANES)
        parts = LANES // lanes * _PANELS  # a part: some outputs of one panel
        each = [(r, n) for r in range(rows) for n in range(parts)]
        per_panel = LANES // lanes
        firsts = [4 * (n * lanes % LANES) for n in range(parts)]  # its first output's place in a vector, in bytes
        places = [UNPACKED * (n // per_panel) + first for n, first in enumerate(firsts)]
        sums_at = [at(b, acc, ACC_ROW * r + 4 * lanes * n) for r, n in each]
        part = Accumulators(b, len(each), floats)
        for i, place in enumerate(sums_at):
            part[i] = ir.Constant(floats, None) if form.is_whole else load(b, place, floats)
        sums = groups(b, form.bits, form.offset == 0, form.group, len(each))
        per_32 = 32 // form.group
        x_words = X_SUMS_16 if per_32 > 1 else X_SUMS_32

        def ahead(start: ir.Value, each_step: int, behind: int = 0) -> ir.Value:
            return opaque(b, at(b, start, b.add(b.mul(step, const(each_step)), const(behind))))

        with cgutils.for_range(b, steps) as loop:  # 64 depths
            step = loop.index
            ws = [w0, w1][:_PANELS]
            chunks = [ahead(w, integers.stride) for w in ws]
            highs = [ahead(w, integers.high_stride, integers.high_at) if integers.high_stride else w for w in ws]
            depths, eight, words = ahead(x, 64), ahead(x, 8), ahead(x, 8 * per_32)
            factors = ahead(unpacked, 128 * per_32)
            for half in range(2):
                for v in range(8 * half, 8 * half + 8):
                    g = v * 4 // form.group
                    if v * 4 % form.group == 0:
                        starts = [at(b, words, X_BLOCK * r + x_words + 4 * g) for r in range(rows)]
                        sums.begin([starts[r] for r, _ in each])
                    if integers is not BYTES:
                        for chunk, high in zip(chunks, highs, strict=True):
                            integers.ask(b, chunk, high, v)
                    here = [
                        integers.vector(b, *(at(b, p[n // per_panel], first) for p in (chunks, highs)), v, lanes)
                        for n, first in enumerate(firsts)
                    ]
                    x4 = [dots.load_activations(b, at(b, depths, X_BLOCK * r + 4 * v)) for r in range(rows)]
                    sums.add([(here[n], x4[r]) for r, n in each])
                    if (v + 1) % sums.run == 0:
                        scales = [at(b, factors, place + 64 * g) for place in places]
                        sums.close([scales[n] for _, n in each] if form.is_whole else [])
                wholes = sums.take()
                scale = [
                    splat(b, load(b, at(b, eight, X_BLOCK * r + X_SCALES + 4 * half), F32), lanes) for r in range(rows)
                ]
                for i, (r, n) in enumerate(each):
                    if not form.is_whole:
                        wholes[i] = b.fmul(wholes[i], load(b, at(b, factors, places[n] + 64 * half), floats))
                    part[i] = fma(b, wholes[i], scale[r], part[i])
        unit = [at(b, unpacked, place + WHOLE) for place in places]
        if form.is_whole:
            for i, (_, n) in enumerate(each):
                part[i] = fma(b, part[i], load(b, unit[n], floats), load(b, sums_at[i], floats))
        if form.offset == 0:
            least = part
            if form.is_whole:
                least = Accumulators(b, len(each), floats)
                least.zero()
            with cgutils.for_range(b, b.mul(steps, const(2))) as loop:
                step = loop.index
                minima, x_sums = ahead(unpacked, 64, MINIMA), ahead(x, 4, X_FLOAT_SUMS)
                totals = [splat(b, load(b, at(b, x_sums, X_BLOCK * r), F32), lanes) for r in range(rows)]
                for i, (r, n) in enumerate(each):
                    least[i] = fma(b, totals[r], load(b, at(b, minima, places[n]), floats), least[i])
            if form.is_whole:
                for i, (_, n) in enumerate(each):
                    part[i] = fma(b, least[i], load(b, at(b, unit[n], 64), floats), part[i])
        for i, place in enumerate(sums_at):
            store(b, place, part[i])

    return kernel


def _unpack(form: Packing) -> Any:
    """(w, steps, out): the integers of up to 256 depths as bytes."""
    unpack, packed = integers_of(form), form.integers
    stride, high_at, high_stride = packed.stride, packed.high_at, packed.high_stride

    @made_for(form.name)
    def unpack_steps(w, steps, out):
        kept_apart()
        for s in range(steps):
            unpack(w + stride * s, w + high_at + high_stride * s, out + 1024 * s)

    return unpack_steps


def _rows(form: Packing, unpack_steps: Any) -> Any:
    """All rows of a block x one or two panels, by tiles."""
    packed, is_bytes, enough = form.integers, form.bits == 8, _UNPACK_FROM.get(form.bits, 4)
    one, two, many = _tile(form, 1, packed), _tile(form, 2, packed), _tile(form, _MANY, packed if is_bytes else BYTES)
    has_four = enough > 4
    four = _tile(form, 4, packed) if has_four else two

    @made_for(form.name, part=True)
    def multiply(rows, x, steps, w0, w1, panels, unpacked, acc):
        r = 0
        if rows >= enough:
            u0, u1 = (w0, w1) if is_bytes else (unpacked + INTEGERS, unpacked + UNPACKED + INTEGERS)
            if not is_bytes:
                unpack_steps(w0, steps, u0)
                if panels == 2:
                    unpack_steps(w1, steps, u1)
            while rows - r >= _MANY:
                for n in range(0, panels, _PANELS):
                    w, factors, out = u0 if n == 0 else u1, unpacked + UNPACKED * n, acc + ACC_ROW * r + 64 * n
                    many(x + X_BLOCK * r, steps, w, u1, factors, out)
                r += _MANY
        while has_four and rows - r >= 4:
            for n in range(0, panels, _PANELS):
                w, factors, out = w0 if n == 0 else w1, unpacked + UNPACKED * n, acc + ACC_ROW * r + 64 * n
                four(x + X_BLOCK * r, steps, w, w1, factors, out)
            r += 4
        while rows - r >= 2:
            for n in range(0, panels, _PANELS):
                w, factors, out = w0 if n == 0 else w1, unpacked + UNPACKED * n, acc + ACC_ROW * r + 64 * n
                two(x + X_BLOCK * r, steps, w, w1, factors, out)
            r += 2
        if rows > r:
            for n in range(0, panels, _PANELS):
                w, factors, out = w0 if n == 0 else w1, unpacked + UNPACKED * n, acc + ACC_ROW * r + 64 * n
                one(x + X_BLOCK * r, steps, w, w1, factors, out)

    return multiply


def _product(form: Packing) -> Any:
    """A kernel (see arguments.py): products with weights of one format, and rows of an embedding in it."""
    name, chunks, group, minus = form.name, form.chunks, form.group, np.float32(form.offset)
    step_bytes, is_whole, has_minima = form.unit_bytes // chunks, form.is_whole, form.offset == 0
    unpack_steps, factors = _unpack(form), factors_of(form)
    multiply = _rows(form, unpack_steps)

    @made_for(name)
    def take_factors(w, steps, out):
        kept_apart()
        for s in range(0, steps, chunks):
            factors(w + step_bytes * s, s, out)

    @made_for(name, part=True)
    def two_panels(rows, x, x_stride, w0, w1, panels, steps, scratch):
        """Up to ROWS rows x two panels; the sums f32[rows][2][16] are at the beginning of `scratch` (BLOCK_SCRATCH
        bytes). `x`: the rows' first block; `x_stride` bytes from block to block."""
        zero = vsplat(np.float32(0.0))
        for r in range(rows):
            vstore(scratch + ACC_ROW * r, zero)
            vstore(scratch + ACC_ROW * r + 64, zero)
        unpacked = scratch + ROWS * ACC_ROW
        together = panels if _PANELS == 2 or rows >= _TOGETHER_FROM else 1
        for n in range(0, panels, together):
            first = w0 if n == 0 else w1
            for s in range(0, steps, 4):
                now, xs, at = min(4, steps - s), x + s // 4 * x_stride, step_bytes * s
                take_factors(first + at, now, unpacked)
                if together == 2:
                    take_factors(w1 + at, now, unpacked + UNPACKED)
                multiply(rows, xs, now, first + at, w1 + at, together, unpacked, scratch + 64 * n)

    @made_for(name)
    def embed(w, steps, output, scale, width, out, spare):
        """Weights of one output x `scale`, f32[width]."""
        panel, lane = w + output // 16 * step_bytes * steps, output % 16
        for s in range(0, steps, 4):
            now = min(4, steps - s)
            take_factors(panel + step_bytes * s, now, spare)
            unpack_steps(panel + step_bytes * s, now, spare + INTEGERS)
            for d in range(min(256, width - 64 * s)):
                at = spare + 64 * (d // group) + 4 * lane
                least = spare + MINIMA + 64 * (d // 32) + 4 * lane
                value = np.float32(load_u8(spare + INTEGERS + 64 * (d // 4) + 4 * lane + d % 4)) - minus
                if is_whole:
                    value *= np.float32(load_scale(at)) * load_f32(spare + WHOLE + 4 * lane)
                    if has_minima:
                        value += load_f32(least) * load_f32(spare + WHOLE + 64 + 4 * lane)
                else:
                    value *= load_f32(at)
                    if has_minima:
                        value += load_f32(least)
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
                two_panels(n, x + X_BLOCK * (first_row + m), stride, w + p * size, second, panels, steps, scratch)
                target = out + m * out_stride + 64 * p
                epilogue(KIND_F32, mode, 0, n, panels, scratch, ACC_ROW, 0, 0, b_at, target, out_stride)
            p += 1 if other != 0 else panels

    return product


_q4_0, _q4_1, _q5_0, _q5_1 = _product(Q4_0), _product(Q4_1), _product(Q5_0), _product(Q5_1)
_q8_0, _q4_k, _q5_k, _q6_k = _product(Q8_0), _product(Q4_K), _product(Q5_K), _product(Q6_K)


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
        both = vadd(a, b)
        scale = largest / np.float32(127.0)
        store_i32(block + X_SUMS_16 + at // 4, start_word(a, 16))
        store_i32(block + X_SUMS_16 + at // 4 + 4, start_word(b, 16))
        store_i32(block + X_SUMS_32 + at // 8, start_word(both, 32))
        store_f32(block + X_SCALES + at // 8, scale)
        store_f32(block + X_FLOAT_SUMS + at // 8, scale * hsum(both))
