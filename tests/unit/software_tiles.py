"""AMX tiles and products of bf16 pairs in software: `python -m pytest -p software_tiles` tests these levels on any
processor of x86 or ARM.

A tile instruction becomes a call of `_instruction`. What a processor would refuse ends the process, as it would there.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
import traceback
from typing import Any

import llvmlite.ir as ir
import numpy as np

_compiled_here = tempfile.TemporaryDirectory(prefix="outpace-software-tiles-")  # holds an address of this process
os.environ["OUTPACE_CACHE"] = _compiled_here.name

from outpace.ops.cpu import isa  # noqa: E402

isa.HAS_BF16 = isa.HAS_AMX = True
isa.best_level = lambda: isa.AMX  # type: ignore[assignment]
isa._OFFERED += [level for level in (isa.BF16, isa.AMX) if level not in isa._OFFERED]

from outpace.ops.cpu import attention_dots, tiles  # noqa: E402 - made for the levels above
from outpace.ops.cpu.emit import I64, fma, high_bf16, low_bf16, splat  # noqa: E402

ROWS, ROW_BYTES = 16, 64
NAMES = ("ldtilecfg", "tilerelease", "tilezero", "tileloadd64", "tilestored64", "tdpbssd", "tdpbf16ps")


class _Tiles:
    """Registers of one thread."""

    def __init__(self, config: int) -> None:
        text = np.frombuffer(ctypes.string_at(config, 64), dtype=np.uint8)
        assert text[0] == 1, "palette"
        self.widths, self.rows = text[16:32].view(np.uint16).astype(int), text[48:56].astype(int)
        assert (self.widths <= ROW_BYTES).all() and (self.rows <= ROWS).all()
        self.data = np.zeros((8, ROWS, ROW_BYTES), dtype=np.uint8)

    def load(self, t: int, address: int, stride: int) -> None:
        self.data[t] = 0
        for r in range(self.rows[t]):
            row = ctypes.string_at(address + r * stride, self.widths[t])
            self.data[t, r, : self.widths[t]] = np.frombuffer(row, dtype=np.uint8)

    def store(self, t: int, address: int, stride: int) -> None:
        for r in range(self.rows[t]):
            ctypes.memmove(address + r * stride, self.data[t, r, : self.widths[t]].tobytes(), int(self.widths[t]))

    def _operands(self, c: int, a: int, b: int, number: Any) -> tuple[Any, Any, tuple[Any, ...]]:
        """[rows, depth, numbers of 4 bytes] and [depth, columns, the same], and where the sums are."""
        rows, columns, depth = self.rows[c], self.widths[c] // 4, self.rows[b]
        assert len({c, a, b}) == 3 and self.rows[a] == rows and self.widths[b] == self.widths[c], (c, a, b)
        assert self.widths[a] == 4 * depth, (c, a, b)
        x = np.ascontiguousarray(self.data[a, :rows, : 4 * depth]).view(number).reshape(rows, depth, -1)
        y = np.ascontiguousarray(self.data[b, :depth, : 4 * columns]).view(number).reshape(depth, columns, -1)
        return x, y, (c, slice(rows), slice(columns))

    def bytes_product(self, c: int, a: int, b: int) -> None:
        x, y, place = self._operands(c, a, b, np.int8)
        self.data.view(np.int32)[place] += np.einsum("mkj,knj->mn", x.astype(np.int32), y.astype(np.int32))

    def bf16_product(self, c: int, a: int, b: int) -> None:
        x, y, place = self._operands(c, a, b, np.uint16)
        x, y = ((v.astype(np.uint32) << 16).view(np.float32) for v in (x, y))
        sums = self.data.view(np.float32)[place]
        with np.errstate(all="ignore"):  # rows of padding hold anything
            for k in range(len(y)):
                for j in range(2):
                    sums += x[:, k, j, None] * y[None, k, :, j]


_STDERR = os.fdopen(os.dup(2), "w")  # before pytest turns it away
_of_threads: dict[int, _Tiles] = {}


def _run(name: str, x: int, y: int, z: int) -> None:
    me = threading.get_ident()
    if name == "ldtilecfg":
        _of_threads[me] = _Tiles(x)
        return
    mine = _of_threads[me]
    if name == "tilerelease":
        del _of_threads[me]
    elif name == "tilezero":
        mine.data[x] = 0
    else:
        of = {
            "tileloadd64": mine.load,
            "tilestored64": mine.store,
            "tdpbssd": mine.bytes_product,
            "tdpbf16ps": mine.bf16_product,
        }
        of[name](x, y, z)


@ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)
def _instruction(number: int, x: int, y: int, z: int) -> None:
    try:
        _run(NAMES[number], x, y, z)
    except BaseException:
        traceback.print_exc(file=_STDERR)
        _STDERR.flush()
        os.abort()


_ADDRESS = ctypes.cast(_instruction, ctypes.c_void_p).value


def _amx_call(b: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    numbers = [b.ptrtoint(a, I64) if isinstance(a.type, ir.PointerType) else b.zext(a, I64) for a in args]
    numbers = [ir.Constant(I64, NAMES.index(name.rpartition(".")[2])), *numbers]
    function = ir.FunctionType(ir.VoidType(), [I64] * 4).as_pointer()
    b.call(b.inttoptr(ir.Constant(I64, _ADDRESS), function), numbers + [ir.Constant(I64, 0)] * (4 - len(numbers)))


def _dot(b: ir.IRBuilder, acc: ir.Value, pairs: ir.Value, pair: ir.Value) -> ir.Value:
    pair = splat(b, pair)
    return fma(b, low_bf16(b, pairs), low_bf16(b, pair), fma(b, high_bf16(b, pairs), high_bf16(b, pair), acc))


tiles.amx_call = _amx_call
attention_dots._dot = _dot
