"""Per-row work between the matrix products: norms, activations' format, rotary embedding, writing K and V.

Rows are float32 with their width padded to a multiple of sixteen by zeros. Widths below are in elements.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .linear import KIND_BF16, KIND_INT8
from .simd import (
    hmax,
    hsum,
    load_bf16,
    load_f32,
    load_i32,
    load_u16,
    rotate16,
    store_bf16,
    store_f32,
    store_i8,
    store_i32,
    store_u16,
    vabs,
    vadd,
    vfma,
    vload,
    vmax,
    vmul,
    vrint,
    vsplat,
    vstore,
    vsub,
)

_TINY = np.float32(1e-30)  # values below it count as zero: 127 over a denormal number is infinite


@njit
def inverse_rms(x, width, true_width, eps):
    """1 / sqrt(mean(x^2) + eps) over `true_width` elements (the padding is zero)."""
    total = vsplat(np.float32(0.0))
    for i in range(0, width, 16):
        v = vload(x + 4 * i)
        total = vfma(v, v, total)
    return np.float32(1.0) / np.sqrt(hsum(total) / np.float32(true_width) + eps)


@njit
def norm_row(x, weight, out, width, true_width, eps):
    scale = vsplat(inverse_rms(x, width, true_width, eps))
    for i in range(0, width, 16):
        vstore(out + 4 * i, vmul(vmul(vload(x + 4 * i), scale), vload(weight + 4 * i)))


@njit
def add_norm_row(x, weight, out, width, true_width, eps):
    """out += norm(x)"""
    scale = vsplat(inverse_rms(x, width, true_width, eps))
    for i in range(0, width, 16):
        y = vmul(vmul(vload(x + 4 * i), scale), vload(weight + 4 * i))
        vstore(out + 4 * i, vadd(vload(out + 4 * i), y))


@njit(inline="always")
def _load_within(x, i, width):
    return vload(x + 4 * i) if i < width else vsplat(np.float32(0.0))


@njit
def _pack_int8(x, width, spare, out, scale_out):
    """Rotate in blocks of 64 (see pack_row), then quantise with one scale: the largest magnitude becomes 127. Writes
    the scale and the row's sum, which float32 holds exactly."""
    peak = vsplat(np.float32(0.0))
    for i in range(0, width, 64):
        a, b = rotate16(_load_within(x, i, width)), rotate16(_load_within(x, i + 16, width))
        c, d = rotate16(_load_within(x, i + 32, width)), rotate16(_load_within(x, i + 48, width))
        a, b, c, d = vadd(a, b), vsub(a, b), vadd(c, d), vsub(c, d)
        a, b, c, d = vadd(a, c), vadd(b, d), vsub(a, c), vsub(b, d)
        vstore(spare + 4 * i, a)
        vstore(spare + 4 * i + 64, b)
        vstore(spare + 4 * i + 128, c)
        vstore(spare + 4 * i + 192, d)
        peak = vmax(vmax(vmax(vabs(a), vabs(b)), vmax(vabs(c), vabs(d))), peak)
    largest = hmax(peak)
    factor = np.float32(0.0)
    if largest > _TINY:
        factor = np.float32(127.0) / largest
    store_f32(scale_out, largest / np.float32(127.0))
    by = vsplat(factor)
    total = vsplat(np.float32(0.0))
    for i in range(0, (width + 63) // 64 * 64, 16):
        number = vrint(vmul(vload(spare + 4 * i), by))
        store_i8(out + i, number)
        total = vadd(total, number)
    store_i32(scale_out + 4, np.int64(hsum(total)))


@njit
def pack_row(kind, x, width, spare, out, scale_out):
    """Write a row in the format that a product of `kind` reads: float32, bf16, or int8 with one scale a row.
    `scale_out`, of int8 alone: float32 scale and int32 sum of the row.

    int8 rows are first rotated by a Walsh-Hadamard matrix in blocks of 64, which spreads outliers over their block; the
    weights are rotated back when they are packed, so the product is unchanged. `spare`: space for the row, rounded up
    to 64. For float32 and bf16, what lies between `width` and the product's padded depth meets weights of zero, so it
    only has to be finite.
    """
    if kind == KIND_INT8:
        _pack_int8(x, width, spare, out, scale_out)
    elif kind == KIND_BF16:
        for i in range(0, width, 16):
            store_bf16(out + 2 * i, vload(x + 4 * i))
    else:
        for i in range(0, width, 16):
            vstore(out + 4 * i, vload(x + 4 * i))


@njit
def embed_row(table, is_bf16, token, width, scale, out):
    by = vsplat(scale)
    for i in range(0, width, 16):
        v = load_bf16(table + 2 * (token * width + i)) if is_bf16 else vload(table + 4 * (token * width + i))
        vstore(out + 4 * i, vmul(v, by))


@njit
def rotate_head(x, cos, sin, half, norm, padded, head_dim, eps, scale):
    """In place on one head: optional RMS norm, rotary embedding of the two halves, then `scale`."""
    if norm != 0:
        norm_row(x, norm, x, padded, head_dim, eps)
    whole = half // 16 * 16
    by = vsplat(scale)
    for i in range(0, whole, 16):
        a, b, c, s = vload(x + 4 * i), vload(x + 4 * (i + half)), vload(cos + 4 * i), vload(sin + 4 * i)
        vstore(x + 4 * i, vmul(vsub(vmul(a, c), vmul(b, s)), by))
        vstore(x + 4 * (i + half), vmul(vadd(vmul(b, c), vmul(a, s)), by))
    for i in range(whole, half):
        a1, b1 = load_f32(x + 4 * i), load_f32(x + 4 * (i + half))
        c1, s1 = load_f32(cos + 4 * i), load_f32(sin + 4 * i)
        store_f32(x + 4 * i, (a1 * c1 - b1 * s1) * scale)
        store_f32(x + 4 * (i + half), (b1 * c1 + a1 * s1) * scale)


@njit
def write_key(x, page, lane, padded, is_bf16, spare):
    """Keys of a page and head: [padded / 2][16 places][2] bf16, or [padded][16 places] float32.

    `spare`: space for the head as bf16.
    """
    if is_bf16:
        for c in range(0, padded, 16):
            store_bf16(spare + 2 * c, vload(x + 4 * c))
        for pair in range(padded // 2):
            store_i32(page + 4 * (pair * 16 + lane), load_i32(spare + 4 * pair))
    else:
        for c in range(padded):
            store_f32(page + 4 * (c * 16 + lane), load_f32(x + 4 * c))


@njit
def write_value(x, page, lane, padded, is_bf16, spare):
    """Values of a page and head: [8 pairs of places][padded][2] bf16, or [16 places][padded] float32."""
    if is_bf16:
        row = page + 4 * (lane >> 1) * padded + 2 * (lane & 1)
        for c in range(0, padded, 16):
            store_bf16(spare + 2 * c, vload(x + 4 * c))
        for c in range(padded):
            store_u16(row + 4 * c, load_u16(spare + 2 * c))
    else:
        for c in range(padded):
            store_f32(page + 4 * (lane * padded + c), load_f32(x + 4 * c))
