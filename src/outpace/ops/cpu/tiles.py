"""AMX tile registers: eight of 1 KiB, set up per thread before the first product and released at the end."""

from __future__ import annotations

import llvmlite.ir as ir
from numba import types

from .emit import I8, call, const, emit
from .isa import HAS_AMX


def amx_call(b: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    call(b, name, ir.VoidType(), *args)


def tile_number(n: int) -> ir.Constant:
    return const(n, I8)


def unavailable(b: ir.IRBuilder) -> None:
    """In place of code that this CPU cannot run; the level check keeps it from being reached."""
    call(b, "llvm.trap", ir.VoidType())


@emit(types.void, types.int64)
def load_tile_config(b, address):
    if HAS_AMX:
        amx_call(b, "llvm.x86.ldtilecfg", b.inttoptr(address, I8.as_pointer()))
    else:
        unavailable(b)


@emit(types.void)
def release_tiles(b):
    if HAS_AMX:
        amx_call(b, "llvm.x86.tilerelease")
    else:
        unavailable(b)
