"""Building LLVM IR: what the intrinsics of `simd.py` and the micro-kernels in the sibling modules are written with.

`emit` turns a function that builds IR into a numba intrinsic. Vectors have sixteen lanes; the operations on them are
plain LLVM IR and run on any CPU (LLVM splits them where registers are narrower). Addresses are int64.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
VF, VI = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


class _Vector(types.Type):
    def __init__(self, name: str, llvm_type: ir.Type) -> None:
        self.llvm_type = llvm_type
        super().__init__(name=name)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: _Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm_type)


def vector_type(name: str, llvm_type: ir.Type) -> Any:
    """The numba type of an LLVM vector; one for each name."""
    return _Vector(name, llvm_type)


f32x16 = vector_type("f32x16", VF)
i32x16 = vector_type("i32x16", VI)


def emit(returns: Any, *params: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: `build(builder, *llvm_values)` becomes an intrinsic of the given numba types."""

    def decorate(build: Callable[..., Any]) -> Any:
        def definition(typingctx: Any, *args: Any) -> Any:
            def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
                out = build(builder, *values)
                return context.get_dummy_value() if returns is types.void else out

            return returns(*params), codegen

        # numba reads the parameters off the signature; `*args` alone would be taken for one tuple
        names = ["typingctx", *list(inspect.signature(build).parameters)[1:]]
        definition.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
        )
        definition.__name__ = build.__name__
        definition.__doc__ = build.__doc__
        made: Any = intrinsic(definition)
        made.build = build  # for a look at what it compiles to
        return made

    return decorate


def call(b: ir.IRBuilder, name: str, returns: ir.Type, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic or an external C function by name."""
    fn = cgutils.get_or_insert_function(b.module, ir.FunctionType(returns, [a.type for a in args]), name)
    return b.call(fn, args)


def const(value: int, ty: ir.Type = I64) -> ir.Constant:
    return ir.Constant(ty, value)


def at(b: ir.IRBuilder, address: ir.Value, offset: int | ir.Value = 0) -> ir.Value:
    """address + offset, folded."""
    if isinstance(offset, int):
        return address if offset == 0 else b.add(address, const(offset))
    return b.add(address, offset)


def load(b: ir.IRBuilder, address: ir.Value, ty: ir.Type, align: int = 4) -> ir.Value:
    out = b.load(b.inttoptr(address, ty.as_pointer()))
    out.align = align
    return out


def store(b: ir.IRBuilder, address: ir.Value, value: ir.Value, align: int = 4) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = align


def splat(b: ir.IRBuilder, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
    ty = ir.VectorType(scalar.type, lanes)
    one = b.insert_element(ir.Constant(ty, ir.Undefined), scalar, const(0, I32))
    return b.shuffle_vector(one, ir.Constant(ty, ir.Undefined), ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z in one rounding, of float32 vectors."""
    return call(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)


def prefetch(b: ir.IRBuilder, address: ir.Value) -> None:
    """Prefetch the cache line at an address."""
    pointer = b.inttoptr(address, I8.as_pointer())
    call(b, "llvm.prefetch.p0", ir.VoidType(), pointer, const(0, I32), const(3, I32), const(1, I32))


def opaque(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The same int64, of which LLVM does not know what it is made of. As the one address that constants are added to,
    it keeps LLVM from counting up dozens of addresses in a loop."""
    return b.asm(ir.FunctionType(I64, (I64,)), "", "=r,0", (value,), False)


@contextmanager
def rolled(b: ir.IRBuilder, count: int) -> Iterator[ir.Value]:
    """A loop that LLVM does not unroll: unrolled, the body is reordered until registers run out. Gives the index."""
    if count == 1:
        yield const(0)
        return
    hidden = opaque(b, const(count))
    before, body, after = b.block, b.append_basic_block("rolled"), b.append_basic_block("rolled.end")
    b.branch(body)
    b.position_at_end(body)
    index = b.phi(I64)
    index.add_incoming(const(0), before)
    yield index
    following = b.add(index, const(1))
    index.add_incoming(following, b.block)
    b.cbranch(b.icmp_signed("<", following, hidden), body, after)
    b.position_at_end(after)


def pinned(b: ir.IRBuilder, values: Sequence[ir.Value]) -> list[ir.Value]:
    """The same vectors (of up to 256 bits, x86), which are all made before anything behind this is begun: what LLVM may
    reorder, it reorders until registers run out."""
    ty, n = ir.LiteralStructType([v.type for v in values]), len(values)
    constraints = ",".join(["=x"] * n + [str(i) for i in range(n)] + ["~{memory}"])
    made = b.asm(ir.FunctionType(ty, [v.type for v in values]), "", constraints, values, True)
    return [b.extract_value(made, i) for i in range(n)]


def page_address(b: ir.IRBuilder, pages: ir.Value, p: ir.Value, base: ir.Value, page_stride: ir.Value) -> ir.Value:
    """Address of the p-th page of a table."""
    page = b.sext(load(b, at(b, pages, b.mul(p, const(4))), I32), I64)
    return at(b, base, b.mul(page, page_stride))


def prefetch_page(b: ir.IRBuilder, pages: Any, p: Any, last: Any, base: Any, page_stride: Any, size: Any) -> None:
    """Prefetch the page after the p-th; pages are too short for the hardware to see a stream."""
    after = b.add(p, const(1))
    following = b.select(b.icmp_signed("<", after, last), after, p)
    address = page_address(b, pages, following, base, page_stride)
    with cgutils.for_range(b, b.sdiv(size, const(64))) as loop:
        prefetch(b, at(b, address, b.mul(loop.index, const(64))))


def splat_int(value: int) -> ir.Constant:
    return ir.Constant(VI, [value] * LANES)


def low_bf16(b: ir.IRBuilder, pairs: ir.Value) -> ir.Value:
    """The even bf16 of sixteen pairs as f32."""
    return b.bitcast(b.shl(pairs, splat_int(16)), VF)


def high_bf16(b: ir.IRBuilder, pairs: ir.Value) -> ir.Value:
    """The odd bf16 of sixteen pairs as f32."""
    return b.bitcast(b.and_(pairs, splat_int(-65536)), VF)


class Accumulators:
    """A block of vector registers that live through IR loops (stack slots that LLVM promotes to registers)."""

    def __init__(self, b: ir.IRBuilder, count: int, ty: ir.Type = VF) -> None:
        self.b, self.ty = b, ty
        self.slots = [cgutils.alloca_once(b, ty) for _ in range(count)]

    def zero(self) -> None:
        for slot in self.slots:
            self.b.store(ir.Constant(self.ty, None), slot)

    def __getitem__(self, i: int) -> ir.Value:
        return self.b.load(self.slots[i])

    def __setitem__(self, i: int, value: ir.Value) -> None:
        self.b.store(value, self.slots[i])
