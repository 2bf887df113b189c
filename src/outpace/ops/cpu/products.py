"""Micro-kernels of linear.py: a few rows times a few panels of packed weights, into the scratch block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from . import dots
from .emit import (
    F16,
    F32,
    I8,
    I16,
    I32,
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
    prefetch,
    splat,
    splat_int,
    store,
)
from .isa import DOT, HAS_AMX, PORTABLE
from .tiles import amx_call, tile_number, unavailable

TILE_ROW = 64  # bytes
SCRATCH_ROW = 256  # bytes: 64 outputs
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


def _float16(b: ir.IRBuilder, halves: ir.Value) -> ir.Value:
    """The low halves of sixteen i32 as f32."""
    return b.fpext(b.bitcast(b.trunc(halves, ir.VectorType(I16, LANES)), ir.VectorType(F16, LANES)), VF)


def _float(panels: int, kind: str) -> Callable[..., Any]:
    """Four rows x panels in float32. `kind` of weights: f32, bf16 or f16; x is f32[rows][stride bytes], with bf16
    weights pairs of bf16."""

    @emit(types.void, *[types.int64] * 5)
    def kernel(b, x, stride, w, steps, scratch):
        rows = 4
        acc = Accumulators(b, rows * panels)
        acc.zero()
        ws = [at(b, w, b.mul(steps, const(1024 * n))) for n in range(panels)]
        xs = [at(b, x, b.mul(stride, const(r))) for r in range(rows)]
        with cgutils.for_range(b, b.mul(steps, const(LANES))) as loop:
            depth = b.mul(loop.index, const(8 if kind == "f16" else 4))  # one float, or one pair
            offset = b.mul(loop.index, const(TILE_ROW))
            weights = [load(b, at(b, ws[n], offset), VF if kind == "f32" else VI) for n in range(panels)]
            if kind == "bf16":
                halves = [(low_bf16(b, v), high_bf16(b, v)) for v in weights]
            elif kind == "f16":
                halves = [(_float16(b, v), _float16(b, b.lshr(v, splat_int(16)))) for v in weights]
            else:
                halves = [(v,) for v in weights]
            for r in range(rows):
                if kind == "bf16":
                    pair = load(b, at(b, xs[r], depth), I32)
                    floats = [
                        b.bitcast(b.shl(pair, const(16, I32)), F32),
                        b.bitcast(b.and_(pair, const(-65536, I32)), F32),
                    ]
                else:
                    floats = [load(b, at(b, at(b, xs[r], depth), 4 * j), F32) for j in range(len(halves[0]))]
                factors = [splat(b, value) for value in floats]
                for n in range(panels):
                    for factor, half in zip(factors, halves[n], strict=True):
                        acc[r * panels + n] = fma(b, factor, half, acc[r * panels + n])
        for r in range(rows):
            for n in range(panels):
                store(b, at(b, scratch, SCRATCH_ROW * r + TILE_ROW * n), acc[r * panels + n])

    return kernel


amx_i8_1, amx_i8_2, amx_i8_4 = (_amx("llvm.x86.tdpbssd", n, 1) for n in (1, 2, 4))
amx_bf_1, amx_bf_2, amx_bf_4 = (_amx("llvm.x86.tdpbf16ps", n, 1) for n in (1, 2, 4))
amx_i8_22, amx_bf_22 = _amx("llvm.x86.tdpbssd", 2, 2), _amx("llvm.x86.tdpbf16ps", 2, 2)
i8_4x1, i8_4x2, i8_4x4 = (_int8(4, n) for n in (1, 2, 4))
i8_8x2, i8_12x2, i8_16x1 = _int8(8, 2), _int8(12, 2), _int8(16, 1)
i8_1x1, i8_2x1 = _int8(1, 1), _int8(2, 1)
plain_i8 = _int8(4, 1, PORTABLE)
f32_1, f32_2, f32_4 = (_float(n, "f32") for n in (1, 2, 4))
bf_1, bf_2, bf_4 = (_float(n, "bf16") for n in (1, 2, 4))
f16_1, f16_2, f16_4 = (_float(n, "f16") for n in (1, 2, 4))
