"""Which instructions the kernels may use: found at import, or named by OUTPACE_ISA to test what other processors run.

A *level* is a set of instructions for products of bytes. A process has PORTABLE, the best one of those up to VNNI that
the processor offers, and BF16 and AMX above that. Integer results are the same at every level, bit for bit; attention
rounds queries and probabilities to bf16 from BF16 on.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Collection
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numba.core import config as _config
from numba.core.codegen import get_host_cpu_features

from ...errors import ParameterError

_numba: Any = _config

PORTABLE, NEON, DOTPROD, I8MM, AVX2, AVXVNNI, VNNI, BF16, AMX = range(9)
NAMES = ("portable", "neon", "dotprod", "i8mm", "avx2", "avxvnni", "vnni", "bf16", "amx")

IS_X86 = "x86_64" in llvm.get_process_triple()
IS_ARM = llvm.get_process_triple().startswith(("aarch64", "arm64"))

_AVX2 = {"avx2", "fma", "f16c"}
_VNNI = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512vnni"}
_NEEDS: dict[int, Collection[str]] = {  # features by LLVM's names
    NEON: (),
    DOTPROD: {"dotprod"},
    I8MM: {"dotprod", "i8mm"},
    AVX2: _AVX2,
    AVXVNNI: _AVX2 | {"avxvnni"},
    VNNI: _VNNI,
    BF16: _VNNI | {"avx512bf16"},
    AMX: _VNNI | {"avx512bf16", "amx-tile", "amx-int8", "amx-bf16"},
}
# What a processor has that is no better than the level: other features are taken away when a level is named
_ABOVE = {
    NEON: ("dotprod", "i8mm", "bf16", "sve", "sme"),
    DOTPROD: ("i8mm", "bf16", "sve", "sme"),
    AVX2: ("avxvnni", "avx512", "avx10", "amx"),
    AVXVNNI: ("avx512", "avx10", "amx"),
}
_APPLE = {"dotprod": "hw.optional.arm.FEAT_DotProd", "i8mm": "hw.optional.arm.FEAT_I8MM"}


def _apple(name: str) -> bool:
    """Whether macOS says that the processor has a feature; LLVM does not ask."""
    value, size = ctypes.c_int(0), ctypes.c_size_t(4)
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return not failed and value.value == 1


def _features() -> set[str]:
    """What numba compiles for, by LLVM's names."""
    text = get_host_cpu_features() if _numba.CPU_FEATURES is None else _numba.CPU_FEATURES
    found = {item[1:] for item in text.split(",") if item.startswith("+")}
    if IS_ARM and platform.system() == "Darwin" and _numba.CPU_FEATURES is None:
        found |= {feature for feature, name in _APPLE.items() if _apple(name)}
    return found


def _offered(features: set[str]) -> list[int]:
    """Levels that run here, in rising order."""
    ours = range(NEON, AVX2) if IS_ARM else range(AVX2, AMX + 1) if IS_X86 else range(0)
    levels = [PORTABLE, *(level for level in ours if features.issuperset(_NEEDS[level]))]
    return [level for level in levels if level != AMX or platform.system() == "Linux"]


def _named(levels: list[int]) -> int | None:
    """The level that OUTPACE_ISA names."""
    name = os.environ.get("OUTPACE_ISA", "")
    if not name:
        return None
    if name not in [NAMES[level] for level in levels]:
        known = "this processor does not offer it" if name in NAMES else "there is no such instruction set"
        raise ParameterError(
            f"OUTPACE_ISA={name}: {known}; here it can be {', '.join(NAMES[level] for level in levels)}, or unset for "
            "the best of them"
        )
    return NAMES.index(name)


def _compile_for(level: int, features: set[str]) -> None:
    """Have numba leave out the instructions of better levels. It must not have compiled anything yet."""
    above = _ABOVE.get(level)
    if above is None:
        return
    text = get_host_cpu_features() if _numba.CPU_FEATURES is None else _numba.CPU_FEATURES
    kept = [item for item in text.split(",") if item and not item[1:].startswith(above)]
    named = {item[1:] for item in text.split(",") if item} | features
    _numba.CPU_FEATURES = ",".join([*kept, *sorted(f"-{name}" for name in named if name.startswith(above))])


_FEATURES = _features()
_OFFERED = _offered(_FEATURES)
#: the level that OUTPACE_ISA names, if it is not the best one
NAMED = None if (_name := _named(_OFFERED)) == _OFFERED[-1] else _name
if NAMED is not None:
    _compile_for(NAMED, _FEATURES)
_TOP = _OFFERED[-1] if NAMED is None else NAMED

#: the level of integer dot products
DOT = max(level for level in _OFFERED if level <= min(_TOP, VNNI))
HAS_VNNI = DOT == VNNI
HAS_BF16, HAS_AMX = (level in _OFFERED and level <= _TOP for level in (BF16, AMX))

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@cache
def best_level() -> int:
    """The best level that this CPU and kernel allow. Linux hands out AMX tile registers only on request."""
    if HAS_AMX and ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0:
        return AMX
    return BF16 if HAS_BF16 else DOT


def levels() -> list[int]:
    """Those that this process can run, in rising order."""
    return sorted({PORTABLE, DOT, *(level for level in (BF16, AMX) if level <= best_level())})


def tile_config(page_tiles: bool = False) -> np.ndarray:
    """u8[64] for LDTILECFG: eight tiles of 16 rows x 64 bytes.

    `page_tiles`: tile 5 is 16 x 32 bytes and tile 7 is 8 x 64, for products over one page of sixteen places.
    """
    config = np.zeros(64, dtype=np.uint8)
    config[0] = 1  # palette
    config[16:32:2] = 64  # bytes per row
    config[48:56] = 16  # rows
    if page_tiles:
        config[16 + 2 * 5], config[48 + 7] = 32, 8
    return config
