"""Vectors of sixteen lanes, raw memory and atomics as numba intrinsics.

The vector operations are plain LLVM IR and run on any CPU (LLVM splits them where registers are narrower). Addresses
are int64. `emit` turns a function that builds IR into an intrinsic; micro-kernels in the sibling modules use it too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
VF, VI = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)

HOST_FEATURES = {name for name, on in llvm.get_host_cpu_features().items() if on}
IS_X86 = "x86_64" in llvm.get_default_triple()


class _Vector(types.Type):
    def __init__(self, name: str, llvm_type: ir.Type) -> None:
        self.llvm_type = llvm_type
        super().__init__(name=name)


f32x16 = _Vector("f32x16", VF)
i32x16 = _Vector("i32x16", VI)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: _Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm_type)


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
        return intrinsic(definition)

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


def splat(b: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    ty = ir.VectorType(scalar.type, LANES)
    one = b.insert_element(ir.Constant(ty, ir.Undefined), scalar, const(0, I32))
    return b.shuffle_vector(one, ir.Constant(ty, ir.Undefined), ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return call(b, "llvm.fma.v16f32", VF, x, y, z)


def prefetch(b: ir.IRBuilder, address: ir.Value) -> None:
    """Ask for the cache line at an address."""
    pointer = b.inttoptr(address, I8.as_pointer())
    call(b, "llvm.prefetch.p0", ir.VoidType(), pointer, const(0, I32), const(3, I32), const(1, I32))


def page_address(b: ir.IRBuilder, pages: ir.Value, p: ir.Value, base: ir.Value, page_stride: ir.Value) -> ir.Value:
    """Address of the p-th page of a table."""
    page = b.sext(load(b, at(b, pages, b.mul(p, const(4))), I32), I64)
    return at(b, base, b.mul(page, page_stride))


def prefetch_page(b: ir.IRBuilder, pages: Any, p: Any, last: Any, base: Any, page_stride: Any, size: Any) -> None:
    """Ask for the page after the p-th; pages are too short for the hardware to see a stream."""
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


# memory


@emit(f32x16, types.int64)
def vload(b, address):
    return load(b, address, VF)


@emit(types.void, types.int64, f32x16)
def vstore(b, address, value):
    store(b, address, value)


@emit(i32x16, types.int64)
def iload(b, address):
    return load(b, address, VI)


@emit(types.void, types.int64, i32x16)
def istore(b, address, value):
    store(b, address, value)


@emit(types.float32, types.int64)
def load_f32(b, address):
    return load(b, address, F32)


@emit(types.void, types.int64, types.float32)
def store_f32(b, address, value):
    store(b, address, value)


@emit(types.int64, types.int64)
def load_i64(b, address):
    return load(b, address, I64, 8)


@emit(types.int64, types.int64)
def load_i32(b, address):
    return b.sext(load(b, address, I32), I64)


@emit(types.int64, types.int64)
def load_u16(b, address):
    return b.zext(load(b, address, I16, 2), I64)


@emit(types.void, types.int64, types.int64)
def store_i32(b, address, value):
    store(b, address, b.trunc(value, I32))


@emit(types.void, types.int64, types.int64)
def store_i64(b, address, value):
    store(b, address, value, 8)


@emit(types.void, types.int64, types.int64)
def store_u16(b, address, value):
    store(b, address, b.trunc(value, I16), 2)


@emit(types.void, types.int64, f32x16)
def store_i8(b, address, value):
    """Round sixteen floats (half to even) and store them as int8; they must be within [-127, 127]."""
    rounded = call(b, "llvm.rint.v16f32", VF, value)
    store(b, address, b.trunc(b.fptosi(rounded, VI), ir.VectorType(I8, LANES)), 1)


def _bf16_bits(b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Upper halves of f32 bits, rounded half to even. Finite values only."""
    lsb = b.and_(b.lshr(bits, splat_int(16)), splat_int(1))
    return b.lshr(b.add(bits, b.add(lsb, splat_int(0x7FFF))), splat_int(16))


@emit(types.void, types.int64, f32x16)
def store_bf16(b, address, value):
    store(b, address, b.trunc(_bf16_bits(b, b.bitcast(value, VI)), ir.VectorType(I16, LANES)), 2)


@emit(f32x16, types.int64)
def load_bf16(b, address):
    wide = b.zext(load(b, address, ir.VectorType(I16, LANES), 2), VI)
    return b.bitcast(b.shl(wide, splat_int(16)), VF)


@emit(f32x16, types.int64)
def load_bf16_even(b, address):
    return low_bf16(b, load(b, address, VI))


@emit(f32x16, types.int64)
def load_bf16_odd(b, address):
    return high_bf16(b, load(b, address, VI))


# arithmetic


@emit(i32x16, types.int64)
def isplat(b, scalar):
    return splat(b, b.trunc(scalar, I32))


@emit(i32x16, i32x16, i32x16)
def isub(b, x, y):
    return b.sub(x, y)


@emit(f32x16, types.float32)
def vsplat(b, scalar):
    return splat(b, scalar)


@emit(f32x16, f32x16, f32x16)
def vadd(b, x, y):
    return b.fadd(x, y)


@emit(f32x16, f32x16, f32x16)
def vsub(b, x, y):
    return b.fsub(x, y)


@emit(f32x16, f32x16, f32x16)
def vmul(b, x, y):
    return b.fmul(x, y)


@emit(f32x16, f32x16, f32x16)
def vdiv(b, x, y):
    return b.fdiv(x, y)


@emit(f32x16, f32x16, f32x16, f32x16)
def vfma(b, x, y, z):
    return fma(b, x, y, z)


@emit(f32x16, f32x16, f32x16)
def vmax(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@emit(f32x16, f32x16)
def vabs(b, x):
    return call(b, "llvm.fabs.v16f32", VF, x)


@emit(f32x16, f32x16)
def vrint(b, x):
    return call(b, "llvm.rint.v16f32", VF, x)


@emit(f32x16, i32x16)
def to_float(b, x):
    return b.sitofp(x, VF)


@emit(f32x16, f32x16)
def exp2_int(b, x):
    """2**x of whole numbers within the normal exponents."""
    return b.bitcast(b.shl(b.add(b.fptosi(x, VI), splat_int(127)), splat_int(23)), VF)


@emit(f32x16, f32x16, f32x16, f32x16)
def zero_below(b, x, limit, value):
    """value where x >= limit, else 0."""
    return b.select(b.fcmp_ordered(">=", x, limit), value, ir.Constant(VF, None))


def _reduce(b: ir.IRBuilder, v: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """Fold sixteen lanes in one fixed order: halves, quarters, pairs."""
    for width in (8, 4, 2, 1):
        order = [i ^ width for i in range(LANES)]
        v = combine(v, b.shuffle_vector(v, v, ir.Constant(ir.VectorType(I32, LANES), order)))
    return b.extract_element(v, const(0, I32))


@emit(types.float32, f32x16)
def hsum(b, v):
    return _reduce(b, v, b.fadd)


@emit(types.float32, f32x16)
def hmax(b, v):
    return _reduce(b, v, lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y))


@emit(f32x16, f32x16)
def rotate16(b, v):
    """Sixteen-point Walsh-Hadamard transform of the lanes, not normalised: four rounds of sums and differences."""
    for width in (1, 2, 4, 8):
        order = ir.Constant(ir.VectorType(I32, LANES), [i ^ width for i in range(LANES)])
        signs = ir.Constant(VF, [-1.0 if i & width else 1.0 for i in range(LANES)])
        v = fma(b, v, signs, b.shuffle_vector(v, v, order))
    return v


@njit(inline="always")
def vexp(x):
    """e**x, relative error about 1e-7; 0 below -87."""
    low = vsplat(np.float32(-87.0))
    c = vmax(x, low)
    n = vrint(vmul(c, vsplat(np.float32(1.4426950408889634))))
    r = vfma(n, vsplat(np.float32(-0.693359375)), c)
    r = vfma(n, vsplat(np.float32(2.12194440e-4)), r)
    p = vsplat(np.float32(1.0 / 5040))
    p = vfma(p, r, vsplat(np.float32(1.0 / 720)))
    p = vfma(p, r, vsplat(np.float32(1.0 / 120)))
    p = vfma(p, r, vsplat(np.float32(1.0 / 24)))
    p = vfma(p, r, vsplat(np.float32(1.0 / 6)))
    p = vfma(p, r, vsplat(np.float32(0.5)))
    p = vfma(p, r, vsplat(np.float32(1.0)))
    p = vfma(p, r, vsplat(np.float32(1.0)))
    return zero_below(x, low, vmul(p, exp2_int(n)))


# threads


@emit(types.int64, types.int64, types.int64)
def atomic_add(b, address, value):
    """Add to a shared counter; returns what it held before."""
    return b.atomic_rmw("add", b.inttoptr(address, I64.as_pointer()), value, "seq_cst")


@emit(types.int64, types.int64)
def atomic_load(b, address):
    return b.load_atomic(b.inttoptr(address, I64.as_pointer()), "seq_cst", 8)


@emit(types.void, types.int64, types.int64)
def atomic_store(b, address, value):
    b.store_atomic(value, b.inttoptr(address, I64.as_pointer()), "seq_cst", 8)


@emit(types.void)
def pause(b):
    """Tell the core that this is a waiting loop."""
    if IS_X86:
        call(b, "llvm.x86.sse2.pause", ir.VoidType())


@emit(types.void)
def yield_core(b):
    """Let another thread have the core (matters when there are fewer free cores than threads)."""
    call(b, "sched_yield", I32)
