"""Pages of keys and values in four bits, and four more below them: the layout, and the kernel that fills it.

A page of one KV head in one layer is one record, read front to back (`C` head width; a page is sixteen places):

    keys    gain   f32 [16]      of a place over the channels
            mid    bf16 [C]      of a channel over the page
            codes  4 bits        bytes [C / 8][16 places][4 channels]
    values  scale  f32 [16]      of a place over the channels
            mid    f32 [16]
            codes  4 bits        bytes [C / 16][2][16 channels][4 places]

With the upper codes u alone a key is mid[channel] + gain[place] spread[channel] (u - 7.5) and a value mid[place] +
scale[place] (u - 7.5); with the lower codes l, which have an array of their own of the codes' layout (keys, then
values), u - 7.5 becomes (16 u + l - 128) / 16. `spread` f32 [C] is one for all pages of a head. A byte holds two
numbers for the integer dot product of four bytes: of the eight channels c of keys the first four in the lower bits, the
others above; of the eight places of values likewise.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from .compiled import compiled
from .emit import F32, I32, VI, const, emit, f32x16, i32x16, splat, splat_int
from .simd import (
    hmax,
    iload,
    istore,
    load_bf16_even,
    load_bf16_odd,
    load_f32,
    store_f32,
    store_u16,
    vabs,
    vadd,
    vdiv,
    vmax,
    vmul,
    vrint,
    vsplat,
    vstore,
    vsub,
)

NOTHING = np.float32(1e-30)  # a scale below it is zero: its inverse would not be finite


def record_bytes(width: int) -> int:
    """Bytes of one page of one KV head, upper bits. `width`: C, a multiple of 32."""
    return 18 * width + 192


def lower_bytes(width: int) -> int:
    return 16 * width


# Where the parts of a record begin; the gains of keys and the codes of values are its ends.


@njit(inline="always")
def key_mids():
    return 64


@njit(inline="always")
def key_codes(width):
    return 64 + 2 * width


@njit(inline="always")
def value_scales(width):
    return 64 + 10 * width


@njit(inline="always")
def value_codes(width):
    return 192 + 10 * width


@emit(types.int64, types.float32)
def _bf16(b, x):
    """Upper half of a float32, rounded half up in magnitude."""
    return b.lshr(b.add(b.zext(b.bitcast(x, I32), const(0).type), const(0x8000)), const(16))


@emit(types.float32, types.int64)
def _whole(b, half):
    """The float32 whose upper half is given."""
    return b.bitcast(b.trunc(b.shl(half, const(16)), I32), F32)


@emit(i32x16, i32x16, f32x16, types.int64)
def _with_codes(b, words, codes, shift):
    return b.or_(words, b.shl(b.fptosi(codes, VI), splat(b, b.trunc(shift, I32))))


@emit(i32x16)
def _no_words(b):
    return splat_int(0)


@njit(inline="always")
def _put(address, codes, shift):
    istore(address, _with_codes(iload(address), codes, shift))


@njit(inline="always")
def _clear(address, size):
    for i in range(0, size, 64):
        istore(address + i, _no_words())


@njit(inline="always")
def _negative(x):
    return vmul(x, vsplat(np.float32(-1.0)))


@njit(inline="always")
def _clamp(x, low, high):
    return vmax(_negative(vmax(_negative(x), vsplat(-high))), vsplat(low))


@njit(inline="always")
def _inverse(scale):
    return np.float32(1.0) / scale if scale > NOTHING else np.float32(0.0)


@njit(inline="always")
def _codes(y):
    """Upper codes 0..15 and lower ones 0..15, as floats, of numbers in [0, 15]."""
    upper = _clamp(vrint(y), np.float32(0.0), np.float32(15.0))
    rest = vmul(vsub(y, upper), vsplat(np.float32(16.0)))
    lower = vadd(_clamp(vrint(rest), np.float32(-8.0), np.float32(7.0)), vsplat(np.float32(8.0)))
    return upper, lower


@njit(inline="always")
def _middle(x):
    """Halfway between the largest and the smallest lane, in bf16."""
    half = np.float32(0.5)
    return _bf16(half * hmax(x) - half * hmax(_negative(x)))


@njit
def _quantise_keys(keys, width, spread, record, lower):
    """`spread` f32 [C]; a channel without spread has 0 and is its mid."""
    codes = record + key_codes(width)
    _clear(codes, 8 * width)
    if lower:
        _clear(lower, 8 * width)
    reach = vsplat(np.float32(0.0))
    for c in range(width):
        x = load_bf16_odd(keys + 32 * (c - 1)) if c % 2 else load_bf16_even(keys + 32 * c)
        mid = _middle(x)
        store_u16(record + key_mids() + 2 * c, mid)
        distance = vabs(vsub(x, vsplat(_whole(mid))))
        reach = vmax(reach, vmul(distance, vsplat(_inverse(load_f32(spread + 4 * c)))))
    gain = vmul(vmax(reach, vsplat(NOTHING)), vsplat(np.float32(1.0 / 7.5)))
    vstore(record, gain)
    inverse = vdiv(vsplat(np.float32(1.0)), gain)
    for c in range(width):
        x = load_bf16_odd(keys + 32 * (c - 1)) if c % 2 else load_bf16_even(keys + 32 * c)
        y = vmul(vsub(x, vsplat(_whole(_middle(x)))), vsplat(_inverse(load_f32(spread + 4 * c))))
        up, low = _codes(vadd(vmul(y, inverse), vsplat(np.float32(7.5))))
        at, shift = 64 * (c // 8), 8 * (c % 4) + 4 * (c // 4 % 2)
        _put(codes + at, up, shift)
        if lower:
            _put(lower + at, low, shift)


@njit(inline="always")
def _quantise_place(values, odd, width, place, scales, codes, lower):
    """Values of one place, the even or odd half of a row of pairs."""
    top = bottom = vsplat(np.float32(-np.inf))
    for c in range(0, width, 16):
        x = load_bf16_odd(values + 4 * c) if odd else load_bf16_even(values + 4 * c)
        top, bottom = vmax(top, x), vmax(bottom, _negative(x))
    highest, lowest = hmax(top), -hmax(bottom)
    mid = np.float32(0.5) * highest + np.float32(0.5) * lowest
    scale = max(highest - mid, mid - lowest) * np.float32(1.0 / 7.5)
    store_f32(scales + 4 * place, scale)
    store_f32(scales + 64 + 4 * place, mid)
    inverse = vsplat(_inverse(scale))
    for c in range(0, width, 16):
        x = load_bf16_odd(values + 4 * c) if odd else load_bf16_even(values + 4 * c)
        up, low = _codes(vadd(vmul(vsub(x, vsplat(mid)), inverse), vsplat(np.float32(7.5))))
        at, shift = 128 * (c // 16) + 64 * (place // 8), 8 * (place % 4) + 4 * (place // 4 % 2)
        _put(codes + at, up, shift)
        if lower:
            _put(lower + at, low, shift)


@njit
def _quantise_values(values, width, record, lower):
    scales, codes = record + value_scales(width), record + value_codes(width)
    below = lower + 8 * width if lower else 0
    _clear(codes, 8 * width)
    if lower:
        _clear(below, 8 * width)
    for place in range(16):
        _quantise_place(values + 4 * width * (place // 2), place % 2 == 1, width, place, scales, codes, below)


@compiled
def quantise_pages(keys, values, layer, page, head, width, pages, spreads, codes, strides, lower, lower_strides):
    """Fill the records of some pages, of all layers and heads.

    `keys`, `values`: addresses of bf16 pages, `layer`, `page`, `head` their strides in bytes; `spreads`: address of f32
    [layers, heads, C]; `codes`, `lower`: where the records lie, with (layers, heads, layer stride, page stride, head
    stride) and the lower ones' three strides; lower = 0: the upper bits only. `pages` i32[P].
    """
    for i in range(strides[0]):
        for p in pages:
            for h in range(strides[1]):
                source = i * layer + p * page + h * head
                record = codes + i * strides[2] + p * strides[3] + h * strides[4]
                below = lower
                if lower:
                    below += i * lower_strides[0] + p * lower_strides[1] + h * lower_strides[2]
                spread = spreads + 4 * width * (i * strides[1] + h)
                _quantise_keys(keys + source, width, spread, record, below)
                _quantise_values(values + source, width, record, below)
