"""Blocks of quantised weights, unpacked for the products of blocks.py: one unit of a panel at a time.

A *panel* is sixteen outputs; a *unit* of it is 64 depths (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0) or 256 (Q4_K, Q5_K, Q6_K), with
the file's own integers, scales and minima in the order that models/formats.py describes. What comes out covers up to
256 depths and is the same for all formats:

  [64 vectors][16 outputs][4 depths]   u8, the file's unsigned integers
  [16 groups][16 outputs]              float32 scales (of 16 depths each for Q6_K, of 32 for the others)
  [8 groups][16 outputs]               float32 minima, for formats that have them

so that weight = scale * (integer - offset) or scale * integer + minimum. It is done once for all rows of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types

from .emit import F16, I8, I16, LANES, VF, VI, at, emit, load, prefetch, splat_int, store

SCALES = 4096  # bytes from the beginning of what was unpacked
MINIMA = SCALES + 1024
UNPACKED = MINIMA + 512 + 64  # the last 64 keep two panels from lying a multiple of 4 KiB apart
AHEAD = 4096  # bytes from what is read to what is asked for; a thread's panels lie one behind the other

_BYTES = ir.VectorType(I8, 64)
_FOUR_DEPTHS = 64  # bytes of a vector: 4 depths of 16 outputs


def _bytes(value: int) -> ir.Constant:
    return ir.Constant(_BYTES, [value] * 64)


def _words(value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(I16, 32), [value] * 32)


def _shifted(b: ir.IRBuilder, v: ir.Value, left: int) -> ir.Value:
    """Bytes shifted by `left` (right if it is negative), with bits of neighbours coming in: the caller masks them."""
    if left == 0:
        return v
    wide = b.bitcast(v, ir.VectorType(I16, 32))
    moved = b.shl(wide, _words(left)) if left > 0 else b.lshr(wide, _words(-left))
    return b.bitcast(moved, _BYTES)


def _halves(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Sixteen float16 as float32."""
    return b.fpext(load(b, address, ir.VectorType(F16, LANES), 2), VF)


def _small(b: ir.IRBuilder, address: ir.Value, signed: bool = False) -> ir.Value:
    """Sixteen bytes as int32."""
    v = load(b, address, ir.VectorType(I8, LANES), 1)
    return b.sext(v, VI) if signed else b.zext(v, VI)


def _prefetch_unit(b: ir.IRBuilder, w: ir.Value, size: int) -> None:
    for line in range(0, size, 64):
        prefetch(b, at(b, w, AHEAD + line))


def _integers(b: ir.IRBuilder, w: ir.Value, out: ir.Value, chunks: int, high_bits: int) -> None:
    """Nibbles of `chunks` x 64 depths at `w`, and behind them their fifth bits (1) or fifth and sixth (2), to bytes."""
    nibbles, above = 512 * chunks, {0: 0, 1: 8, 2: 4}[high_bits]
    high: dict[int, ir.Value] = {}
    for c in range(chunks):
        for k in range(8):
            both = load(b, at(b, w, 512 * c + 64 * k), _BYTES, 1)
            for half, v in enumerate((16 * c + k, 16 * c + 8 + k)):
                q = b.and_(_shifted(b, both, -4 * half), _bytes(15))
                if high_bits:
                    row = v // above
                    if row not in high:
                        high[row] = load(b, at(b, w, nibbles + 64 * row), _BYTES, 1)
                    bits = _shifted(b, high[row], 4 - high_bits * (v % above))
                    q = b.or_(q, b.and_(bits, _bytes(16 if high_bits == 1 else 48)))
                store(b, at(b, out, _FOUR_DEPTHS * v), q, 1)


def unpacker(unit_bytes: int, chunks: int, high_bits: int, factors: str) -> Callable[..., Any]:
    """(unit, integers, scales), addresses: unpack one unit. The minima lie behind the scales.

    `factors`: how the format has scales and minima.
    """

    @emit(types.void, types.int64, types.int64, types.int64)
    def unpack(b, w, out, scales):
        _prefetch_unit(b, w, unit_bytes)
        if factors == "bytes":  # Q8_0: bytes as they are
            for v in range(16):
                store(b, at(b, out, _FOUR_DEPTHS * v), load(b, at(b, w, _FOUR_DEPTHS * v), _BYTES, 1), 1)
            behind = at(b, w, 1024)
        else:
            _integers(b, w, out, chunks, high_bits)
            behind = at(b, w, chunks * (512 + 128 * high_bits))
        minima = at(b, scales, MINIMA - SCALES)
        if factors in ("bytes", "scales", "minima"):
            for g in range(2):
                store(b, at(b, scales, 64 * g), _halves(b, at(b, behind, 32 * g)))
                if factors == "minima":
                    store(b, at(b, minima, 64 * g), _halves(b, at(b, behind, 64 + 32 * g)))
        elif factors == "six bits":  # Q6_K: an int8 for each of 16 groups, and one float16
            d = _halves(b, at(b, behind, 256))
            for g in range(16):
                store(b, at(b, scales, 64 * g), b.fmul(b.sitofp(_small(b, at(b, behind, 16 * g), True), VF), d))
        else:  # Q4_K, Q5_K: six bits for each of 8 groups, scales and minima, and two float16
            d, dmin = _halves(b, at(b, behind, 192)), _halves(b, at(b, behind, 224))
            minus = b.fneg(dmin)
            for pair in range(4):
                upper = _small(b, at(b, behind, 128 + 16 * pair))
                for half in range(2):
                    g = 2 * pair + half
                    both = _small(b, at(b, behind, 16 * g))
                    high = b.lshr(upper, splat_int(4)) if half else b.and_(upper, splat_int(15))
                    m = b.or_(b.shl(high, splat_int(2)), b.lshr(both, splat_int(6)))
                    scale = b.sitofp(b.and_(both, splat_int(63)), VF)
                    store(b, at(b, scales, 64 * g), b.fmul(scale, d))
                    store(b, at(b, minima, 64 * g), b.fmul(b.sitofp(m, VF), minus))

    return unpack


unpack_q4_0 = unpacker(576, 1, 0, "scales")
unpack_q4_1 = unpacker(640, 1, 0, "minima")
unpack_q5_0 = unpacker(704, 1, 1, "scales")
unpack_q5_1 = unpacker(768, 1, 1, "minima")
unpack_q8_0 = unpacker(1088, 0, 0, "bytes")
unpack_q4_k = unpacker(2304, 4, 0, "six bits and minima")
unpack_q5_k = unpacker(2816, 4, 1, "six bits and minima")
unpack_q6_k = unpacker(3392, 4, 2, "six bits")
