"""Blocks of quantised weights, taken apart for the products of blocks.py: one unit of a panel at a time.

A *panel* is sixteen outputs; a *unit* of it is 64 depths (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0) or 256 (Q4_K, Q5_K, Q6_K), with
the file's own integers, scales and minima in the order that models/formats.py describes. Scales and minima are unpacked
once for all rows of a step, up to 256 depths of a panel at a time:

  [16 groups][16 outputs]              of 16 depths each for Q6_K, of 32 for the others: scales in float32, or whole
                                       scales within a unit of 256 as groups.scale_of makes them
  [8 groups][16 outputs]               float32 minima, for formats that have them
  [2][16 outputs]                      float32: what whole scales and minima of a unit of 256 are times
  [64 vectors][16 outputs][4 depths]   u8, the file's unsigned integers; only where many rows make that worth while

so that weight = scale * (integer - offset) or scale * integer + minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.ir as ir
from numba import types

from .emit import F16, I8, I16, LANES, VF, at, const, emit, load, prefetch, store
from .groups import scale_of

# bytes from the beginning of what was unpacked
MINIMA = 1024
WHOLE = MINIMA + 512
INTEGERS = WHOLE + 128
UNPACKED = INTEGERS + 4096
AHEAD = 4096  # bytes from what is read to what is asked for; a thread's panels lie one behind the other

_CHUNK = 64  # depths


def _masked(b: ir.IRBuilder, v: ir.Value, left: int, mask: int) -> ir.Value:
    """Bytes shifted by `left` (right if it is negative) & mask."""
    wide = ir.VectorType(I16, v.type.count // 2)
    if left:
        shift = b.shl if left > 0 else b.lshr
        v = b.bitcast(shift(b.bitcast(v, wide), ir.Constant(wide, [abs(left)] * wide.count)), v.type)
    return b.and_(v, ir.Constant(v.type, [mask] * v.type.count))


def _halves(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Sixteen float16 as float32."""
    return b.fpext(load(b, address, ir.VectorType(F16, LANES), 2), VF)


def _sixteen(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Sixteen bytes."""
    return load(b, address, ir.VectorType(I8, LANES), 1)


@dataclass(frozen=True, slots=True)
class Integers:
    """Where a panel's integers lie, chunk by chunk of 64 depths: nibbles with their fifth (and sixth) bits, or bytes.

    `stride`: bytes from chunk to chunk; `high_at`, `high_stride`: those of the upper bits.
    """

    bits: int
    stride: int
    high_at: int = 0
    high_stride: int = 0

    def vector(self, b: ir.IRBuilder, chunk: ir.Value, high: ir.Value, v: int, lanes: int) -> ir.Value:
        """Vector `v` of 16, four depths of `lanes` outputs as bytes. `chunk`, `high`: addresses of the first output's
        integers and upper bits."""
        ty = ir.VectorType(I8, 4 * lanes)
        if self.bits == 8:
            return load(b, at(b, chunk, 64 * v), ty, 1)
        half, k = divmod(v, 8)
        q = _masked(b, load(b, at(b, chunk, 64 * k), ty, 1), -4 * half, 15)
        if self.bits == 4:
            return q
        above = self.bits - 4
        row, place = divmod(v, 8 // above)
        upper = load(b, at(b, high, 64 * row), ty, 1)
        return b.or_(q, _masked(b, upper, 4 - above * place, (1 << self.bits) - 16))

    def ask(self, b: ir.IRBuilder, chunk: ir.Value, high: ir.Value, v: int) -> None:
        """Ask for what lies AHEAD of vector `v`, each line of memory once."""
        if self.bits == 8 or v < 8:
            prefetch(b, at(b, chunk, AHEAD + 64 * v))
        if self.bits in (5, 6) and v % (8 // (self.bits - 4)) == 0:
            prefetch(b, at(b, high, AHEAD + 64 * (v // (8 // (self.bits - 4)))))


BYTES = Integers(8, 1024)  # as they are once unpacked


@dataclass(frozen=True, slots=True)
class Packing:
    """A format. `factors`: how it has scales and minima; `offset` of its integers, 0: it has minima."""

    name: str
    unit_bytes: int
    chunks: int  # of a unit
    bits: int
    offset: int
    factors: str

    @property
    def group(self) -> int:
        """Depths that share a scale."""
        return 16 if self.factors == "six bits" else 32

    @property
    def is_whole(self) -> bool:
        """Scales are whole numbers within a unit."""
        return self.chunks > 1

    @property
    def integers(self) -> Integers:
        nibbles, above = 512 * self.chunks, 128 * (self.bits - 4)
        if self.chunks > 1:
            return Integers(self.bits, 512, nibbles, above)
        return Integers(self.bits, self.unit_bytes, nibbles, self.unit_bytes)

    @property
    def behind(self) -> int:
        """Where the factors of a unit begin."""
        return 1024 if self.bits == 8 else self.chunks * (512 + 128 * (self.bits - 4))


Q4_0 = Packing("Q4_0", 576, 1, 4, 8, "scales")
Q4_1 = Packing("Q4_1", 640, 1, 4, 0, "minima")
Q5_0 = Packing("Q5_0", 704, 1, 5, 16, "scales")
Q5_1 = Packing("Q5_1", 768, 1, 5, 0, "minima")
Q8_0 = Packing("Q8_0", 1088, 1, 8, 128, "scales")
Q4_K = Packing("Q4_K", 2304, 4, 4, 0, "six bits and minima")
Q5_K = Packing("Q5_K", 2816, 4, 5, 0, "six bits and minima")
Q6_K = Packing("Q6_K", 3392, 4, 6, 32, "six bits")


def integers_of(form: Packing) -> Callable[..., Any]:
    """(chunk, high, out), addresses: 64 depths' integers as bytes."""
    source = form.integers

    @emit(types.void, *[types.int64] * 3)
    def unpack(b, chunk, high, out):
        for v in range(16):
            source.ask(b, chunk, high, v)
            store(b, at(b, out, 64 * v), source.vector(b, chunk, high, v, LANES), 1)

    return unpack


def factors_of(form: Packing) -> Callable[..., Any]:
    """(unit, index, out), addresses: scales and minima of a unit, the `index`-th of those that `out` has room for."""

    @emit(types.void, *[types.int64] * 3)
    def unpack(b, w, index, out):
        for line in range(form.behind, form.unit_bytes, 64):
            prefetch(b, at(b, w, AHEAD + line))
        behind = at(b, w, form.behind)
        if not form.is_whole:
            scales = at(b, out, b.mul(index, const(128)))
            for g in range(2):
                store(b, at(b, scales, 64 * g), _halves(b, at(b, behind, 32 * g)))
                if form.offset == 0:
                    store(b, at(b, scales, MINIMA + 64 * g), _halves(b, at(b, behind, 64 + 32 * g)))
        elif form.factors == "six bits":  # Q6_K: an int8 for each of 16 groups, and one float16
            store(b, at(b, out, WHOLE), _halves(b, at(b, behind, 256)))
            for g in range(16):
                store(b, at(b, out, 64 * g), scale_of(b, _sixteen(b, at(b, behind, 16 * g)), True))
        else:  # Q4_K, Q5_K: six bits for each of 8 groups, scales and minima, and two float16
            store(b, at(b, out, WHOLE), _halves(b, at(b, behind, 192)))
            store(b, at(b, out, WHOLE + 64), b.fneg(_halves(b, at(b, behind, 224))))
            for pair in range(4):
                upper = _sixteen(b, at(b, behind, 128 + 16 * pair))
                for half in range(2):
                    g = 2 * pair + half
                    both = _sixteen(b, at(b, behind, 16 * g))
                    high = _masked(b, _masked(b, upper, -4 * half, 15), 2, 60)
                    m = b.or_(high, _masked(b, both, -6, 3))
                    store(b, at(b, out, 64 * g), scale_of(b, _masked(b, both, 0, 63), False))
                    store(b, at(b, out, MINIMA + 64 * g), b.uitofp(m, VF))

    return unpack
