"""Rows of quantised blocks, as a file has them, to float32: the bits of gguf.quants.dequantize, ten times as fast.

A block is first taken apart into its integers q u8[256], scales s and minima m f32[16] (of groups of 16 or 32),
whatever its format.
"""

from __future__ import annotations

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from .compiled import compiled
from .emit import F32, I16, emit
from .interleave import _BLOCKS, _Q4_0, _Q4_1, _Q4_K, _Q5_0, _Q5_1, _Q5_K, _Q6_K, _Q8_0, KINDS


@emit(types.float32, types.int64)
def _float_of_half(b, bits):
    return b.fpext(b.bitcast(b.trunc(bits, I16), ir.HalfType()), F32)


@njit
def _half(data, at):
    return _float_of_half(np.int64(data[at]) | np.int64(data[at + 1]) << 8)


@njit
def _nibbles(data, at, q, to, n):
    """n bytes: the low halves become n integers, the high ones the n behind them."""
    for i in range(n):
        q[to + i] = data[at + i] & 15
    for i in range(n):
        q[to + n + i] = data[at + i] >> 4


@njit
def _of_32(kind, data, at, q, s, m):
    head = 4 if kind in (_Q4_1, _Q5_1) else 2
    s[0] = _half(data, at)
    if head == 4:
        m[0] = _half(data, at + 2)
    if kind == _Q8_0:
        for i in range(32):
            q[i] = data[at + 2 + i] ^ 0x80
        return
    if kind == _Q4_0 or kind == _Q4_1:  # noqa: SIM109 (told apart when it is compiled)
        _nibbles(data, at + head, q, 0, 16)
        return
    _nibbles(data, at + head + 4, q, 0, 16)
    for i in range(32):
        q[i] |= (data[at + head + i // 8] >> (i % 8) & 1) << 4


@njit
def _of_k(kind, data, at, q, s, m):
    d, dmin, packed, low = _half(data, at), _half(data, at + 2), at + 4, at + 16
    for g in range(8):
        if g < 4:
            scale, minimum = data[packed + g] & 63, data[packed + 4 + g] & 63
        else:
            scale = data[packed + 4 + g] & 15 | data[packed + g - 4] >> 6 << 4
            minimum = data[packed + 4 + g] >> 4 | data[packed + g] >> 6 << 4
        s[g], m[g] = d * np.float32(scale), -(dmin * np.float32(minimum))
    if kind == _Q5_K:
        low += 32
    for c in range(4):
        _nibbles(data, low + 32 * c, q, 64 * c, 32)
    if kind == _Q5_K:
        for g in range(8):
            for i in range(32):
                q[32 * g + i] |= (data[at + 16 + i] >> g & 1) << 4


@njit
def _of_q6_k(data, at, q, s):
    d = _half(data, at + 208)
    for g in range(16):
        s[g] = d * np.float32(np.int8(data[at + 192 + g]))
    for h in range(2):
        for i in range(64):  # the low halves are depths 0..63 of these 128, the high ones 64..127
            q[128 * h + i] = data[at + 64 * h + i] & 15
            q[128 * h + 64 + i] = data[at + 64 * h + i] >> 4
        for f in range(4):
            for i in range(32):
                q[128 * h + 32 * f + i] |= (data[at + 128 + 32 * h + i] >> 2 * f & 3) << 4


@njit
def _scale(q, s, m, out, to, count, group, offset, has_minima):
    for g in range(count // group):
        by, start = s[g], g * group
        if has_minima:
            for i in range(group):
                out[to + start + i] = by * np.float32(q[start + i]) + m[g]
        else:
            for i in range(group):
                out[to + start + i] = by * (np.float32(q[start + i]) - offset)


@compiled
def _dequantise(kind, data, out):
    """u8[bytes] -> f32[weights], both contiguous: block after block."""
    size, count, at, to = _BLOCKS[kind], 32 if kind <= _Q8_0 else 256, 0, 0
    q = np.empty(256, dtype=np.uint8)
    s, m = np.zeros(16, dtype=np.float32), np.zeros(16, dtype=np.float32)
    while to < len(out):
        if kind <= _Q8_0:
            _of_32(kind, data, at, q, s, m)
        elif kind == _Q6_K:
            _of_q6_k(data, at, q, s)
        else:
            _of_k(kind, data, at, q, s, m)
        if kind == _Q6_K:
            _scale(q, s, m, out, to, 256, 16, np.float32(32), False)
        elif kind == _Q4_K or kind == _Q5_K:  # noqa: SIM109
            _scale(q, s, m, out, to, 256, 32, np.float32(0), True)
        elif kind == _Q4_1 or kind == _Q5_1:  # noqa: SIM109
            _scale(q, s, m, out, to, 32, 32, np.float32(0), True)
        else:
            offset = np.float32(8) if kind == _Q4_0 else np.float32(16) if kind == _Q5_0 else np.float32(128)
            _scale(q, s, m, out, to, 32, 32, offset, False)
        at, to = at + size, to + count


def dequantise_rows(data: NDArray[np.uint8], name: str, depth: int) -> NDArray[np.float32]:
    """u8[..., bytes per row] of the format `name`, one of blocks -> f32[..., depth]; other threads run meanwhile."""
    assert KINDS[name] <= _Q6_K
    flat = np.ascontiguousarray(data).reshape(-1)
    out = np.empty((*data.shape[:-1], depth), dtype=np.float32)
    _dequantise(KINDS[name], flat, out.reshape(-1))
    return out
