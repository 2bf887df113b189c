"""Sums of unsigned weights x signed activations by the integer instructions that a processor has.

A *total* is i32[LANES outputs]: the sum over a group of depths of weights of a few bits x int8 activations in
[-127, 127], four depths at a time. It is exact, so the same on every processor.
"""

from __future__ import annotations

import llvmlite.ir as ir

from . import isa
from .emit import I1, I8, I16, I32, call, const, load, splat


def _all(value: int, ty: ir.VectorType) -> ir.Constant:
    return ir.Constant(ty, [value] * ty.count)


def _vectors(lanes: int) -> tuple[ir.VectorType, ir.VectorType, ir.VectorType]:
    """Of a register with `lanes` outputs: as int32, int16, bytes."""
    return ir.VectorType(I32, lanes), ir.VectorType(I16, 2 * lanes), ir.VectorType(I8, 4 * lanes)


class Plain:
    """A sum in the making, by shifts and multiplications of int32 on any processor. Other classes are the same sum with
    other instructions.

    `bits`: of the weights; 4, 5, 6 or 8. `negated`: the address of the activations' negated sum, int32: the weights
    then count less by half their range. Without it weights of eight bits count less by 128 - `excess`, and the sum goes
    on from `begin`.
    """

    lanes = 16  # outputs of a register
    excess = 128

    def __init__(
        self, b: ir.IRBuilder, bits: int, negated: ir.Value | None = None, begin: ir.Value | None = None
    ) -> None:
        self._b, self._bits = b, bits
        self._total = ir.Constant(_vectors(self.lanes)[0], None) if begin is None else begin
        if negated is not None and (bits < 8 or self.excess):
            self._total = splat(b, b.shl(load(b, negated, I32), const(bits - 1, I32)), self.lanes)

    def add(self, weights: ir.Value, activations: ir.Value) -> None:
        """Four depths, as load_weights and load_activations give them."""
        b, whole = self._b, _vectors(self.lanes)[0]
        w, x = b.bitcast(weights, whole), b.bitcast(activations, whole)
        for j in range(4):
            wj = b.and_(b.lshr(w, _all(8 * j, whole)), _all(255, whole))
            xj = b.ashr(b.shl(x, _all(24 - 8 * j, whole)), _all(24, whole))
            self._total = b.add(self._total, b.mul(wj, xj))

    def sum(self) -> ir.Value:
        return self._total


class _OneInstruction(Plain):
    """An instruction that multiplies unsigned by signed bytes and adds four products to an int32."""

    name: str
    operands = 2  # which of the vectors of a register the instruction takes for its bytes

    def add(self, weights: ir.Value, activations: ir.Value) -> None:
        kinds = _vectors(self.lanes)
        parts = (self._b.bitcast(v, kinds[self.operands]) for v in (weights, activations))
        self._total = call(self._b, self.name, kinds[0], self._total, *parts)


class _Vnni(_OneInstruction):
    name, operands = "llvm.x86.avx512.vpdpbusd.512", 0


class _AvxVnni(_OneInstruction):
    name, operands, lanes = "llvm.x86.avx512.vpdpbusd.256", 0, 8


class _I8mm(_OneInstruction):
    name, lanes = "llvm.aarch64.neon.usdot.v4i32.v16i8", 4


class _Signed(Plain):
    """Processors that multiply signed bytes alone. Weights of up to six bits are both; eight bits are made signed by
    their uppermost bit flipped, which takes the 128 away without the activations' sum."""

    excess = 0

    def add(self, weights: ir.Value, activations: ir.Value) -> None:
        if self._bits == 8:
            weights = self._b.xor(weights, _all(-128, _vectors(self.lanes)[2]))
        self._add(weights, activations)

    def _add(self, weights: ir.Value, activations: ir.Value) -> None:
        raise NotImplementedError


class _Avx2(_Signed):
    """vpmaddubsw adds products of two depths in int16. Weights of four bits leave room there for eight such sums, of
    five for four, of six for two; then vpmaddwd adds neighbours into int32. For eight bits the sign goes over to the
    activations, so that two products fit: |w| <= 128."""

    lanes = 8
    _short: ir.Value | None = None  # sums in int16, of so many vectors
    _held = 0

    def _add(self, weights: ir.Value, activations: ir.Value) -> None:
        b, (_, shorts, bytes_) = self._b, _vectors(self.lanes)
        if self._bits == 8:
            activations = call(b, "llvm.x86.avx2.psign.b", bytes_, activations, weights)
            weights = call(b, "llvm.abs.v32i8", bytes_, weights, const(0, I1))
        pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", shorts, weights, activations)
        self._short = pairs if self._short is None else b.add(self._short, pairs)
        self._held += 1
        if self._held == {4: 8, 5: 4, 6: 2, 8: 1}[self._bits]:
            self._fold()

    def _fold(self) -> None:
        whole, shorts, _ = _vectors(self.lanes)
        if self._short is not None:
            fours = call(self._b, "llvm.x86.avx2.pmadd.wd", whole, self._short, _all(1, shorts))
            self._total = self._b.add(self._total, fours)
            self._short, self._held = None, 0

    def sum(self) -> ir.Value:
        self._fold()
        return self._total


class _Dotprod(_Signed):
    """sdot adds four products to an int32."""

    lanes = 4

    def _add(self, weights: ir.Value, activations: ir.Value) -> None:
        name, whole = "llvm.aarch64.neon.sdot.v4i32.v16i8", _vectors(4)[0]
        self._total = call(self._b, name, whole, self._total, weights, activations)


class _Neon(_Signed):
    """smull gives products of eight depths as int16, of which two fit into one; sadalp adds neighbours to an int32."""

    lanes = 4

    def _add(self, weights: ir.Value, activations: ir.Value) -> None:
        b, (whole, shorts, _) = self._b, _vectors(4)
        halves = []
        for first in (0, 8):
            order = ir.Constant(ir.VectorType(I32, 8), list(range(first, first + 8)))
            eight = [b.sext(b.shuffle_vector(v, v, order), shorts) for v in (weights, activations)]
            halves.append(b.mul(*eight))
        pairs = call(b, "llvm.aarch64.neon.addp.v8i16", shorts, *halves)
        self._total = b.add(self._total, call(b, "llvm.aarch64.neon.saddlp.v4i32.v8i16", whole, pairs))


_OF_LEVELS: dict[int, type[Plain]] = {
    isa.PORTABLE: Plain,
    isa.NEON: _Neon,
    isa.DOTPROD: _Dotprod,
    isa.I8MM: _I8mm,
    isa.AVX2: _Avx2,
    isa.AVXVNNI: _AvxVnni,
    isa.VNNI: _Vnni,
}


def total_of(level: int) -> type[Plain]:
    """The sums of a level up to VNNI."""
    return _OF_LEVELS[level]


Total = total_of(isa.DOT)
LANES = Total.lanes


def load_weights(b: ir.IRBuilder, address: ir.Value, lanes: int = LANES) -> ir.Value:
    """Four depths of `lanes` outputs."""
    return load(b, address, _vectors(lanes)[2], 1)


def load_activations(b: ir.IRBuilder, address: ir.Value, lanes: int = LANES) -> ir.Value:
    """Four depths of a row, once for each output."""
    return b.bitcast(splat(b, load(b, address, I32, 1), lanes), _vectors(lanes)[2])
