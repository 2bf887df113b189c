"""Kernels compiled for other processors, to look at their instructions and to call them in an emulator.

    python cross.py LEVEL FOLDER NAME...

writes some of `kernels()` as FOLDER/NAME.s and FOLDER/NAME.o, with their symbols in FOLDER/NAME.symbol. It is a process
of its own because numba and the kernels are made for one processor at import.
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Target(NamedTuple):
    triple: str
    cpu: str  # by LLVM's name
    features: str  # what is found there
    emulated: str = "max"  # by the emulator's name


_ARM, _X86 = "aarch64-unknown-linux-gnu", "x86_64-unknown-linux-gnu"
_VNNI = "+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni"
TARGETS = {
    "neon": Target(_ARM, "cortex-a72", "+neon", "cortex-a72"),
    "dotprod": Target(_ARM, "cortex-a76", "+neon,+dotprod"),
    "i8mm": Target(_ARM, "generic", "+neon,+dotprod,+i8mm"),
    "avx2": Target(_X86, "haswell", "+avx2,+fma,+f16c"),
    "avxvnni": Target(_X86, "alderlake", "+avx2,+fma,+f16c,+avxvnni"),
    "vnni": Target(_X86, "icelake-server", _VNNI),
    "bf16": Target(_X86, "cooperlake", _VNNI + ",+avx512bf16"),
    "amx": Target(_X86, "sapphirerapids", _VNNI + ",+avx512bf16,+amx-tile,+amx-int8,+amx-bf16"),
}
SUMS = [(bits, vectors, negated) for bits in (4, 5, 6, 8) for vectors in (3, 8) for negated in (0, 1)]


@cache
def kernels() -> dict[str, Callable[..., Any]]:
    """What is compiled, functions of int64 numbers: the products of every format and what packs activations for them,
    attention, and test_isa's sums of products."""
    from numba import njit
    from test_isa import kernel_of

    from outpace.ops.cpu import attention, attention_dots, attention_int4, blocks, isa, product, rows

    def sums(bits: int, vectors: int, negated: int) -> Any:
        made = kernel_of(isa.DOT, bits, vectors, bool(negated))

        @njit
        def totals(w, x, minus, out):
            made(w, x, minus, out)

        return totals

    return {
        **{name: njit(kernel) for name, kernel in blocks.KERNELS.items()},
        **{f"sums_{bits}_{v}_{negated}": sums(bits, v, negated) for bits, v, negated in SUMS},
        "whole_kinds": njit(product.whole_kinds),
        "pack_blocks": blocks.pack_blocks,
        "pack_row": rows.pack_row,
        "attend": attention.attend,
        "dot_keys": attention_int4._dot_keys,
        "add_values": attention_int4._add_values,
        "scores_by_dots": attention_dots.scores_by_dots,
    }


def main(level: str, folder: Path, names: Sequence[str]) -> None:
    import llvmlite.binding as llvm

    target = TARGETS[level]
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    made_for = llvm.Target.from_triple(target.triple)
    llvm.get_process_triple = lambda: target.triple  # numba compiles for it, and nobody calls what comes out
    llvm.Target.from_default_triple = lambda: made_for
    from numba import int64

    from outpace.ops.cpu import isa

    assert isa.NAMES[min(isa.DOT, isa.VNNI)] == level or level in ("bf16", "amx")
    for name in names:
        kernel = kernels()[name]
        kernel.compile((int64,) * kernel.py_func.__code__.co_argcount)
        (result,) = kernel.overloads.values()
        module, machine = result.library._final_module, result.library._codegen._tm
        (folder / f"{name}.s").write_text(machine.emit_assembly(module), "utf-8")
        (folder / f"{name}.o").write_bytes(machine.emit_object(module))
        (folder / f"{name}.symbol").write_text(result.fndesc.mangled_name, "utf-8")


@cache
def compiled_for(level: str, *names: str) -> Path:
    """The folder that `main` has filled in a process of its own; without names, with all kernels."""
    folder = Path(tempfile.mkdtemp(prefix=f"outpace-{level}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    paths = os.pathsep.join(p for p in sys.path if p)
    numba = {"NUMBA_CPU_NAME": TARGETS[level].cpu, "NUMBA_CPU_FEATURES": TARGETS[level].features}
    env = os.environ | numba | {"PYTHONPATH": paths}
    env.pop("OUTPACE_ISA", None)
    command = [sys.executable, __file__, level, str(folder), *(names or kernels())]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def instructions(folder: Path, name: str) -> set[str]:
    """What a kernel and the functions that it calls use: names of instructions and registers, without numbers."""
    text = (folder / f"{name}.s").read_text("utf-8")
    lines = re.findall(r"^\t(?![.#])([^#\n]*)", text, re.MULTILINE)
    return {re.sub(r"\d+$", "", word) for line in lines for word in re.findall(r"[a-z]\w*", line)}


_EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
_COMPILER = shutil.which("aarch64-linux-gnu-gcc")
#: why nothing can be called here, or None
LACKING = (
    "platform: emulators of processors need Linux"
    if sys.platform != "linux"
    else None
    if _EMULATOR and _COMPILER
    else "no emulator of ARM on this system: apt-get install qemu-user gcc-aarch64-linux-gnu"
)

_BASE, _SIZE, _SPACE, _MOST = 1 << 32, 1 << 23, 256, 24
_SHARED, _FIXED_WHERE_NOTHING_IS = 1, 0x100000

# Maps the file "memory", then calls a kernel for each line of the input: its number, and what it is given. Kernels
# return a status by numba's convention, and have two parameters before theirs.
_DRIVER = """
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
typedef long long n;
DECLARATIONS
typedef int (*kernel)(void *, void *, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n);
static kernel kernels[] = { TABLE };
int main(void) {
    void *where = (void *)BASE;
    if (mmap(where, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, open("memory", O_RDWR), 0) != where) return 2;
    n i, a[24];
    while (scanf("%lld", &i) == 1) {
        for (int k = 0; k < 24; k++) if (scanf("%lld", a + k) != 1) return 3;
        void *result[4] = {0}, *error[4] = {0};
        if (kernels[i](result, error, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12],
                       a[13], a[14], a[15], a[16], a[17], a[18], a[19], a[20], a[21], a[22], a[23])) return 4;
    }
    return 0;
}
"""


class Emulated:
    """A processor of ARM, and memory that is at the same addresses here and there."""

    def __init__(self, level: str) -> None:
        self.folder, self._cpu = compiled_for(level), TARGETS[level].emulated
        self._names = list(kernels())
        symbols = {name: (self.folder / f"{name}.symbol").read_text("utf-8") for name in self._names}
        declared = "\n".join(f'int {name}() __asm__("{symbol}");' for name, symbol in symbols.items())
        base = _BASE + 2 * _SIZE * list(TARGETS).index(level)  # each level's own: tests of several levels take turns
        source = _DRIVER.replace("DECLARATIONS", declared).replace("BASE", f"{base}ull").replace("SIZE", str(_SIZE))
        table = ", ".join(f"(kernel){name}" for name in self._names)
        (self.folder / "driver.c").write_text(source.replace("TABLE", table), "utf-8")
        # what handles errors asks for Python, and is not reached
        options = ["-static", "-O1", "-Wl,--unresolved-symbols=ignore-all"]
        objects = [f"{name}.o" for name in self._names]
        subprocess.run([_COMPILER, *options, "-o", "run", "driver.c", *objects, "-lm"], cwd=self.folder, check=True)
        self._memory = _memory(self.folder / "memory", base)
        self.clear()

    def clear(self) -> None:
        """Forget all arrays."""
        self._memory[:] = 0x5A
        self._used, self._ours = 0, np.zeros(_SIZE, dtype=bool)

    def array(self, values: Any, dtype: Any = None) -> np.ndarray:
        """A copy in that memory."""
        made = np.array(values, dtype)
        at = -(-(self._used + _SPACE) // 64) * 64
        self._used = at + made.nbytes
        assert self._used + _SPACE < _SIZE
        self._ours[at : self._used] = True
        out = self._memory[at : self._used].view(made.dtype).reshape(made.shape)
        out[...] = made
        return out

    def call(self, *calls: Sequence[Any]) -> None:
        """Kernels, (name, number or array...) each. Nothing may change beside the arrays."""
        lines = []
        for name, *given in calls:
            numbers = [self._names.index(name), *map(number, given)]
            lines.append(" ".join(map(str, numbers + [0] * (_MOST + 1 - len(numbers)))))
        assert _EMULATOR is not None
        command = [_EMULATOR, "-cpu", self._cpu, "run"]
        subprocess.run(command, input="\n".join(lines), text=True, cwd=self.folder, check=True)
        assert (self._memory[~self._ours] == 0x5A).all(), f"{[name for name, *_ in calls]}: wrote beside the arrays"

    def same(self, result: np.ndarray, *calls: Sequence[Any]) -> None:
        """Calls leave the same bytes in `result` there and in this process."""
        before = self._memory.copy()
        for name, *given in calls:
            kernels()[name](*map(number, given))
        wanted = result.copy()
        self._memory[:] = before
        self.call(*calls)
        assert result.tobytes() == wanted.tobytes(), f"other results at {np.argwhere(result != wanted)[:5].tolist()}"


def number(given: Any) -> int:
    """An address, or the number itself."""
    return int(given.ctypes.data if isinstance(given, np.ndarray) else given)


def _memory(path: Path, base: int) -> np.ndarray:
    path.write_bytes(bytes(_SIZE))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [*[ctypes.c_size_t] * 5, ctypes.c_size_t]
    with path.open("r+b") as file:
        flags = _SHARED | _FIXED_WHERE_NOTHING_IS
        where = libc.mmap(base, _SIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, file.fileno(), 0)
    assert where == base, os.strerror(ctypes.get_errno())
    return np.frombuffer((ctypes.c_uint8 * _SIZE).from_address(base), dtype=np.uint8)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
