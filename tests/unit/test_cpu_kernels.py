"""The CPU kernels one by one: matrix products at every level, activations' formats, the exponential, KV storage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from outpace.cache.native_storage import NativeStorage
from outpace.cache.storage import PAGE_SIZE
from outpace.models import packed
from outpace.ops import reference
from outpace.ops.cpu import isa
from outpace.ops.cpu.compiled import compiled
from outpace.ops.cpu.isa import AMX
from outpace.ops.cpu.linear import (
    ADD,
    GATED_GELU,
    GATED_SILU,
    KIND_BF16,
    KIND_F16,
    KIND_F32,
    KIND_INT8,
    SCRATCH_BYTES,
    STORE,
    linear,
)
from outpace.ops.cpu.rows import pack_row
from outpace.ops.cpu.simd import vexp, vload, vstore
from outpace.ops.cpu.tiles import load_tile_config, release_tiles

KINDS = {"float32": KIND_F32, "bfloat16": KIND_BF16, "int8": KIND_INT8, "float16": KIND_F16}
DEPTH_UNITS = {**packed.DEPTH_UNIT, "float16": 32}
LEVELS = isa.levels()
GUARD = np.float32(-7.25)  # around an output; must stay

each_kind = pytest.mark.parametrize("precision", KINDS)
each_level = pytest.mark.parametrize("level", LEVELS, ids=lambda n: isa.NAMES[n])
rows_, panels_, steps_ = st.integers(1, 40), st.integers(1, 9), st.integers(1, 4)
seeds = st.integers(0, 2**32 - 1)


@compiled
def _linear(
    tiles, kind, level, mode, rows, x, stride, row_scales, w, scales, bias, steps, first, last, out, width, tmp
):
    if level == AMX:
        load_tile_config(tiles)
    linear(kind, level, mode, rows, x, stride, row_scales, w, scales, bias, steps, first, last, out, width, tmp)
    if level == AMX:
        release_tiles()


@compiled
def _pack_row(kind, x, width, spare, out, scale):
    pack_row(kind, x, width, spare, out, scale)


@compiled
def _vexp(x, out, n):
    for i in range(0, n, 16):
        vstore(out + 4 * i, vexp(vload(x + 4 * i)))


def packed_product(w: NDArray[np.float32], precision: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    if precision != "float16":
        return packed.pack_product(w, precision)
    halves = w.astype(np.float16).view(np.int16).reshape(len(w) // 16, 16, -1, 2)
    return np.ascontiguousarray(halves.transpose(0, 2, 1, 3)), np.ones(len(w), dtype=np.float32)


def unpacked(panels: NDArray[Any], precision: str) -> NDArray[np.float64]:
    """Weights [N, K] out of their layout; int8 without its scales."""
    if precision == "float16":
        panels = panels.view(np.float16)
    if precision == "bfloat16":
        panels = (panels.astype(np.int32) << 16).view(np.float32)
    return panels.transpose(0, 2, 1, 3).reshape(16 * panels.shape[0], -1).astype(np.float64)


@dataclass
class Product:
    """A random product y = x w^T: its operands as the kernel takes them, and as numbers."""

    precision: str
    rows: int
    panels: int
    steps: int
    seed: int
    x: NDArray[Any] = field(init=False)  # raw rows, with garbage behind them
    numbers: NDArray[np.float64] = field(init=False)  # [rows, K]
    weights: NDArray[np.float64] = field(init=False)  # [N, K]

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        depth, space = self.steps * DEPTH_UNITS[self.precision], packed.padded(self.rows) + 16
        n = 16 * self.panels
        w = rng.standard_normal((n, depth), dtype=np.float32) / np.float32(depth**0.5)
        self.w, self.scales = packed_product(w, self.precision)
        self.weights = unpacked(self.w, self.precision)
        self.bias = rng.standard_normal(n, dtype=np.float32)
        self.row_scales = np.full((space, 2), np.nan, dtype=np.float32)  # and int8's sums, int32
        self.row_scales[: self.rows, 0] = rng.uniform(0.01, 0.03, self.rows)
        if self.precision == "int8":
            self.x = rng.integers(-127, 128, (space, depth)).astype(np.int8)
            self.numbers = self.x[: self.rows].astype(np.float64)
            self.sum_rows()
            return
        exact = rng.standard_normal((space, depth), dtype=np.float32)
        exact[self.rows :] = np.nan
        self.x = exact
        if self.precision == "bfloat16":
            self.x = torch.from_numpy(exact).to(torch.bfloat16).view(torch.int16).numpy()
            exact = torch.from_numpy(self.x).view(torch.bfloat16).float().numpy()
        self.numbers = exact[: self.rows].astype(np.float64)

    def sum_rows(self) -> None:
        self.row_scales.view(np.int32)[: self.rows, 1] = self.x[: self.rows].sum(axis=1, dtype=np.int32)

    def run(
        self,
        level: int,
        mode: int = STORE,
        *,
        bias: bool = False,
        before: NDArray[np.float32] | None = None,
        split: int = 0,
        only: int | None = None,
    ) -> NDArray[np.float32]:
        """What the kernel gives, panels before `split` and behind it apart; `only` one of the rows."""
        columns = 16 * self.panels // (2 if mode >= GATED_SILU else 1)
        rows, x, row_scales = self.rows, self.x, self.row_scales
        if only is not None:
            rows, x, row_scales = 1, np.roll(x, -only, axis=0), np.roll(row_scales, -only, axis=0)
        out = np.full((rows + 1, columns + 16), GUARD)
        out[:rows, :columns] = np.nan if before is None else before
        scratch = np.zeros(SCRATCH_BYTES + 64, dtype=np.uint8)
        tiles, tmp = isa.tile_config(), packed.padded(scratch.ctypes.data, 64)
        for first, last in ((0, split), (split, self.panels)):
            _linear(
                tiles.ctypes.data, KINDS[self.precision], level, mode, rows, x.ctypes.data, x.strides[0],
                row_scales.ctypes.data, self.w.ctypes.data, self.scales.ctypes.data,
                self.bias.ctypes.data if bias else 0, self.steps, first, last, out.ctypes.data, out.strides[0], tmp,
            )  # fmt: skip
        assert (out[rows:] == GUARD).all() and (out[:, columns:] == GUARD).all(), "wrote beside its output"
        return out[:rows, :columns]

    def expected(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The product in float64, and how far float32 sums may be from it. [rows, N] each"""
        scale = self.row_scales[: self.rows, :1].astype(np.float64) * self.scales if self.precision == "int8" else 1.0
        size = (np.abs(self.numbers) @ np.abs(self.weights).T) * scale
        return (self.numbers @ self.weights.T) * scale, size * 2.0**-24 * (self.numbers.shape[1] + 8)


@each_level
@each_kind
@settings(max_examples=40)
@given(rows=rows_, panels=panels_, steps=steps_, seed=seeds, data=st.data())
def test_products(level, precision, rows, panels, steps, seed, data):
    p = Product(precision, rows, panels, steps, seed)
    got = p.run(level, split=data.draw(st.integers(0, panels)))
    expected, error = p.expected()
    if precision == "int8":
        whole = (p.numbers @ p.weights.T).astype(np.float32)
        assert (got == whole * p.row_scales[:rows, :1] * p.scales).all()
    assert (np.abs(got - expected) <= error).all()


@pytest.mark.parametrize("precision", ["int8"])
@settings(max_examples=40)
@given(rows=rows_, panels=panels_, steps=steps_, seed=seeds)
def test_whole_numbers_give_the_same_bits_at_every_level(precision, rows, panels, steps, seed):
    p = Product(precision, rows, panels, steps, seed)
    first, *others = (p.run(level) for level in LEVELS)
    assert all((first == other).all() for other in others)


def test_extreme_whole_numbers_do_not_overflow():
    """127 * 127 and -127 * 127 over a depth of 8,192, where sixteen bits or a saturating sum would show."""
    p = Product("int8", 3, 2, 128, 0)
    p.w[:] = np.where(np.arange(16) % 2, 127, -127)[:, None]
    p.weights = unpacked(p.w, "int8")
    p.x[0], p.x[1], p.x[2] = 127, -127, np.where(np.arange(8192) % 2, 127, -127)
    p.numbers = p.x[:3].astype(np.float64)
    p.sum_rows()
    whole = (p.numbers @ p.weights.T).astype(np.float32)
    assert np.abs(whole).max() == 127 * 127 * 8192
    for level in LEVELS:
        assert (p.run(level) == whole * p.row_scales[:3, :1] * p.scales).all()


@each_level
@each_kind
@settings(max_examples=20)
@given(rows=rows_, panels=panels_, steps=steps_, seed=seeds, data=st.data())
def test_a_row_does_not_depend_on_its_company_nor_on_the_split(level, precision, rows, panels, steps, seed, data):
    p = Product(precision, rows, panels, steps, seed)
    together = p.run(level, bias=True)
    assert (p.run(level, bias=True, split=data.draw(st.integers(0, panels))) == together).all()
    for row in {0, rows - 1, data.draw(st.integers(0, rows - 1))}:
        assert (p.run(level, bias=True, only=row) == together[row]).all()


@each_level
@each_kind
@settings(max_examples=10)
@given(rows=rows_, panels=panels_, steps=steps_, seed=seeds)
def test_bias_and_residual_are_added_last(level, precision, rows, panels, steps, seed):
    p = Product(precision, rows, panels, steps, seed)
    plain = p.run(level)
    residual = np.random.default_rng(seed + 1).standard_normal(plain.shape, dtype=np.float32)
    assert (p.run(level, bias=True) == plain + p.bias).all()
    assert (p.run(level, ADD, before=residual) == plain + residual).all()
    assert (p.run(level, ADD, before=residual, bias=True) == (plain + p.bias) + residual).all()


@each_level
@each_kind
@pytest.mark.parametrize("mode", [GATED_SILU, GATED_GELU], ids=["silu", "gelu"])
@settings(max_examples=10)
@given(rows=rows_, pairs=st.integers(1, 5), steps=steps_, seed=seeds, data=st.data())
def test_gated_activations(level, precision, mode, rows, pairs, steps, seed, data):
    p = Product(precision, rows, 2 * pairs, steps, seed)
    plain = torch.from_numpy(p.run(level)).double().view(rows, pairs, 2, 16)
    gate, up = plain[:, :, 0], plain[:, :, 1]
    act = torch.nn.functional.silu if mode == GATED_SILU else lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    got = p.run(level, mode, split=2 * data.draw(st.integers(0, pairs)))
    np.testing.assert_allclose(got, (act(gate) * up).reshape(rows, -1).numpy(), rtol=3e-6, atol=1e-9)


# activations


def packed_row(kind: int, x: NDArray[np.float32], bytes_out: int) -> tuple[NDArray[np.uint8], float]:
    """The row's bytes and its scale (int8), whose sum is checked."""
    spare, out = np.full(len(x) + 64, np.nan, dtype=np.float32), np.full(bytes_out + 64, 0xAB, dtype=np.uint8)
    scale = np.full(2, np.nan, dtype=np.float32)
    x = np.ascontiguousarray(x)
    _pack_row(kind, x.ctypes.data, len(x), spare.ctypes.data, out.ctypes.data, scale.ctypes.data)
    assert (out[bytes_out:] == 0xAB).all(), "wrote beside its output"
    if kind == KIND_INT8:
        assert scale.view(np.int32)[1] == out[:bytes_out].view(np.int8).sum(dtype=np.int64)
    return out[:bytes_out], float(scale[0])


@given(width=st.integers(1, 20), seed=seeds, spike=st.floats(1, 1000))
def test_int8_rows_are_rotated_and_quantised_as_the_reference_does(width, seed, spike):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(16 * width, dtype=np.float32)
    x[rng.integers(len(x))] *= spike
    rotated = reference.rotate(torch.from_numpy(x)[None])
    numbers, scale = reference.quantize_rows(rotated)
    raw, ours = packed_row(KIND_INT8, x, packed.padded(len(x), 64))
    assert ours == pytest.approx(float(scale), rel=1e-6)
    difference = raw.view(np.int8).astype(int) - numbers[0].numpy()
    steps = np.abs(rotated[0].double().numpy() / float(scale))
    tie = np.abs(steps - np.floor(steps) - 0.5) < 1e-3  # float32 may round these either way
    assert (np.abs(difference) <= tie).all()


def test_a_row_of_zeros_is_quantised_to_zeros():
    raw, scale = packed_row(KIND_INT8, np.zeros(48, dtype=np.float32), 64)
    assert scale == 0 and not raw.any()


@given(width=st.integers(1, 9), seed=seeds)
def test_rows_for_float_products(width, seed):
    x = np.random.default_rng(seed).standard_normal(16 * width, dtype=np.float32) * np.float32(1e3)
    assert (packed_row(KIND_F32, x, x.nbytes)[0].view(np.float32) == x).all()
    rounded = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy()
    assert (packed_row(KIND_BF16, x, 2 * len(x))[0].view(np.int16) == rounded).all()


def test_exponential():
    x = np.linspace(-87, 88, 1 << 20, dtype=np.float32)
    x[:32] = np.repeat([-87.1, -1e30], 16)
    out = np.empty_like(x)
    _vexp(x.ctypes.data, out.ctypes.data, len(x))
    assert (out[:32] == 0).all()
    exact = np.exp(x[32:].astype(np.float64))
    assert np.abs(out[32:] / exact - 1).max() < 2e-7


# KV storage

LAYERS, PAGES, HEADS, WIDTH = 2, 4, 2, 16
places_ = st.integers(0, PAGES * PAGE_SIZE - 1)


class NaiveStorage:
    """Keys and values of each place, [L, places, heads, width], written and read through the documented layout."""

    def __init__(self, bf16: bool, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.real = NativeStorage(LAYERS, PAGES, HEADS, WIDTH, bf16)
        for array in (self.real.keys, self.real.values):
            array[:] = rng.integers(0, 1 << 15, array.shape)
        self.keys, self.values = self.read()

    def read(self) -> tuple[NDArray[Any], NDArray[Any]]:
        pair, shape = self.real.pair, (LAYERS, PAGES * PAGE_SIZE, HEADS, WIDTH)
        keys, values = np.empty(shape, self.real.keys.dtype), np.empty(shape, self.real.values.dtype)
        for place in range(PAGES * PAGE_SIZE):
            page, lane = divmod(place, PAGE_SIZE)
            for c in range(WIDTH):
                keys[:, place, :, c] = self.real.keys[:, page, :, c // pair, lane, c % pair]
                values[:, place, :, c] = self.real.values[:, page, :, lane // pair, c, lane % pair]
        return keys, values

    def move(self, source: list[int], target: list[int]) -> None:
        self.real.move(np.array(source, dtype=np.int64), np.array(target, dtype=np.int64))
        for array in (self.keys, self.values):
            array[:, target] = array[:, source].copy()

    def copy_pages(self, source: list[int], target: list[int]) -> None:
        self.real.copy_pages(np.array(source, dtype=np.int64), np.array(target, dtype=np.int64))
        for array in (self.keys, self.values):
            paged = array.reshape(LAYERS, PAGES, PAGE_SIZE, HEADS, WIDTH)
            paged[:, target] = paged[:, source].copy()

    def check(self) -> None:
        keys, values = self.read()
        assert (keys == self.keys).all() and (values == self.values).all()


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "float32"])
@settings(max_examples=50)
@given(seed=seeds, targets=st.lists(places_, unique=True, max_size=20), data=st.data())
def test_moved_places_hold_what_they_should(bf16, seed, targets, data):
    storage = NaiveStorage(bf16, seed)
    n = len(targets)
    storage.move(data.draw(st.lists(places_, min_size=n, max_size=n)), targets)  # sources may be targets
    storage.check()


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "float32"])
@given(seed=seeds, order=st.permutations(range(PAGES)), n=st.integers(0, PAGES // 2))
def test_copied_pages_hold_what_they_should(bf16, seed, order, n):
    storage = NaiveStorage(bf16, seed)
    storage.copy_pages(list(order[:n]), list(order[PAGES - n :]))
    storage.check()
