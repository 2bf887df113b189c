"""Matrix products of a few rows with packed weights, y[m, n] = sum_k x[m, k] w[n, k].

Weights lie in *panels* of sixteen outputs. Within a panel, depth runs in steps of one *tile row* of 64 bytes:
  int8               16 outputs x 4 depths     float32   16 outputs x 1 depth
  bfloat16, float16  16 outputs x 2 depths
A panel is one contiguous stream, read from memory once per step; further rows find it in the cache. What a file has in
blocks is multiplied by blocks.py. Micro-kernels multiply up to sixteen rows with 1, 2 or 4 panels into a
scratch block of [16][64] int32 (int8) or float32 (others); the epilogue scales, adds the bias and stores, adds to the
residual, or applies the gated activation.

Each (row, output) accumulates over the depth in one fixed order, whatever the number of rows or panels.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import dots
from .emit import LANES
from .isa import AMX, DOT, PORTABLE, VNNI
from .products import (
    SCRATCH_ROW,
    TILE_ROW,
    amx_bf_1,
    amx_bf_2,
    amx_bf_4,
    amx_bf_22,
    amx_i8_1,
    amx_i8_2,
    amx_i8_4,
    amx_i8_22,
    bf_1,
    bf_2,
    bf_4,
    f16_1,
    f16_2,
    f16_4,
    f32_1,
    f32_2,
    f32_4,
    i8_1x1,
    i8_2x1,
    i8_4x1,
    i8_4x2,
    i8_4x4,
    i8_8x2,
    i8_12x2,
    i8_16x1,
    plain_i8,
)
from .simd import (
    iload,
    isplat,
    isub,
    kept_apart,
    load_f32,
    load_i32,
    to_float,
    vadd,
    vdiv,
    vexp,
    vfma,
    vload,
    vmax,
    vmul,
    vsplat,
    vstore,
    vsub,
)

SCRATCH_BYTES = 2 * LANES * SCRATCH_ROW

EXCESS = dots.Totals.excess  # what the kernels add to each int8 weight

KIND_F32, KIND_BF16, KIND_INT8, KIND_F16 = 0, 1, 2, 3
STORE, ADD, GATED_SILU, GATED_GELU = 0, 1, 2, 3


@njit
def _amx_tiles(kind, panels, x, stride, w, steps, scratch):
    if kind == KIND_INT8:
        if panels == 4:
            amx_i8_4(x, stride, w, steps, scratch)
        elif panels == 2:
            amx_i8_2(x, stride, w, steps, scratch)
        else:
            amx_i8_1(x, stride, w, steps, scratch)
    elif panels == 4:
        amx_bf_4(x, stride, w, steps, scratch)
    elif panels == 2:
        amx_bf_2(x, stride, w, steps, scratch)
    else:
        amx_bf_1(x, stride, w, steps, scratch)


@njit
def _many_sums(left, panels, x, stride, w, steps, scratch):
    """The first of `left` rows: returns how many. A kernel may compute rows of the padding. For processors that hold
    24 sums of sixteen outputs in registers.

    Few rows wait for the weights, so they use four panels at once; with more, what counts is that sixteen or more
    sums are in registers and a panel is read for as many rows as possible.
    """
    if left <= 4:
        if panels == 4:
            i8_4x4(x, stride, w, steps, scratch)
        elif panels == 2:
            i8_4x2(x, stride, w, steps, scratch)
        else:
            i8_4x1(x, stride, w, steps, scratch)
        return 4
    if left > 12 or panels == 1:
        for n in range(panels):
            i8_16x1(x, stride, w + n * steps * 1024, steps, scratch + n * TILE_ROW)
        return 16
    for n in range(0, panels, 2):
        if left > 8:
            i8_12x2(x, stride, w + n * steps * 1024, steps, scratch + n * TILE_ROW)
        else:
            i8_8x2(x, stride, w + n * steps * 1024, steps, scratch + n * TILE_ROW)
    return 12 if left > 8 else 8


@njit
def _few_sums(left, panels, x, stride, w, steps, scratch):
    """The same where registers hold four sums of sixteen outputs beside what they are made of."""
    for n in range(panels):
        panel, out, r = w + n * steps * 1024, scratch + n * TILE_ROW, 0
        while left - r > 2:
            i8_4x1(x + r * stride, stride, panel, steps, out + r * SCRATCH_ROW)
            r += 4
        if left - r == 2:
            i8_2x1(x + r * stride, stride, panel, steps, out + r * SCRATCH_ROW)
        elif left - r == 1:
            i8_1x1(x + r * stride, stride, panel, steps, out + r * SCRATCH_ROW)
    return left


FEW_SUMS = DOT != VNNI  # vector registers hold 16 or 32 x 256 bits, or 32 x 128, not 32 x 512
_int8_rows = _few_sums if FEW_SUMS else _many_sums


@njit
def _plain_rows(left, panels, x, stride, w, steps, scratch):
    for n in range(panels):
        for r in range(0, left, 4):
            plain_i8(x + r * stride, stride, w + n * steps * 1024, steps, scratch + r * SCRATCH_ROW + n * TILE_ROW)
    return left


@njit
def _float_block(kind, panels, x, stride, w, steps, scratch):
    """Four rows."""
    if FEW_SUMS:
        for n in range(panels):
            panel, out = w + n * steps * 1024, scratch + n * TILE_ROW
            if kind == KIND_BF16:
                bf_1(x, stride, panel, steps, out)
            elif kind == KIND_F16:
                f16_1(x, stride, panel, steps, out)
            else:
                f32_1(x, stride, panel, steps, out)
    elif kind == KIND_BF16:
        if panels == 4:
            bf_4(x, stride, w, steps, scratch)
        elif panels == 2:
            bf_2(x, stride, w, steps, scratch)
        else:
            bf_1(x, stride, w, steps, scratch)
    elif kind == KIND_F16:
        if panels == 4:
            f16_4(x, stride, w, steps, scratch)
        elif panels == 2:
            f16_2(x, stride, w, steps, scratch)
        else:
            f16_1(x, stride, w, steps, scratch)
    elif panels == 4:
        f32_4(x, stride, w, steps, scratch)
    elif panels == 2:
        f32_2(x, stride, w, steps, scratch)
    else:
        f32_1(x, stride, w, steps, scratch)


@njit(inline="always")
def _value(kind, scratch, row_scale, excess, scales, n):
    """Sixteen finished products of one row: scratch lane block n."""
    if kind == KIND_INT8:
        whole = to_float(isub(iload(scratch + TILE_ROW * n), isplat(excess)))
        return vmul(vmul(whole, vsplat(row_scale)), vload(scales + TILE_ROW * n))
    return vload(scratch + TILE_ROW * n)


@njit
def epilogue(kind, mode, shift, rows, panels, scratch, line_stride, row_scales, scales, bias, out, out_stride):
    """Finish `rows` x (16 * panels) products. `scales`, `bias`, `out` point at the first panel's entries.

    `line_stride`: bytes from one row's sums to the next one's; `shift`: what the kernel has added to each int8 weight.
    """
    kept_apart()
    one = vsplat(np.float32(1.0))
    for m in range(rows):
        line = scratch + m * line_stride
        target = out + m * out_stride
        row_scale, excess = np.float32(1.0), 0
        if kind == KIND_INT8:
            row_scale, excess = load_f32(row_scales + 8 * m), shift * load_i32(row_scales + 8 * m + 4)
        if mode >= GATED_SILU:
            for n in range(0, panels, 2):
                gate = _value(kind, line, row_scale, excess, scales, n)
                up = _value(kind, line, row_scale, excess, scales, n + 1)
                u = gate
                if mode == GATED_GELU:  # x * sigmoid(2 * sqrt(2/pi) * (x + 0.044715 x^3)), the tanh form
                    cube = vmul(vmul(gate, gate), gate)
                    u = vmul(vfma(cube, vsplat(np.float32(0.044715)), gate), vsplat(np.float32(1.5957691216057308)))
                u = vmax(u, vsplat(np.float32(-87.0)))  # e**-u must be finite
                sigmoid = vdiv(one, vadd(one, vexp(vsub(vsplat(np.float32(0.0)), u))))
                vstore(target + TILE_ROW * (n // 2), vmul(vmul(gate, sigmoid), up))
        else:
            for n in range(panels):
                y = _value(kind, line, row_scale, excess, scales, n)
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
    """Panels first..last-1 of one product. Addresses are int64; strides bytes; `steps` KiB per panel.

    `x` has its rows padded to a multiple of sixteen (what lies in the padding does not matter); `row_scales` are of
    int8, see rows.pack_row; `bias` 0: none.
    In the gated modes panels alternate gate, up; `first` and `last` are even and `out` gets half as many columns.
    """
    kept_apart()
    halve = 2 if mode >= GATED_SILU else 1
    tiles = level == AMX and kind in (KIND_BF16, KIND_INT8)
    excess = 0 if tiles else 128 if level == PORTABLE else EXCESS
    p = first
    while p < last:
        left = last - p
        panels = 4 if left >= 4 else (2 if left >= 2 else 1)
        wide = tiles and rows > LANES
        if wide and left >= 2:
            panels = 2
        weights = w + p * steps * 1024
        column = p * TILE_ROW
        b_at = bias + column if bias != 0 else 0
        m = 0
        while m < rows:
            block = min(LANES, rows - m)
            xm = x + m * x_stride
            if wide and panels == 2 and rows - m > LANES:
                block = min(2 * LANES, rows - m)
                if kind == KIND_INT8:
                    amx_i8_22(xm, x_stride, weights, steps, scratch)
                else:
                    amx_bf_22(xm, x_stride, weights, steps, scratch)
            elif tiles:
                _amx_tiles(kind, panels, xm, x_stride, weights, steps, scratch)
            elif kind == KIND_INT8 and level == PORTABLE:
                block = _plain_rows(block, panels, xm, x_stride, weights, steps, scratch)
            elif kind == KIND_INT8:
                block = min(block, _int8_rows(block, panels, xm, x_stride, weights, steps, scratch))
            else:
                for r in range(0, block, 4):
                    at = xm + r * x_stride
                    _float_block(kind, panels, at, x_stride, weights, steps, scratch + r * SCRATCH_ROW)
            epilogue(
                kind, mode, excess, block, panels, scratch, SCRATCH_ROW, row_scales + 8 * m, scales + column, b_at,
                out + m * out_stride + column // halve, out_stride,
            )  # fmt: skip
            m += block
        p += panels
