"""Micro-kernels of linear.py: a few rows times a few panels of packed weights, into the scratch block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from .isa import HAS_AMX, HAS_VNNI
from .simd import (
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
    splat,
    splat_int,
    store,
)
from .tiles import amx_call, tile_number, unavailable

TILE_ROW = 64  # bytes
SCRATCH_ROW = 256  # bytes: 64 outputs
GROUP_BYTES = 640  # of int4: 64 depths of 16 outputs, with their scales and minima


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


def _int8_dot(b: ir.IRBuilder, acc: ir.Value, x4: ir.Value, weights: ir.Value, vnni: bool) -> ir.Value:
    """acc[16] += sum over 4 depths. `x4`: the four activation bytes; biased by 128 for VNNI, which wants u8."""
    if vnni:
        # arguments: accumulator, unsigned bytes, signed bytes
        return call(b, "llvm.x86.avx512.vpdpbusd.512", VI, acc, splat(b, x4), weights)
    for j in range(4):
        wj = b.ashr(b.shl(weights, splat_int(24 - 8 * j)), splat_int(24))
        xj = b.ashr(b.shl(x4, const(24 - 8 * j, I32)), const(24, I32))
        acc = b.add(acc, b.mul(wj, splat(b, xj)))
    return acc


def _int8(panels: int, vnni: bool) -> Callable[..., Any]:
    """Four rows x panels without tiles. VNNI wants unsigned activations: 128 is added here (x ^ 0x80) and
    128 * sum_k w[n, k] taken off in the end, from a running sum with the same instruction."""

    @emit(types.void, *[types.int64] * 5)
    def kernel(b, x, stride, w, steps, scratch):
        if vnni and not HAS_VNNI:
            unavailable(b)
            return
        rows = 4
        acc = Accumulators(b, rows * panels, VI)
        sums = Accumulators(b, panels, VI)
        acc.zero()
        sums.zero()
        bias = const(-0x7F7F7F80, I32)  # 0x80808080
        ws = [at(b, w, b.mul(steps, const(1024 * n))) for n in range(panels)]
        xs = [at(b, x, b.mul(stride, const(r))) for r in range(rows)]
        with cgutils.for_range(b, b.mul(steps, const(LANES))) as loop:
            depth = b.mul(loop.index, const(4))
            offset = b.mul(loop.index, const(TILE_ROW))
            weights = [load(b, at(b, ws[n], offset), VI) for n in range(panels)]
            for r in range(rows):
                x4 = load(b, at(b, xs[r], depth), I32, 1)
                if vnni:
                    x4 = b.xor(x4, bias)
                for n in range(panels):
                    acc[r * panels + n] = _int8_dot(b, acc[r * panels + n], x4, weights[n], vnni)
            if vnni:
                for n in range(panels):
                    sums[n] = _int8_dot(b, sums[n], bias, weights[n], True)
        for r in range(rows):
            for n in range(panels):
                value = b.sub(acc[r * panels + n], sums[n]) if vnni else acc[r * panels + n]
                store(b, at(b, scratch, SCRATCH_ROW * r + TILE_ROW * n), value)

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


def _unpack_int4(b: ir.IRBuilder, group: ir.Value, tiles: ir.Value) -> None:
    """512 bytes of nibbles to two int8 tiles of 1 KiB: the low ones to the first half of the first tile, the high ones
    to the second half of the second. The other halves stay zero, so each tile's product is that of 32 depths.
    """
    bytes64 = ir.VectorType(I8, 64)
    mask, four = ir.Constant(bytes64, [15] * 64), ir.Constant(bytes64, [4] * 64)
    for i in range(8):
        both = load(b, at(b, group, 64 * i), bytes64, 1)
        store(b, at(b, tiles, 64 * i), b.and_(both, mask), 1)
        store(b, at(b, tiles, 1024 + 512 + 64 * i), b.lshr(both, four), 1)


def _load_bf16(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    wide = b.zext(load(b, address, ir.VectorType(I16, LANES), 2), VI)
    return b.bitcast(b.shl(wide, splat_int(16)), VF)


def _int4(amx: bool, vnni: bool) -> Callable[..., Any]:
    """Up to sixteen rows x one panel. Weights are scale * nibble + minimum in groups of 32 depths, activations int8
    with a scale for the same 32: int32 sums within a group, float32 over the groups in rising order.

    Behind a row's int8 follow, for each group, its scale and scale * sum (for the minima), as float32.
    """

    @emit(types.void, *[types.int64] * 7)
    def kernel(b, x, stride, w, steps, rows, out, spare):
        if (amx and not HAS_AMX) or (vnni and not HAS_VNNI):
            unavailable(b)
            return
        sums = b.add(spare, const(2048))
        depths = b.mul(steps, const(TILE_ROW))
        bias = const(-0x7F7F7F80, I32)  # 0x80808080, see _int8
        for i in range(8):
            for zero_half in (512, 1024):
                store(b, at(b, spare, zero_half + 64 * i), ir.Constant(VI, None))
        with cgutils.for_range(b, rows) as row:
            store(b, at(b, out, b.mul(row.index, const(SCRATCH_ROW))), ir.Constant(VF, None))
        with cgutils.for_range(b, steps) as loop:
            group = at(b, w, b.mul(loop.index, const(GROUP_BYTES)))
            depth = b.mul(loop.index, const(TILE_ROW))
            _unpack_int4(b, group, spare)
            if amx:
                pointer, line = I8.as_pointer(), const(TILE_ROW)
                amx_call(b, "llvm.x86.tileloadd64", tile_number(4), b.inttoptr(at(b, x, depth), pointer), stride)
                for half in range(2):
                    source = b.inttoptr(at(b, spare, 1024 * half), pointer)
                    target = b.inttoptr(at(b, sums, 1024 * half), pointer)
                    amx_call(b, "llvm.x86.tilezero", tile_number(half))
                    amx_call(b, "llvm.x86.tileloadd64", tile_number(6), source, line)
                    amx_call(b, "llvm.x86.tdpbssd", tile_number(half), tile_number(4), tile_number(6))
                    amx_call(b, "llvm.x86.tilestored64", tile_number(half), target, line)
            scales = [_load_bf16(b, at(b, group, 512 + 32 * half)) for half in range(2)]
            minima = [_load_bf16(b, at(b, group, 576 + 32 * half)) for half in range(2)]
            with cgutils.for_range(b, rows) as row:
                begin = at(b, x, b.mul(row.index, stride))
                factors = at(b, b.add(begin, depths), b.mul(loop.index, const(16)))
                target = at(b, out, b.mul(row.index, const(SCRATCH_ROW)))
                acc = load(b, target, VF)
                for half in range(2):
                    if amx:
                        total = load(b, at(b, at(b, sums, b.mul(row.index, const(TILE_ROW))), 1024 * half), VI)
                    else:
                        total = offset = ir.Constant(VI, None)
                        for k in range(8 * half, 8 * half + 8):
                            weights = load(b, at(b, spare, 1024 * half + TILE_ROW * k), VI)
                            x4 = load(b, at(b, b.add(begin, depth), 4 * k), I32, 1)
                            total = _int8_dot(b, total, b.xor(x4, bias) if vnni else x4, weights, vnni)
                            offset = _int8_dot(b, offset, bias, weights, True) if vnni else offset
                        total = b.sub(total, offset) if vnni else total
                    scale = splat(b, load(b, at(b, factors, 8 * half), F32))
                    weighted_sum = splat(b, load(b, at(b, factors, 8 * half + 4), F32))
                    acc = fma(b, b.fmul(b.sitofp(total, VF), scale), scales[half], acc)
                    acc = fma(b, weighted_sum, minima[half], acc)
                store(b, target, acc)

    return kernel


int4_amx, int4_vnni, int4_plain = _int4(True, False), _int4(False, True), _int4(False, False)
amx_i8_1, amx_i8_2, amx_i8_4 = (_amx("llvm.x86.tdpbssd", n, 1) for n in (1, 2, 4))
amx_bf_1, amx_bf_2, amx_bf_4 = (_amx("llvm.x86.tdpbf16ps", n, 1) for n in (1, 2, 4))
amx_i8_22, amx_bf_22 = _amx("llvm.x86.tdpbssd", 2, 2), _amx("llvm.x86.tdpbf16ps", 2, 2)
vnni_1, vnni_2, vnni_4 = (_int8(n, True) for n in (1, 2, 4))
plain_i8_1, plain_i8_2, plain_i8_4 = (_int8(n, False) for n in (1, 2, 4))
f32_1, f32_2, f32_4 = (_float(n, False) for n in (1, 2, 4))
bf_1, bf_2, bf_4 = (_float(n, True) for n in (1, 2, 4))
