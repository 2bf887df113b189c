"""Which instructions the matrix kernels may use, and what AMX needs before its first tile."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

import llvmlite.binding as llvm
import numpy as np

HOST_FEATURES = {name for name, on in llvm.get_host_cpu_features().items() if on}
IS_X86 = "x86_64" in llvm.get_default_triple()

# Levels of integer and bf16 matrix products, each with what those below it have. Integer results are the same at every
# level, bit for bit; attention rounds queries and probabilities to bf16 from BF16 on.
PORTABLE, VNNI, BF16, AMX = 0, 1, 2, 3

HAS_VNNI = IS_X86 and "avx512vnni" in HOST_FEATURES
HAS_BF16 = HAS_VNNI and "avx512bf16" in HOST_FEATURES
HAS_AMX = HAS_BF16 and {"amx-tile", "amx-int8", "amx-bf16"} <= HOST_FEATURES and platform.system() == "Linux"

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@cache
def best_level() -> int:
    """The best level that this CPU and kernel allow. Linux hands out AMX tile registers only on request."""
    if HAS_AMX and ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0:
        return AMX
    if HAS_BF16:
        return BF16
    return VNNI if HAS_VNNI else PORTABLE


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
