"""Sums over 32 depths of weights in blocks x int8 activations, each group of depths times its scale, as float32.

A scale within a unit of 256 depths is an integer; then sums and scales together stay below 2 ** 24, so that they are
exact, on every processor, whether they are multiplied as integers or as float32.

The offset of weights without minima is taken off by what a sum begins with: a *word* for each group of a row, made when
activations are packed (start_word).
"""

from __future__ import annotations

from collections.abc import Sequence

import llvmlite.ir as ir
from numba import njit, types

from . import dots, isa
from .emit import F32, I16, I32, I64, VF, VI, call, const, emit, f32x16, load, pinned, splat
from .simd import hsum, load_f32, load_i32

LANES = dots.LANES
_FLOATS, _INTEGERS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_SHORTS = ir.VectorType(I16, 2 * LANES)


class _Groups:
    """`count` such sums. `bits`: of the weights; `minima`: they have no offset; `group`: depths that share a scale."""

    def __init__(self, b: ir.IRBuilder, bits: int, minima: bool, group: int, count: int) -> None:
        self._b, self._bits, self._minima = b, bits, minima
        self.run = group // 4  # vectors of four depths from one `close` to the next
        self._totals = dots.Totals(b, bits, count)
        self._sums: list[ir.Value | None] = [None] * count

    def begin(self, words: Sequence[ir.Value]) -> None:
        """A group. `words`: addresses of each sum's word."""
        self._totals.begin([dots.start(self._b, self._bits, None if self._minima else at_) for at_ in words])

    def add(self, vectors: Sequence[tuple[ir.Value, ir.Value]]) -> None:
        """To each sum, four depths of weights x activations, as dots.load_weights and load_activations give them."""
        for i, (w, x) in enumerate(vectors):
            self._totals.add(i, [w], [x])

    def close(self, scales: Sequence[ir.Value]) -> None:
        """Multiply what was added by scales, by their addresses (see scale_of); none: by one."""
        b = self._b
        for i, before in enumerate(self._sums):
            value = b.sitofp(self._totals.sum(i), _FLOATS)
            if scales:
                value = b.fmul(value, load(b, scales[i], _FLOATS))
            self._sums[i] = value if before is None else b.fadd(before, value)

    def take(self) -> list[ir.Value]:
        """The sums; the next ones begin."""
        sums, self._sums = [s for s in self._sums if s is not None], [None] * len(self._sums)
        return sums


class _Shorts(_Groups):
    """AVX2, for up to six bits. vpmaddubsw adds products of two depths in int16; these are added in int16, modulo
    2 ** 16, and vpmaddwd multiplies neighbours by the scale and adds them to int32.

    What has to fit is the last sum alone, not those on the way. With the offset off, 16 products of four or five bits
    fit and 8 of six; with minima, 16 products of four bits and 8 of five.
    """

    def __init__(self, b: ir.IRBuilder, bits: int, minima: bool, group: int, count: int) -> None:
        super().__init__(b, bits, minima, group, count)
        if bits == 5 and minima:
            self.run = 4
        self._shorts: list[ir.Value | None] = [None] * count

    def begin(self, words: Sequence[ir.Value]) -> None:
        b = self._b
        if self._minima:
            self._shorts = [None] * len(words)
            return
        made: dict[ir.Value, ir.Value] = {}
        for word in words:
            if word not in made:
                start = b.bitcast(splat(b, load(b, word, I32), LANES), _SHORTS)
                made[word] = b.shl(start, ir.Constant(_SHORTS, [1] * 2 * LANES)) if self._bits == 5 else start
        self._shorts = [made[word] for word in words]

    def add(self, vectors: Sequence[tuple[ir.Value, ir.Value]]) -> None:
        b, sums = self._b, []
        for before, (w, x) in zip(self._shorts, vectors, strict=True):
            pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", _SHORTS, w, x)
            sums.append(pairs if before is None else b.add(before, pairs))
        self._shorts = list(pinned(b, sums))

    def close(self, scales: Sequence[ir.Value]) -> None:
        b = self._b
        ones = ir.Constant(_SHORTS, [1] * 2 * LANES)
        for i, before in enumerate(self._sums):
            scale = load(b, scales[i], _SHORTS) if scales else ones
            value = call(b, "llvm.x86.avx2.pmadd.wd", _INTEGERS, self._shorts[i], scale)
            self._sums[i] = value if before is None else b.add(before, value)
            self._shorts[i] = None

    def take(self) -> list[ir.Value]:
        return [self._b.sitofp(s, _FLOATS) for s in super().take()]


_IS_AVX2 = isa.DOT == isa.AVX2


def groups(b: ir.IRBuilder, bits: int, minima: bool, group: int, count: int) -> _Groups:
    return (_Shorts if _IS_AVX2 and bits < 8 else _Groups)(b, bits, minima, group, count)


def scale_of(b: ir.IRBuilder, small: ir.Value, signed: bool) -> ir.Value:
    """What `close` reads, for sixteen scales in bytes: float32, or the number twice as int16."""
    wide = ir.VectorType(I16 if _IS_AVX2 else I32, 16)
    number = b.sext(small, wide) if signed else b.zext(small, wide)
    if not _IS_AVX2:
        return b.sitofp(number, VF)
    twice = ir.Constant(ir.VectorType(I32, 32), [i // 2 for i in range(32)])
    return b.bitcast(b.shuffle_vector(number, number, twice), VI)


@njit(inline="always")
def load_scale(address):
    """One of these scales as a number."""
    if _IS_AVX2:
        return float(((load_i32(address) & 0xFFFF) ^ 0x8000) - 0x8000)
    return load_f32(address)


def _of_two(build_factor: int):
    @emit(types.int64, f32x16)
    def word(b, v):
        whole, out = b.fptosi(v, VI), const(0)
        for half in range(2):
            order = ir.Constant(ir.VectorType(I32, 8), [4 * k + 2 * half + j for k in range(4) for j in range(2)])
            eight = b.shuffle_vector(whole, whole, order)
            total = call(b, "llvm.vector.reduce.add.v8i32", I32, eight)
            part = b.and_(b.zext(b.mul(total, const(-build_factor, I32)), I64), const(0xFFFF))
            out = b.or_(out, b.shl(part, const(16 * half)))
        return out

    return word


_word_16, _word_32 = _of_two(32), _of_two(8)


@njit(inline="always")
def start_word(v, depths):
    """The word of `depths` activations, 16 or 32, given as sixteen sums of them that lie a multiple of 16 apart: their
    sum, negated; for int16 the sums of the first two and the last two of each four depths, times the offset, 32 (six
    bits) or 8 (four bits; twice that is five bits')."""
    if not _IS_AVX2:
        return int(-hsum(v))
    return _word_16(v) if depths == 16 else _word_32(v)
