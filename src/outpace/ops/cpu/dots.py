"""Sums of unsigned weights x signed activations by the integer instructions that a processor has.

A *total* is i32[lanes outputs]: the sum over a group of depths of weights of a few bits x int8 activations in
[-127, 127], four depths at a time. It is exact, so the same on every processor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

import llvmlite.ir as ir

from . import isa
from .emit import I1, I8, I16, I32, Accumulators, call, const, load, splat


def _all(value: int, ty: ir.VectorType) -> ir.Constant:
    return ir.Constant(ty, [value] * ty.count)


class _Totals:
    """`count` totals in registers, by shifts and multiplications of int32 on any processor; the other classes are the
    same with other instructions. `bits`: of the weights; 4, 5, 6 or 8."""

    lanes = 16  # outputs of a register
    excess = 128  # how much more eight-bit weights count than a signed byte with their uppermost bit flipped
    # vectors that are best added at once, by bits; a divisor of 4 for six, of 8 for the others
    STEP: ClassVar[dict[int, int]] = {4: 1, 5: 1, 6: 1, 8: 1}

    def __init__(self, b: ir.IRBuilder, bits: int, count: int) -> None:
        self._b, self._bits = b, bits
        self._whole, self._short, self._bytes = (
            ir.VectorType(t, self.lanes * n) for t, n in ((I32, 1), (I16, 2), (I8, 4))
        )
        self._totals = Accumulators(b, count, self._whole)

    def begin(self, starts: Sequence[ir.Value] = ()) -> None:
        """A total for each of the starts, or from zero."""
        for i in range(len(self._totals.slots)):
            self._totals[i] = starts[i] if starts else ir.Constant(self._whole, None)

    def add(self, i: int, weights: Sequence[ir.Value], activations: Sequence[ir.Value]) -> None:
        """To total i, vectors of four depths as load_weights and load_activations give them."""
        for w, x in zip(weights, activations, strict=True):
            self._totals[i] = self._dot(self._totals[i], w, x)

    def _dot(self, total: ir.Value, weights: ir.Value, activations: ir.Value) -> ir.Value:
        b, whole = self._b, self._whole
        w, x = b.bitcast(weights, whole), b.bitcast(activations, whole)
        for j in range(4):
            wj = b.and_(b.lshr(w, _all(8 * j, whole)), _all(255, whole))
            xj = b.ashr(b.shl(x, _all(24 - 8 * j, whole)), _all(24, whole))
            total = b.add(total, b.mul(wj, xj))
        return total

    def sum(self, i: int) -> ir.Value:
        return self._totals[i]


class _OneInstruction(_Totals):
    """An instruction that multiplies unsigned by signed bytes and adds four products to an int32."""

    STEP: ClassVar[dict[int, int]] = {4: 8, 5: 8, 6: 4, 8: 8}
    name = "llvm.x86.avx512.vpdpbusd.512"

    def _dot(self, total: ir.Value, weights: ir.Value, activations: ir.Value) -> ir.Value:
        w, x = (self._b.bitcast(v, self._whole) for v in (weights, activations))
        return call(self._b, self.name, self._whole, total, w, x)


class _AvxVnni(_OneInstruction):
    name, lanes = "llvm.x86.avx512.vpdpbusd.256", 8


class _I8mm(_OneInstruction):
    name, lanes = "llvm.aarch64.neon.usdot.v4i32.v16i8", 4

    def _dot(self, total: ir.Value, weights: ir.Value, activations: ir.Value) -> ir.Value:
        return call(self._b, self.name, self._whole, total, weights, activations)


class _Signed(_Totals):
    """Processors that multiply signed bytes alone. Weights of up to six bits are both; eight bits become signed by
    their uppermost bit flipped, which is the offset that a start would take away: their totals begin at zero."""

    excess = 0
    STEP: ClassVar[dict[int, int]] = {4: 4, 5: 4, 6: 4, 8: 4}

    def begin(self, starts: Sequence[ir.Value] = ()) -> None:
        super().begin(() if self._bits == 8 else starts)

    def add(self, i: int, weights: Sequence[ir.Value], activations: Sequence[ir.Value]) -> None:
        if self._bits == 8:
            weights = [self._b.xor(w, _all(-128, self._bytes)) for w in weights]
        super().add(i, weights, activations)


class _Avx2(_Signed):
    """vpmaddubsw adds products of two depths in int16. Weights of four bits leave room there for eight such sums, of
    five for four, of six for two; then vpmaddwd adds neighbours into int32. For eight bits the sign goes over to the
    activations, so that two products fit: |w| <= 128."""

    lanes = 8
    STEP: ClassVar[dict[int, int]] = {4: 2, 5: 4, 6: 2, 8: 2}

    def __init__(self, b: ir.IRBuilder, bits: int, count: int) -> None:
        super().__init__(b, bits, count)
        self._shorts = Accumulators(b, count, self._short)

    def begin(self, starts: Sequence[ir.Value] = ()) -> None:
        super().begin(starts)
        if self._bits == 4:
            self._shorts.zero()

    def add(self, i: int, weights: Sequence[ir.Value], activations: Sequence[ir.Value]) -> None:
        """Of four bits at most eight vectors to one total; of the others at most STEP at once."""
        if self._bits == 8:
            super().add(i, weights, activations)
            return
        pairs = [self._pairs(w, x) for w, x in zip(weights, activations, strict=True)]
        assert len(pairs) <= {4: 8, 5: 4, 6: 2}[self._bits], "int16 has no room for more"
        short = functools.reduce(self._b.add, pairs)
        if self._bits == 4:
            self._shorts[i] = self._b.add(self._shorts[i], short)
        else:
            self._totals[i] = self._fold(self._totals[i], short)

    def _dot(self, total: ir.Value, weights: ir.Value, activations: ir.Value) -> ir.Value:
        """Signed by signed."""
        turned = call(self._b, "llvm.x86.avx2.psign.b", self._bytes, activations, weights)
        size = call(self._b, "llvm.abs.v32i8", self._bytes, weights, const(0, I1))
        return self._fold(total, self._pairs(size, turned))

    def _pairs(self, weights: ir.Value, activations: ir.Value) -> ir.Value:
        return call(self._b, "llvm.x86.avx2.pmadd.ub.sw", self._short, weights, activations)

    def _fold(self, total: ir.Value, short: ir.Value) -> ir.Value:
        fours = call(self._b, "llvm.x86.avx2.pmadd.wd", self._whole, short, _all(1, self._short))
        return self._b.add(total, fours)

    def sum(self, i: int) -> ir.Value:
        return self._fold(self._totals[i], self._shorts[i]) if self._bits == 4 else self._totals[i]


class _Dotprod(_Signed):
    """sdot adds four products to an int32."""

    lanes = 4

    def _dot(self, total: ir.Value, weights: ir.Value, activations: ir.Value) -> ir.Value:
        return call(self._b, "llvm.aarch64.neon.sdot.v4i32.v16i8", self._whole, total, weights, activations)


class _Neon(_Signed):
    """smull gives products of eight depths as int16, of which two fit into one; sadalp adds neighbours to an int32."""

    lanes = 4

    def _dot(self, total: ir.Value, weights: ir.Value, activations: ir.Value) -> ir.Value:
        b, halves = self._b, []
        for first in (0, 8):
            order = ir.Constant(ir.VectorType(I32, 8), list(range(first, first + 8)))
            eight = [b.sext(b.shuffle_vector(v, v, order), self._short) for v in (weights, activations)]
            halves.append(b.mul(*eight))
        pairs = call(b, "llvm.aarch64.neon.addp.v8i16", self._short, *halves)
        return b.add(total, call(b, "llvm.aarch64.neon.saddlp.v4i32.v8i16", self._whole, pairs))


_OF_LEVELS: dict[int, type[_Totals]] = {
    isa.PORTABLE: _Totals,
    isa.NEON: _Neon,
    isa.DOTPROD: _Dotprod,
    isa.I8MM: _I8mm,
    isa.AVX2: _Avx2,
    isa.AVXVNNI: _AvxVnni,
    isa.VNNI: _OneInstruction,
}


def totals_of(level: int) -> type[_Totals]:
    """The sums of a level up to VNNI."""
    return _OF_LEVELS[level]


Totals = totals_of(isa.DOT)
LANES = Totals.lanes


def start(b: ir.IRBuilder, bits: int, negated: ir.Value | None, lanes: int = LANES) -> ir.Value:
    """What a total begins with: nothing, or the address of the activations' negated sum times the weights' offset."""
    if negated is None:
        return ir.Constant(ir.VectorType(I32, lanes), None)
    return splat(b, b.shl(load(b, negated, I32), const(bits - 1, I32)), lanes)


def load_weights(b: ir.IRBuilder, address: ir.Value, lanes: int = LANES) -> ir.Value:
    """Four depths of `lanes` outputs."""
    return load(b, address, ir.VectorType(I8, 4 * lanes), 1)


def load_activations(b: ir.IRBuilder, address: ir.Value, lanes: int = LANES) -> ir.Value:
    """Four depths of a row, once for each output."""
    return b.bitcast(splat(b, load(b, address, I32, 1), lanes), ir.VectorType(I8, 4 * lanes))
