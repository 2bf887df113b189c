"""Vectors of sixteen lanes, raw memory and atomics as numba intrinsics, for code that numba compiles."""

from __future__ import annotations

import sys
from collections.abc import Callable

import llvmlite.ir as ir
import numpy as np
from numba import njit, types

from .emit import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    VF,
    VI,
    call,
    const,
    emit,
    f32x16,
    fma,
    high_bf16,
    i32x16,
    load,
    low_bf16,
    splat,
    splat_int,
    store,
)
from .isa import IS_ARM, IS_X86

# compilation


@emit(types.void)
def kept_apart(b):
    """The function that calls this is not inlined into others: what is large is compiled once, not at each call."""
    b.function.attributes.add("noinline")


@emit(types.void, *[types.int64] * 3)
def call_at(b, address, first, second):
    """Call the compiled function at an address (compiled.address_of) with two arguments."""
    function = ir.FunctionType(ir.VoidType(), [I64] * 2)
    b.call(b.inttoptr(address, function.as_pointer()), [first, second])


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


@emit(types.float64, types.int64)
def load_f64(b, address):
    return load(b, address, ir.DoubleType(), 8)


@emit(types.void, types.int64, types.float64)
def store_f64(b, address, value):
    store(b, address, value, 8)


@emit(types.int64, types.int64)
def load_i64(b, address):
    return load(b, address, I64, 8)


@emit(types.int64, types.int64)
def load_i32(b, address):
    return b.sext(load(b, address, I32), I64)


@emit(types.int64, types.int64)
def load_u8(b, address):
    return b.zext(load(b, address, I8, 1), I64)


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


@emit(types.float32, types.int64)
def load_one_bf16(b, address):
    return b.bitcast(b.shl(b.zext(load(b, address, I16, 2), I32), const(16, I32)), F32)


@emit(types.float32, types.int64)
def load_one_f16(b, address):
    return b.fpext(load(b, address, F16, 2), F32)


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
    elif IS_ARM:
        call(b, "llvm.aarch64.hint", ir.VoidType(), const(1, I32))


@emit(types.void)
def yield_core(b):
    """Let another thread have the core (matters when there are fewer free cores than threads)."""
    call(b, "SwitchToThread" if sys.platform == "win32" else "sched_yield", I32)
