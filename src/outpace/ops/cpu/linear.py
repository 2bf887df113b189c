"""Matrix products of a few rows with packed weights, y[m, n] = sum_k x[m, k] w[n, k].

Weights lie in *panels* of sixteen outputs. Within a panel, depth runs in steps of one *tile row* of 64 bytes:
  int8      16 outputs x 4 depths     float32   16 outputs x 1 depth
  bfloat16  16 outputs x 2 depths
int4 has groups of 64 depths: 512 bytes, whose low nibbles are the first 512 bytes of an int8 tile and whose high ones
are the rest, then the group's sixteen float32 scales. A panel is one contiguous stream, read once per sixteen rows and
step. A micro-kernel multiplies up to sixteen rows with 1, 2 or 4 panels into a scratch block of [16][64] int32 (int8)
or float32 (others); the epilogue scales, adds the bias and stores, adds to the residual, or applies the gated
activation.

Each (row, output) accumulates over the depth in one fixed order, whatever the number of rows or panels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils

from .isa import AMX, HAS_AMX, HAS_VNNI, VNNI
from .simd import (
    F32,
    I8,
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
    iload,
    load,
    load_f32,
    low_bf16,
    splat,
    splat_int,
    store,
    to_float,
    vadd,
    vdiv,
    vexp,
    vfma,
    vload,
    vmul,
    vsplat,
    vstore,
    vsub,
)

TILE_ROW = 64  # bytes
SCRATCH_ROW = 256  # bytes: 64 outputs
SCRATCH_BYTES = 2 * LANES * SCRATCH_ROW

KIND_F32, KIND_BF16, KIND_INT8, KIND_INT4 = 0, 1, 2, 3
GROUP_BYTES = 576  # of int4: 64 depths of 16 outputs, and their scales
_SPARE = LANES * SCRATCH_ROW  # int4 works on one row tile; its unpacked weights lie behind the results
STORE, ADD, GATED_SILU, GATED_GELU = 0, 1, 2, 3


def amx_call(b: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    call(b, name, ir.VoidType(), *args)


def tile_number(n: int) -> ir.Constant:
    return const(n, I8)


def unavailable(b: ir.IRBuilder) -> None:
    """In place of code that this CPU cannot run; the level check keeps it from being reached."""
    call(b, "llvm.trap", ir.VoidType())


@emit(types.void, types.int64)
def load_tile_config(b, address):
    if HAS_AMX:
        amx_call(b, "llvm.x86.ldtilecfg", b.inttoptr(address, I8.as_pointer()))
    else:
        unavailable(b)


@emit(types.void)
def release_tiles(b):
    if HAS_AMX:
        amx_call(b, "llvm.x86.tilerelease")
    else:
        unavailable(b)


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


def _unpack_int4(b: ir.IRBuilder, group: ir.Value, tile: ir.Value) -> None:
    """512 bytes of nibbles, stored with 8 added, to an int8 tile of 1 KiB."""
    bytes64 = ir.VectorType(I8, 64)
    mask, four, eight = (ir.Constant(bytes64, [v] * 64) for v in (15, 4, 8))
    for i in range(8):
        both = load(b, at(b, group, 64 * i), bytes64, 1)
        store(b, at(b, tile, 64 * i), b.sub(b.and_(both, mask), eight), 1)
        store(b, at(b, tile, 512 + 64 * i), b.sub(b.lshr(both, four), eight), 1)


def _int4(amx: bool, vnni: bool) -> Callable[..., Any]:
    """Up to sixteen rows x one panel: int32 sums within a group, float32 over the groups in rising order."""

    @emit(types.void, *[types.int64] * 7)
    def kernel(b, x, stride, w, steps, rows, out, spare):
        if (amx and not HAS_AMX) or (vnni and not HAS_VNNI):
            unavailable(b)
            return
        sums = b.add(spare, const(1024))
        bias = const(-0x7F7F7F80, I32)  # 0x80808080, see _int8
        with cgutils.for_range(b, rows) as row:
            store(b, at(b, out, b.mul(row.index, const(SCRATCH_ROW))), ir.Constant(VF, None))
        with cgutils.for_range(b, steps) as loop:
            group = at(b, w, b.mul(loop.index, const(GROUP_BYTES)))
            depth = b.mul(loop.index, const(TILE_ROW))
            _unpack_int4(b, group, spare)
            if amx:
                pointer, line = I8.as_pointer(), const(TILE_ROW)
                amx_call(b, "llvm.x86.tilezero", tile_number(0))
                amx_call(b, "llvm.x86.tileloadd64", tile_number(4), b.inttoptr(at(b, x, depth), pointer), stride)
                amx_call(b, "llvm.x86.tileloadd64", tile_number(6), b.inttoptr(spare, pointer), line)
                amx_call(b, "llvm.x86.tdpbssd", tile_number(0), tile_number(4), tile_number(6))
                amx_call(b, "llvm.x86.tilestored64", tile_number(0), b.inttoptr(sums, pointer), line)
            scales = load(b, at(b, group, 512), VF)
            with cgutils.for_range(b, rows) as row:
                if amx:
                    total = load(b, at(b, sums, b.mul(row.index, const(TILE_ROW))), VI)
                else:
                    here = b.add(at(b, x, b.mul(row.index, stride)), depth)
                    total = offset = ir.Constant(VI, None)
                    for k in range(LANES):
                        weights = load(b, at(b, spare, TILE_ROW * k), VI)
                        x4 = load(b, at(b, here, 4 * k), I32, 1)
                        total = _int8_dot(b, total, b.xor(x4, bias) if vnni else x4, weights, vnni)
                        offset = _int8_dot(b, offset, bias, weights, True) if vnni else offset
                    total = b.sub(total, offset) if vnni else total
                target = at(b, out, b.mul(row.index, const(SCRATCH_ROW)))
                store(b, target, fma(b, b.sitofp(total, VF), scales, load(b, target, VF)))

    return kernel


_int4_amx, _int4_vnni, _int4_plain = _int4(True, False), _int4(False, True), _int4(False, False)
_amx_i8_1, _amx_i8_2, _amx_i8_4 = (_amx("llvm.x86.tdpbssd", n, 1) for n in (1, 2, 4))
_amx_bf_1, _amx_bf_2, _amx_bf_4 = (_amx("llvm.x86.tdpbf16ps", n, 1) for n in (1, 2, 4))
_amx_i8_22, _amx_bf_22 = _amx("llvm.x86.tdpbssd", 2, 2), _amx("llvm.x86.tdpbf16ps", 2, 2)
_vnni_1, _vnni_2, _vnni_4 = (_int8(n, True) for n in (1, 2, 4))
_plain_i8_1, _plain_i8_2, _plain_i8_4 = (_int8(n, False) for n in (1, 2, 4))
_f32_1, _f32_2, _f32_4 = (_float(n, False) for n in (1, 2, 4))
_bf_1, _bf_2, _bf_4 = (_float(n, True) for n in (1, 2, 4))


@njit
def _amx_tiles(kind, panels, x, stride, w, steps, scratch):
    if kind == KIND_INT8:
        if panels == 4:
            _amx_i8_4(x, stride, w, steps, scratch)
        elif panels == 2:
            _amx_i8_2(x, stride, w, steps, scratch)
        else:
            _amx_i8_1(x, stride, w, steps, scratch)
    elif panels == 4:
        _amx_bf_4(x, stride, w, steps, scratch)
    elif panels == 2:
        _amx_bf_2(x, stride, w, steps, scratch)
    else:
        _amx_bf_1(x, stride, w, steps, scratch)


@njit
def _vector_block(kind, level, panels, x, stride, w, steps, scratch):
    if kind == KIND_INT8 and level >= VNNI:
        if panels == 4:
            _vnni_4(x, stride, w, steps, scratch)
        elif panels == 2:
            _vnni_2(x, stride, w, steps, scratch)
        else:
            _vnni_1(x, stride, w, steps, scratch)
    elif kind == KIND_INT8:
        if panels == 4:
            _plain_i8_4(x, stride, w, steps, scratch)
        elif panels == 2:
            _plain_i8_2(x, stride, w, steps, scratch)
        else:
            _plain_i8_1(x, stride, w, steps, scratch)
    elif kind == KIND_BF16:
        if panels == 4:
            _bf_4(x, stride, w, steps, scratch)
        elif panels == 2:
            _bf_2(x, stride, w, steps, scratch)
        else:
            _bf_1(x, stride, w, steps, scratch)
    elif panels == 4:
        _f32_4(x, stride, w, steps, scratch)
    elif panels == 2:
        _f32_2(x, stride, w, steps, scratch)
    else:
        _f32_1(x, stride, w, steps, scratch)


@njit
def _int4_panels(level, panels, x, stride, w, steps, rows, scratch):
    for n in range(panels):
        panel, out = w + n * steps * GROUP_BYTES, scratch + n * TILE_ROW
        if level == AMX:
            _int4_amx(x, stride, panel, steps, rows, out, scratch + _SPARE)
        elif level == VNNI:
            _int4_vnni(x, stride, panel, steps, rows, out, scratch + _SPARE)
        else:
            _int4_plain(x, stride, panel, steps, rows, out, scratch + _SPARE)


@njit(inline="always")
def _value(kind, scratch, row_scale, scales, n):
    """Sixteen finished products of one row: scratch lane block n."""
    if kind == KIND_INT8:
        return vmul(vmul(to_float(iload(scratch + TILE_ROW * n)), vsplat(row_scale)), vload(scales + TILE_ROW * n))
    if kind == KIND_INT4:
        return vmul(vload(scratch + TILE_ROW * n), vsplat(row_scale))
    return vload(scratch + TILE_ROW * n)


@njit
def _epilogue(kind, mode, rows, panels, scratch, row_scales, scales, bias, out, out_stride):
    """Finish `rows` x (16 * panels) products. `scales`, `bias`, `out` point at the first panel's entries."""
    one = vsplat(np.float32(1.0))
    for m in range(rows):
        line = scratch + m * SCRATCH_ROW
        target = out + m * out_stride
        row_scale = np.float32(1.0)
        if kind >= KIND_INT8:
            row_scale = load_f32(row_scales + 4 * m)
        if mode >= GATED_SILU:
            for n in range(0, panels, 2):
                gate = _value(kind, line, row_scale, scales, n)
                up = _value(kind, line, row_scale, scales, n + 1)
                u = gate
                if mode == GATED_GELU:  # x * sigmoid(2 * sqrt(2/pi) * (x + 0.044715 x^3)), the tanh form
                    cube = vmul(vmul(gate, gate), gate)
                    u = vmul(vfma(cube, vsplat(np.float32(0.044715)), gate), vsplat(np.float32(1.5957691216057308)))
                sigmoid = vdiv(one, vadd(one, vexp(vsub(vsplat(np.float32(0.0)), u))))
                vstore(target + TILE_ROW * (n // 2), vmul(vmul(gate, sigmoid), up))
        else:
            for n in range(panels):
                y = _value(kind, line, row_scale, scales, n)
                if bias != 0:
                    y = vadd(y, vload(bias + TILE_ROW * n))
                if mode == ADD:
                    y = vadd(y, vload(target + TILE_ROW * n))
                vstore(target + TILE_ROW * n, y)


@njit
def linear(
    kind,
    level,
    mode,
    rows,
    x,
    x_stride,
    row_scales,
    w,
    scales,
    bias,
    steps,
    first,
    last,
    out,
    out_stride,
    scratch,
):
    """Panels first..last-1 of one product. Addresses are int64; strides bytes; `steps` KiB (int4: groups) per panel.

    `x` has its rows padded to a multiple of sixteen (what lies in the padding does not matter); `bias` 0: none.
    In the gated modes panels alternate gate, up; `first` and `last` are even and `out` gets half as many columns.
    """
    halve = 2 if mode >= GATED_SILU else 1
    tiles = level == AMX and kind in (KIND_BF16, KIND_INT8)
    step_bytes = GROUP_BYTES if kind == KIND_INT4 else 1024
    p = first
    while p < last:
        left = last - p
        panels = 4 if left >= 4 else (2 if left >= 2 else 1)
        wide = tiles and rows > LANES
        if wide and left >= 2:
            panels = 2
        weights = w + p * steps * step_bytes
        column = p * TILE_ROW
        b_at = bias + column if bias != 0 else 0
        m = 0
        while m < rows:
            block = min(LANES, rows - m)
            xm = x + m * x_stride
            if wide and panels == 2 and rows - m > LANES:
                block = min(2 * LANES, rows - m)
                if kind == KIND_INT8:
                    _amx_i8_22(xm, x_stride, weights, steps, scratch)
                else:
                    _amx_bf_22(xm, x_stride, weights, steps, scratch)
            elif kind == KIND_INT4:
                _int4_panels(level, panels, xm, x_stride, weights, steps, block, scratch)
            elif tiles:
                _amx_tiles(kind, panels, xm, x_stride, weights, steps, scratch)
            else:
                for r in range(0, block, 4):
                    _vector_block(
                        kind,
                        level,
                        panels,
                        xm + r * x_stride,
                        x_stride,
                        weights,
                        steps,
                        scratch + r * SCRATCH_ROW,
                    )
            _epilogue(
                kind, mode, block, panels, scratch, row_scales + 4 * m, scales + column, b_at,
                out + m * out_stride + column // halve, out_stride,
            )  # fmt: skip
            m += block
        p += panels
