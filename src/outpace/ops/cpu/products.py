"""Micro-kernels of linear.py: a few rows times a few panels of packed weights, into the scratch block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from . import dots
from .emit import (
    F32,
    I8,
    I16,
    I32,
    LANES,
    VF,
    VI,
    Accumulators,
    at,
    call,
    const,
    emit,
    fma,
    high_bf16,
    load,
    low_bf16,
    prefetch,
    splat,
    splat_int,
    store,
)
from .isa import DOT, HAS_AMX, HAS_VNNI, PORTABLE
from .tiles import amx_call, tile_number, unavailable

TILE_ROW = 64  # bytes
SCRATCH_ROW = 256  # bytes: 64 outputs
GROUP_BYTES = 640  # of int4: 64 depths of 16 outputs, with their scales and minima
_SUMS_BYTES = (
    2048 + 256
)  # two steps' sums do not lie a multiple of 4 KiB apart, where a load waits for the other's store
INT4_SPARE = 2048 + 2 * _SUMS_BYTES  # one step's unpacked weights and two steps' sums
_AHEAD = (
    4096  # bytes from what a kernel reads to what it asks for, where it computes too much for the hardware to run ahead
)


def _amx(product: str, panels: int, row_tiles: int) -> Callable[..., Any]:
    """x is [rows of 16 * row_tiles][stride bytes]; w the first panel of `steps` tiles of 1 KiB."""

    @emit(types.void, *[types.int64] * 5)
    def kernel(b, x, stride, w, steps, scratch):
        if not HAS_AMX:
            unavailable(b)
            return
        pointer = I8.as_pointer()
        row, count = const(TILE_ROW), row_tiles * panels
        a0, b0 = count, count + row_tiles
        for t in range(count):
            amx_call(b, "llvm.x86.tilezero", tile_number(t))
        xs = [at(b, x, b.mul(stride, const(LANES * r))) for r in range(row_tiles)]
        ws = [at(b, w, b.mul(steps, const(1024 * n))) for n in range(panels)]
        with cgutils.for_range(b, steps) as loop:
            depth = b.mul(loop.index, const(TILE_ROW))
            offset = b.mul(loop.index, const(1024))
            for r in range(row_tiles):
                source = b.inttoptr(at(b, xs[r], depth), pointer)
                amx_call(b, "llvm.x86.tileloadd64", tile_number(a0 + r), source, stride)
            for n in range(panels):
                source = b.inttoptr(at(b, ws[n], offset), pointer)
                amx_call(b, "llvm.x86.tileloadd64", tile_number(b0), source, row)
                for r in range(row_tiles):
                    amx_call(b, product, tile_number(r * panels + n), tile_number(a0 + r), tile_number(b0))
        for r in range(row_tiles):
            for n in range(panels):
                target = b.inttoptr(at(b, scratch, LANES * SCRATCH_ROW * r + TILE_ROW * n), pointer)
                amx_call(b, "llvm.x86.tilestored64", tile_number(r * panels + n), target, const(SCRATCH_ROW))

    return kernel


def _plain_dot(b: ir.IRBuilder, acc: ir.Value, weights: ir.Value, x4: ir.Value) -> ir.Value:
    """acc[16] += sum over 4 depths of signed bytes x the four activation bytes `x4`, on any CPU."""
    for j in range(4):
        wj = b.ashr(b.shl(weights, splat_int(24 - 8 * j)), splat_int(24))
        xj = b.ashr(b.shl(x4, const(24 - 8 * j, I32)), const(24, I32))
        acc = b.add(acc, b.mul(wj, splat(b, xj)))
    return acc


def _vnni_dot(b: ir.IRBuilder, acc: ir.Value, weights: ir.Value, x4: ir.Value) -> ir.Value:
    """The same for unsigned weights; the activations stay signed."""
    return call(b, "llvm.x86.avx512.vpdpbusd.512", VI, acc, weights, splat(b, x4))


def _int8(rows: int, panels: int, level: int = DOT) -> Callable[..., Any]:
    """`rows` rows x panels without tiles.

    Where the instruction multiplies unsigned by signed bytes, these sums are too large by 128 * sum_k x[m, k]; the
    epilogue takes that off (`Totals.excess`).
    """
    made = dots.totals_of(level)
    lanes, parts = made.lanes, LANES // made.lanes * panels  # a part: some outputs of one of the panels

    @emit(types.void, *[types.int64] * 5)
    def kernel(b, x, stride, w, steps, scratch):
        totals = made(b, 8, rows * parts)
        totals.begin()
        flip = ir.Constant(ir.VectorType(I8, 4 * lanes), [-128] * 4 * lanes)
        ws = [at(b, w, b.mul(steps, const(1024 * n))) for n in range(panels)]
        xs = [at(b, x, b.mul(stride, const(r))) for r in range(rows)]
        with cgutils.for_range(b, b.mul(steps, const(LANES))) as loop:
            depth = b.mul(loop.index, const(4))
            offset = b.mul(loop.index, const(TILE_ROW))
            here = [at(b, at(b, ws[lanes * n // LANES], offset), 4 * (lanes * n % LANES)) for n in range(parts)]
            weights = [dots.load_weights(b, place, lanes) for place in here]
            if rows > 8:
                for start in ws:
                    prefetch(b, at(b, at(b, start, offset), _AHEAD))
            weights = [b.xor(v, flip) for v in weights]
            for r in range(rows):
                x4 = dots.load_activations(b, at(b, xs[r], depth), lanes)
                for n in range(parts):
                    totals.add(r * parts + n, [weights[n]], [x4])
        for r in range(rows):
            for n in range(parts):
                store(b, at(b, scratch, SCRATCH_ROW * r + 4 * lanes * n), totals.sum(r * parts + n))

    return kernel


def _float(panels: int, bf16: bool) -> Callable[..., Any]:
    """Four rows x panels in float32; x is float32 [rows][stride bytes], or bf16 pairs when `bf16`."""

    @emit(types.void, *[types.int64] * 5)
    def kernel(b, x, stride, w, steps, scratch):
        rows = 4
        acc = Accumulators(b, rows * panels)
        acc.zero()
        ws = [at(b, w, b.mul(steps, const(1024 * n))) for n in range(panels)]
        xs = [at(b, x, b.mul(stride, const(r))) for r in range(rows)]
        with cgutils.for_range(b, b.mul(steps, const(LANES))) as loop:
            depth = b.mul(loop.index, const(4))  # one float, or one pair of bf16
            offset = b.mul(loop.index, const(TILE_ROW))
            ty = VI if bf16 else VF
            weights = [load(b, at(b, ws[n], offset), ty) for n in range(panels)]
            halves = [(low_bf16(b, v), high_bf16(b, v)) for v in weights] if bf16 else [(v,) for v in weights]
            for r in range(rows):
                if bf16:
                    pair = load(b, at(b, xs[r], depth), I32)
                    lows = b.bitcast(b.shl(pair, const(16, I32)), F32)
                    highs = b.bitcast(b.and_(pair, const(-65536, I32)), F32)
                    factors = (splat(b, lows), splat(b, highs))
                else:
                    factors = (splat(b, load(b, at(b, xs[r], depth), F32)),)
                for n in range(panels):
                    for factor, half in zip(factors, halves[n], strict=True):
                        acc[r * panels + n] = fma(b, factor, half, acc[r * panels + n])
        for r in range(rows):
            for n in range(panels):
                store(b, at(b, scratch, SCRATCH_ROW * r + TILE_ROW * n), acc[r * panels + n])

    return kernel


def _nibbles(b: ir.IRBuilder, group: ir.Value, k: int) -> tuple[ir.Value, ir.Value]:
    """The k-th four depths of a step's first 32 and of its second 32, as bytes 0..15 [16 outputs x 4]."""
    bytes64 = ir.VectorType(I8, 64)
    both = load(b, at(b, group, 64 * k), bytes64, 1)
    low, high = b.and_(both, ir.Constant(bytes64, [15] * 64)), b.lshr(both, ir.Constant(bytes64, [4] * 64))
    return b.bitcast(low, VI), b.bitcast(high, VI)


def _load_bf16(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    wide = b.zext(load(b, address, ir.VectorType(I16, LANES), 2), VI)
    return b.bitcast(b.shl(wide, splat_int(16)), VF)


def _group_factors(b: ir.IRBuilder, group: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """(scales, minima) of the two groups of a step, f32[16 outputs] each."""
    return [(_load_bf16(b, at(b, group, 512 + 32 * g)), _load_bf16(b, at(b, group, 576 + 32 * g))) for g in range(2)]


def _add_groups(b: ir.IRBuilder, acc: ir.Value, totals: Any, row_factors: ir.Value, factors: Any) -> ir.Value:
    """acc + the two groups of a step, in this order wherever it is done: the definition of int4's rounding.

    `totals`: whole sums of activation x nibble; `row_factors`: address of the row's (scale, scale * sum) of each group.
    """
    for g, (total, (scales, minima)) in enumerate(zip(totals, factors, strict=True)):
        scale = splat(b, load(b, at(b, row_factors, 8 * g), F32))
        weighted_sum = splat(b, load(b, at(b, row_factors, 8 * g + 4), F32))
        acc = fma(b, b.fmul(b.sitofp(total, VF), scale), scales, acc)
        acc = fma(b, weighted_sum, minima, acc)
    return acc


def _prefetch_step(b: ir.IRBuilder, group: ir.Value) -> None:
    """A thread's panels lie one behind the other, so what it reads later lies ahead."""
    for line in range(0, GROUP_BYTES, 64):
        prefetch(b, at(b, group, _AHEAD + line))


def _int4(rows: int, vnni: bool) -> Callable[..., Any]:
    """`rows` rows x one panel. Weights are scale * nibble + minimum in groups of 32 depths, activations int8 with a
    scale for the same 32: int32 sums within a group, float32 over the groups in rising order.

    Behind a row's int8 follow, for each group, its scale and scale * sum (for the minima), as float32. Nibbles are
    unsigned, as VNNI wants one side, and the activations signed, as it wants the other.
    """

    @emit(types.void, *[types.int64] * 5)
    def kernel(b, x, stride, w, steps, out):
        if vnni and not HAS_VNNI:
            unavailable(b)
            return
        dot = _vnni_dot if vnni else _plain_dot
        acc = Accumulators(b, rows)
        acc.zero()
        xs = [at(b, x, b.mul(stride, const(r))) for r in range(rows)]
        row_factors = [at(b, start, b.mul(steps, const(TILE_ROW))) for start in xs]
        with cgutils.for_range(b, steps) as loop:
            group = at(b, w, b.mul(loop.index, const(GROUP_BYTES)))
            _prefetch_step(b, group)
            depth, place = b.mul(loop.index, const(TILE_ROW)), b.mul(loop.index, const(16))
            totals: list[list[ir.Value]] = [[ir.Constant(VI, None)] * 2 for _ in range(rows)]
            for g in range(2):
                for k in range(8):
                    weights = _nibbles(b, group, k)[g]
                    for r in range(rows):
                        x4 = load(b, at(b, at(b, xs[r], depth), 32 * g + 4 * k), I32, 1)
                        totals[r][g] = dot(b, totals[r][g], weights, x4)
            factors = _group_factors(b, group)
            for r in range(rows):
                acc[r] = _add_groups(b, acc[r], totals[r], at(b, row_factors[r], place), factors)
        for r in range(rows):
            store(b, at(b, out, SCRATCH_ROW * r), acc[r])

    return kernel


@emit(types.void, *[types.int64] * 6)
def int4_amx(b, x, stride, w, steps, out, spare):
    """Sixteen rows x one panel, as `_int4` defines them.

    A step's nibbles are unpacked to two tiles, each with one group's 32 depths and zeros for the other's. Sums go
    through memory and take long to arrive, so they are added one step late. `spare`: INT4_SPARE bytes.
    """
    if not HAS_AMX:
        unavailable(b)
        return
    pointer, line = I8.as_pointer(), const(TILE_ROW)
    acc = Accumulators(b, LANES)
    acc.zero()
    for zero_half in (512, 1024):
        for i in range(0, 512, 64):
            store(b, at(b, spare, zero_half + i), ir.Constant(VI, None))
    row_factors = [at(b, x, b.add(b.mul(stride, const(r)), b.mul(steps, line))) for r in range(LANES)]

    def sums_of(index: ir.Value) -> ir.Value:
        return at(b, spare, b.add(const(2048), b.mul(b.and_(index, const(1)), const(_SUMS_BYTES))))

    def multiply(index: ir.Value) -> None:
        group, sums = at(b, w, b.mul(index, const(GROUP_BYTES))), sums_of(index)
        _prefetch_step(b, group)
        for k in range(8):
            for g, place in enumerate((0, 1024 + 512)):
                store(b, at(b, spare, place + 64 * k), _nibbles(b, group, k)[g])
        source = b.inttoptr(at(b, x, b.mul(index, line)), pointer)
        amx_call(b, "llvm.x86.tileloadd64", tile_number(4), source, stride)
        for g in range(2):
            weights, target = (b.inttoptr(at(b, base, 1024 * g), pointer) for base in (spare, sums))
            amx_call(b, "llvm.x86.tilezero", tile_number(g))
            amx_call(b, "llvm.x86.tileloadd64", tile_number(6 + g), weights, line)
            amx_call(b, "llvm.x86.tdpbssd", tile_number(g), tile_number(4), tile_number(6 + g))
            amx_call(b, "llvm.x86.tilestored64", tile_number(g), target, line)

    def add(index: ir.Value) -> None:
        sums, factors = sums_of(index), _group_factors(b, at(b, w, b.mul(index, const(GROUP_BYTES))))
        for r in range(LANES):
            totals = [load(b, at(b, sums, 1024 * g + TILE_ROW * r), VI) for g in range(2)]
            acc[r] = _add_groups(b, acc[r], totals, at(b, row_factors[r], b.mul(index, const(16))), factors)

    multiply(const(0))
    with cgutils.for_range(b, steps, start=const(1)) as loop:
        multiply(loop.index)
        add(b.sub(loop.index, const(1)))
    add(b.sub(steps, const(1)))
    for r in range(LANES):
        store(b, at(b, out, SCRATCH_ROW * r), acc[r])


int4_vnni_1, int4_vnni_2, int4_vnni_4, int4_vnni_8 = (_int4(n, True) for n in (1, 2, 4, 8))
int4_plain_1, int4_plain_4 = (_int4(n, False) for n in (1, 4))
amx_i8_1, amx_i8_2, amx_i8_4 = (_amx("llvm.x86.tdpbssd", n, 1) for n in (1, 2, 4))
amx_bf_1, amx_bf_2, amx_bf_4 = (_amx("llvm.x86.tdpbf16ps", n, 1) for n in (1, 2, 4))
amx_i8_22, amx_bf_22 = _amx("llvm.x86.tdpbssd", 2, 2), _amx("llvm.x86.tdpbf16ps", 2, 2)
i8_4x1, i8_4x2, i8_4x4 = (_int8(4, n) for n in (1, 2, 4))
i8_8x2, i8_12x2, i8_16x1 = _int8(8, 2), _int8(12, 2), _int8(16, 1)
i8_1x1, i8_2x1 = _int8(1, 1), _int8(2, 1)
plain_i8 = _int8(4, 1, PORTABLE)
f32_1, f32_2, f32_4 = (_float(n, False) for n in (1, 2, 4))
bf_1, bf_2, bf_4 = (_float(n, True) for n in (1, 2, 4))
