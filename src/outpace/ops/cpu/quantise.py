"""Blocks of Q4_1 from float weights, compiled: models.formats.quantise_q4_1 is the reference."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .candidates import bits_of, float_of
from .compiled import compiled
from .interleave import put16
from .simd import hmax, hsum, store_i8, vadd, vfma, vload, vmax, vmul, vrint, vsplat, vsub

_BLOCK, _BLOCK_BYTES = 32, 20
_LARGEST = np.float32(65504.0)  # of f16
_SMALLEST = np.float32(2.0**-24)
_LEAST_EXPONENT = 127 - 14  # below it f16 has steps of 2^-24


@njit
def _rounded(x):
    """A float32 rounded to what f16 can hold, half to even; its range apart."""
    exponent = max(bits_of(x) >> 23 & 255, _LEAST_EXPONENT)
    big = float_of((exponent + 13) << 23 | 0x400000)  # where the steps of float32 are those of f16 at x
    return (x + big) - big


@njit
def _half(x):
    """Bits of an f16, from a float32 that f16 holds exactly."""
    bits = bits_of(x)
    exponent = (bits >> 23 & 255) - _LEAST_EXPONENT
    magnitude = (exponent + 1) << 10 | bits >> 13 & 0x3FF
    if exponent < 0:
        magnitude = np.int64(abs(x) * np.float32(2.0**24))
    return bits >> 16 & 0x8000 | magnitude


@njit
def _integers(v, inverse):
    """v times `inverse`, rounded and kept to 0..15."""
    zero = vsplat(np.float32(0.0))
    q = vmax(vrint(vmul(v, inverse)), zero)
    return vsub(zero, vmax(vsub(zero, q), vsplat(np.float32(-15.0))))


@njit
def _block(x, to):
    """32 floats at x -> a block. Whether they are numbers that f16 can scale."""
    a, b = vload(x), vload(x + 64)
    zero = vsplat(np.float32(0.0))
    low = _rounded(-hmax(vmax(vsub(zero, a), vsub(zero, b))))
    high = hmax(vmax(a, b))
    if not (abs(low) <= _LARGEST and high - low <= np.float32(9.0) * _LARGEST):
        return False
    a, b = vsub(a, vsplat(low)), vsub(b, vsplat(low))
    best, scale = np.float32(np.inf), np.float32(1.0)
    for steps in range(15, 8, -1):
        candidate = _rounded(max((high - low) / np.float32(steps), _SMALLEST))
        by, inverse = vsplat(-candidate), vsplat(np.float32(1.0) / candidate)
        d, e = vfma(_integers(a, inverse), by, a), vfma(_integers(b, inverse), by, b)
        error = hsum(vfma(d, d, vmul(e, e)))
        if error < best:
            best, scale = error, candidate
    if not (best < np.float32(np.inf) and scale <= _LARGEST):  # NaN is never the better
        return False
    inverse = vsplat(np.float32(1.0) / scale)
    put16(to, _half(scale))
    put16(to + 2, _half(low))
    store_i8(to + 4, vadd(_integers(a, inverse), vmul(_integers(b, inverse), vsplat(np.float32(16.0)))))
    return True


@compiled
def _quantise(w, out, first, last):
    """Rows first..last-1 of f32[N, K]; how many blocks could not be made."""
    bad = 0
    for n in range(first, last):
        for g in range(w.shape[1] // _BLOCK):
            at = out.ctypes.data + n * out.shape[1] + g * _BLOCK_BYTES
            bad += not _block(w.ctypes.data + 4 * (n * w.shape[1] + g * _BLOCK), at)
    return bad


def quantise_rows(w: NDArray[np.float32], out: NDArray[np.uint8], first: int = 0, last: int | None = None) -> int:
    """Rows first..last-1 of f32[N, K], K a multiple of 32, to u8[N, K / 32 * 20]; other threads run meanwhile.

    Returns how many blocks hold no numbers, or some that are too large for f16: those are not written.
    """
    assert w.flags.c_contiguous and out.flags.c_contiguous and w.shape[1] % _BLOCK == 0
    return int(_quantise(w, out, first, len(w) if last is None else last))
