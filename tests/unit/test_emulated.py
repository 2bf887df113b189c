"""Kernels for processors that this machine is not: their instructions, and for ARM what an emulator makes of them.

Products and what packs activations for them have the same bits on every processor, so what is right here (see
test_block_products and test_cpu_kernels) says what is right there.
"""

from __future__ import annotations

import sys
from functools import cache

import cross
import numpy as np
import pytest
from test_block_products import panels_of
from test_isa import expected, operands

from outpace.models.formats import FORMATS
from outpace.ops.cpu import blocks, isa
from outpace.ops.cpu import linear as kinds
from outpace.ops.cpu.arguments import (
    A_FIRST,
    A_LAST,
    A_LEVEL,
    A_MODE,
    A_OTHER,
    A_OUT,
    A_OUT_STRIDE,
    A_ROW_SCALES,
    A_ROWS,
    A_SCRATCH,
    A_X,
    A_X_STRIDE,
    ARGUMENTS,
    EMBED,
)
from outpace.ops.cpu.product import PRODUCT_SCRATCH

pytestmark = pytest.mark.slow
ARM_LEVELS = ("neon", "dotprod", "i8mm")
ARM = pytest.mark.parametrize("level", ARM_LEVELS)
NAMES = sorted(blocks.KERNELS)


# What products use, kernel by kernel, and what the level has not
_DOTS, _TILES = {"vpdpbusd"}, {"tdpbssd", "tdpbf16ps", "tileloadd"}
_MATRICES = {"smmla", "usmmla", "bfmmla"}
INSTRUCTIONS = {
    "neon": ({"smull", "sadalp"}, {"sdot", "usdot"} | _MATRICES),
    "dotprod": ({"sdot"}, {"smull", "usdot"} | _MATRICES),
    "i8mm": ({"usdot"}, {"smull", "sdot"}),
    "avx2": ({"vpmaddubsw", "vpmaddwd", "ymm"}, {"zmm", "vdpbf16ps"} | _DOTS | _TILES),
    "avxvnni": ({"vpdpbusd", "ymm"}, {"zmm", "vpmaddubsw", "vdpbf16ps"} | _TILES),
    "vnni": ({"vpdpbusd", "zmm"}, {"vpmaddubsw", "vdpbf16ps"} | _TILES),
    "bf16": ({"vpdpbusd", "zmm"}, {"vpmaddubsw"} | _TILES),
    "amx": ({"vpdpbusd", "zmm"}, {"vpmaddubsw"}),
}


@pytest.mark.skipif(sys.platform != "linux", reason="platform: one of the levels needs Linux")
@pytest.mark.parametrize("level", INSTRUCTIONS)
def test_instructions(level):
    """Products use what a level has, and no kernel what it has not."""
    names = ("Q4_K", "whole_kinds", "scores_by_dots")
    folder = cross.compiled_for(level) if level in ARM_LEVELS else cross.compiled_for(level, *names)
    wanted, absent = INSTRUCTIONS[level]
    used = {name: cross.instructions(folder, name) for name in names}
    for name in names[:-1]:
        assert wanted <= used[name], name
    for name in names:
        assert not used[name] & absent, name
    assert ("vdpbf16ps" in used["scores_by_dots"]) == (level in ("bf16", "amx"))
    assert (used["whole_kinds"] >= _TILES) == (level == "amx")


@cache
def _processor(level: str) -> cross.Emulated:
    return cross.Emulated(level)


@pytest.fixture
def processor(level):
    if cross.LACKING:
        pytest.skip(cross.LACKING)
    made = _processor(level)
    made.clear()
    return made


def segment(at, w, steps, kind=0, scales=0, bias=0):
    panels = w.shape[0]
    return at.array([0, 0, kind, *map(cross.number, (w, scales, bias)), panels, steps], np.int64)


def arguments(at, entries):
    a = np.zeros(ARGUMENTS, dtype=np.int64)
    for entry, value in entries.items():
        a[entry] = cross.number(value)
    return at.array(a)


def scratch_of(at):
    return at.array(np.zeros(PRODUCT_SCRATCH), np.uint8)


def rows_of(at, rows, depth, rng):
    x = rng.normal(0, 1, (rows, depth))
    x[:, 5] *= 50  # an outlier
    x[-1, :40] = 0
    return at.array(x, np.float32)


@ARM
def test_totals_are_exact(processor, level):
    calls, checks = [], []
    for bits, vectors, negated in cross.SUMS:
        for seed in range(8):
            w, x = operands(bits, vectors, seed)
            given = [processor.array(v) for v in (w, x, [-x.sum(dtype=np.int32)], np.zeros(16, np.int32))]
            calls.append((f"sums_{bits}_{vectors}_{negated}", *given))
            checks.append((given[-1], expected(isa.NAMES.index(level), bits, bool(negated), w, x)))
    processor.call(*calls)
    for out, wanted in checks:
        assert (out == wanted).all()


@ARM
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 7, 66])
def test_blocks(processor, name, rows):
    """Packed activations, then products with three panels: alone, added to what is there, and joined as gate and up."""
    rng, depth = np.random.default_rng(rows), 512 if FORMATS[name].unit_depth == 256 else 352
    x = rows_of(processor, rows, depth, rng)
    packed = processor.array(np.zeros((-(-depth // 256), rows * blocks.X_BLOCK)), np.uint8)
    stride = packed.strides[0]
    pack = [("pack_blocks", x.ctypes.data + 4 * depth * r, depth, packed, stride, r) for r in range(rows)]
    by_row = packed.reshape(len(packed), rows, blocks.X_BLOCK)
    for part in (by_row[..., : blocks.X_SUMS_16], by_row[..., blocks.X_SCALES :]):  # between them, a level's own sums
        processor.same(part, *pack)

    w, other = (processor.array(panels_of(name, 48, depth, rng)) for _ in range(2))
    steps = w.shape[1] * FORMATS[name].unit_depth // 64
    bias, out = processor.array(rng.normal(0, 1, 48), np.float32), processor.array(np.zeros((rows, 48)), np.float32)
    entries = {
        A_LEVEL: isa.VNNI, A_ROWS: rows, A_X: packed, A_X_STRIDE: stride, A_LAST: 3, A_OUT: out,
        A_OUT_STRIDE: out.strides[0], A_SCRATCH: scratch_of(processor),
    }  # fmt: skip
    plain, up = segment(processor, w, steps, bias=bias), segment(processor, other, steps)
    processor.same(out, *pack, (name, plain, arguments(processor, entries)))
    assert len(np.unique(out)) > 40 * rows
    processor.same(out, *pack, (name, plain, arguments(processor, entries | {A_MODE: kinds.ADD})))
    gated = entries | {A_MODE: kinds.GATED_SILU, A_OTHER: up}
    processor.same(out, *pack, (name, segment(processor, w, steps), arguments(processor, gated)))
    embed = entries | {A_MODE: EMBED, A_FIRST: 17, A_ROW_SCALES: bias, A_OUT_STRIDE: 4 * 48}
    processor.same(out, *pack, (name, plain, arguments(processor, embed)))


@ARM
@pytest.mark.parametrize("kind", [kinds.KIND_F32, kinds.KIND_BF16, kinds.KIND_INT8, kinds.KIND_F16])
@pytest.mark.parametrize("rows", [1, 6, 19])
def test_whole_kinds(processor, kind, rows):
    """float32, bfloat16, int8 and float16: packed activations, then seven panels by the level and by plain code."""
    rng, depth, panels = np.random.default_rng(rows), 192, 7
    x, spare = rows_of(processor, rows, depth, rng), processor.array(np.zeros(depth), np.float32)
    taken, size = {0: (0, 4), 1: (1, 2), 2: (2, 1), 3: (0, 4)}[kind]  # float16 meets float32 activations
    packed = processor.array(np.zeros((-(-rows // 16) * 16, depth * size)), np.uint8)
    row_scales = processor.array(np.zeros((rows, 2)), np.float32)
    pack = [
        ("pack_row", taken, x.ctypes.data + 4 * depth * r, depth, spare, packed.ctypes.data + packed.strides[0] * r,
         row_scales.ctypes.data + 8 * r)
        for r in range(rows)
    ]  # fmt: skip
    processor.same(packed, *pack)
    processor.same(row_scales, *pack)

    values = rng.normal(0, 1, (panels, 16 * depth)).astype(np.float32)
    if kind == kinds.KIND_BF16:
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    elif kind == kinds.KIND_INT8:
        values = rng.integers(-127, 128, values.shape).astype(np.int8)
    elif kind == kinds.KIND_F16:
        values = values.astype(np.float16)
    w, steps = processor.array(values), depth * values.itemsize // 64
    scales, bias = (processor.array(rng.normal(0, 1, 16 * panels), np.float32) for _ in range(2))
    out = processor.array(np.zeros((rows, 16 * panels)), np.float32)
    plain = segment(processor, w, steps, kind, scales, bias)
    alternating = segment(processor, w, steps, kind, scales)
    entries = {
        A_ROWS: rows, A_X: packed, A_X_STRIDE: packed.strides[0], A_ROW_SCALES: row_scales, A_LAST: panels, A_OUT: out,
        A_OUT_STRIDE: out.strides[0], A_SCRATCH: scratch_of(processor),
    }  # fmt: skip
    for at_level in (isa.VNNI, isa.PORTABLE):
        entries[A_LEVEL] = at_level
        processor.same(out, ("whole_kinds", plain, arguments(processor, entries)))
        assert len(np.unique(out)) > 100 * rows
        gated = entries | {A_MODE: kinds.GATED_GELU, A_LAST: 6}
        processor.same(out, ("whole_kinds", alternating, arguments(processor, gated)))


@ARM
@pytest.mark.parametrize("bf16", [True, False])
def test_attention(processor, bf16):
    """Three rows, causal and of a tree, behind 37 places of four pages; nine queries read a head."""
    rng, group, rows, committed = np.random.default_rng(0), 3, 3, 37
    for width in (32, 80):
        processor.clear()
        at = processor.array
        keys, values = (rng.normal(0, 1, (4, 16 * width)).astype(np.float32) for _ in range(2))
        if bf16:
            keys, values = ((v.view(np.uint32) >> 16).astype(np.uint16) for v in (keys, values))
        keys, values = at(keys), at(values)
        queries, out = (at(rng.normal(0, 1, (rows, group * width)), np.float32) for _ in range(2))
        q, acc = (at(np.zeros((16, width)), np.float32) for _ in range(2))
        s = at(np.zeros((16, 144)), np.float32)
        offsets, positions, pages = (at(v, np.int32) for v in ([0, 1, 2], [37, 38, 38], [2, 0, 3, 1]))
        visible_start, visible = (at(v, np.int32) for v in ([0, 1, 3, 5], [0, 0, 1, 0, 2]))
        for causal in (True, False):
            for window in (0, 20):
                call = (
                    "attend", bf16, group, width, queries, queries.strides[0], 0, rows, offsets, positions, causal,
                    visible_start, visible, committed, window, pages, keys, values, keys.strides[0], out,
                    out.strides[0], q, s.ctypes.data + 64, s.strides[0], acc,
                )  # fmt: skip
                processor.same(out, call)
                assert np.isfinite(out).all() and len(np.unique(out)) > out.size / 2


@ARM
@pytest.mark.parametrize("n", [3, 5, 8])
def test_codes_of_few_bits(processor, n):
    """Integer products with a page of keys and of values in four bits, and with the four bits below them."""
    rng, width = np.random.default_rng(n), 96
    at = processor.array
    codes, lower = (at(rng.integers(0, 256, 8 * width), np.uint8) for _ in range(2))
    q, w = (at(rng.integers(-127, 128, (8, size)), np.int8) for size in (width, 16))
    totals, factors = at(np.zeros((8, 16)), np.int32), at(rng.normal(0, 1, 8), np.float32)
    sums = at(rng.normal(0, 1, (8, width)), np.float32)
    for below in (0, lower):
        processor.same(totals, ("dot_keys", n, q, width, codes, below, totals))
        processor.same(sums, ("add_values", n, w, factors, width, codes, below, sums))
