"""Levels of instructions: which there are, what OUTPACE_ISA does, and that their sums of products are exact."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from numba import njit, types

from outpace.errors import ParameterError
from outpace.ops.cpu import dots, isa
from outpace.ops.cpu.emit import at, emit, store

X86_FEATURES = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16"}


def kernel_of(level: int, bits: int, vectors: int, negated: bool):
    """(weights u8[vectors][16][4], activations int8[4 * vectors], their negated sum, out i32[16])"""
    made = dots.totals_of(level)
    count, step = 16 // made.lanes, made.STEP[bits]

    @emit(types.void, *[types.int64] * 4)
    def kernel(b, w, x, minus, out):
        totals = made(b, bits, count)
        totals.begin([dots.start(b, bits, minus, made.lanes)] * count if negated else [])
        for v in range(0, vectors, step):
            some = range(v, min(v + step, vectors))
            activations = [dots.load_activations(b, at(b, x, 4 * v), made.lanes) for v in some]
            for n in range(count):
                at_once = [dots.load_weights(b, at(b, w, 64 * v + 4 * made.lanes * n), made.lanes) for v in some]
                totals.add(n, at_once, activations)
        for n in range(count):
            store(b, at(b, out, 4 * made.lanes * n), totals.sum(n))

    return kernel


def operands(bits: int, vectors: int, seed: int):
    """Random ones, and where the seed is even only the largest and the smallest."""
    rng = np.random.default_rng(seed)
    w = rng.integers(0, 1 << bits, (vectors, 16, 4), dtype=np.uint8)
    x = rng.integers(-127, 128, (vectors, 4)).astype(np.int8)
    if seed % 2 == 0:
        w, x = (
            np.where(w < 1 << bits - 1, 0, (1 << bits) - 1).astype(np.uint8),
            np.where(x < 0, -127, 127).astype(np.int8),
        )
        if seed % 4 == 0:
            w, x = np.full_like(w, w.max() if seed % 8 else 0), np.full_like(x, 127 if seed % 3 else -127)
    return w, x


def expected(level: int, bits: int, negated: bool, w, x):
    offset = (1 << bits - 1) if negated else 128 - dots.totals_of(level).excess if bits == 8 else 0
    return np.einsum("voj,vj->o", w.astype(np.int64) - offset, x.astype(np.int64)).astype(np.int32)


@pytest.mark.parametrize("negated", [False, True])
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("level", [n for n in isa.levels() if n <= isa.VNNI], ids=lambda n: isa.NAMES[n])
def test_totals_are_exact(level, bits, negated):
    for vectors in (3, 8):
        kernel = kernel_of(level, bits, vectors, negated)

        @njit
        def run(w, x, minus, out, kernel=kernel):
            kernel(w, x, minus, out)

        for seed in range(24):
            w, x = operands(bits, vectors, seed)
            minus, out = np.array([-x.sum(dtype=np.int32)]), np.full(17, 99, np.int32)
            run(w.ctypes.data, x.ctypes.data, minus.ctypes.data, out.ctypes.data)
            assert (out[:16] == expected(level, bits, negated, w, x)).all() and out[16] == 99


@pytest.mark.skipif(not isa.IS_X86, reason="platform: levels of x86")
def test_levels_follow_from_features():
    assert isa._offered(set()) == [isa.PORTABLE]
    assert isa._offered({"avx2", "fma", "f16c"}) == [isa.PORTABLE, isa.AVX2]
    assert isa._offered({"avx2", "fma", "f16c", "avxvnni"}) == [isa.PORTABLE, isa.AVX2, isa.AVXVNNI]
    assert isa._offered(X86_FEATURES)[-3:] == [isa.AVX2, isa.VNNI, isa.BF16]
    assert isa.levels()[0] == isa.PORTABLE and isa.levels()[-1] == isa.best_level()


def test_levels_of_arm(monkeypatch):
    monkeypatch.setattr(isa, "IS_X86", False)
    assert isa._offered({"avx2", "neon", "dotprod"}) == [isa.PORTABLE]  # of neither
    monkeypatch.setattr(isa, "IS_ARM", True)
    assert isa._offered(set()) == [isa.PORTABLE, isa.NEON]
    assert isa._offered({"dotprod", "i8mm"}) == [isa.PORTABLE, isa.NEON, isa.DOTPROD, isa.I8MM]
    assert isa._offered({"i8mm"}) == [isa.PORTABLE, isa.NEON]


@pytest.mark.parametrize("name", ["avx", "AVX2", "amx " if isa.HAS_AMX else "amx", "portable,avx2", " "])
def test_what_is_not_offered_is_refused(name, monkeypatch):
    monkeypatch.setenv("OUTPACE_ISA", name)
    with pytest.raises(ParameterError, match=r"here it can be portable, (avx2|neon|vnni)") as error:
        isa._named(isa._OFFERED)
    assert f"OUTPACE_ISA={name}:" in str(error.value)


def test_better_instructions_are_taken_away(monkeypatch):
    monkeypatch.setattr(isa._numba, "CPU_FEATURES", "+avx2,+fma,+avx512f,-avx512fp16,+avxvnni,+amx-tile,-amx-int8")
    isa._compile_for(isa.AVXVNNI, {"avx2", "avx512f", "avxvnni"})
    kept = "+avx2,+fma,+avxvnni,-amx-int8,-amx-tile,-avx512f,-avx512fp16"
    assert kept == isa._numba.CPU_FEATURES
    isa._compile_for(isa.VNNI, set())
    assert kept == isa._numba.CPU_FEATURES


NAMED = """
from outpace.ops.cpu import isa
from numba import njit
from numba.core.registry import cpu_target
print(isa.NAMES[isa.best_level()], [isa.NAMES[n] for n in isa.levels()])
on = {f[1:] for f in cpu_target.target_context.codegen()._tm_features.split(",") if f[0] == "+"}
print(*sorted(f for f in on if f.startswith(("avx512", "amx", "avxvnni", "i8mm", "dotprod"))))
"""


@pytest.mark.parametrize("level", isa._OFFERED, ids=lambda n: isa.NAMES[n])
def test_named_levels_are_what_numba_compiles_for(level):
    env = os.environ | {"OUTPACE_ISA": isa.NAMES[level]}
    made = subprocess.run([sys.executable, "-c", NAMED], env=env, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    best, features = made.stdout.splitlines()
    assert best.startswith(isa.NAMES[level])
    above = isa._ABOVE.get(level, ("nothing",))
    assert not [f for f in features.split() if f.startswith(above)]
