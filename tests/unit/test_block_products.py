"""Products with weights in their files' blocks, against the same sums by numpy on dequantised weights."""

import numpy as np
import pytest
from numba import njit

from outpace.models.formats import FORMATS, dequantise
from outpace.ops.cpu import blocks
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
    SEGMENT_SIZE,
)
from outpace.ops.cpu.compiled import address_of
from outpace.ops.cpu.linear import ADD, GATED_SILU, STORE
from outpace.ops.cpu.product import PRODUCT_SCRATCH
from outpace.ops.cpu.simd import call_at

NAMES = sorted(blocks.KERNELS)


@njit
def call(address, segment, arguments):
    call_at(address, segment, arguments)


@njit
def pack_rows(x, width, out, stride):
    for row in range(len(x)):
        blocks.pack_blocks(x.ctypes.data + 4 * row * x.shape[1], width, out, stride, row)


def panels_of(name, outputs, depth, rng):
    """Panels with random integers and scales of a sensible size."""
    form = FORMATS[name]
    panels = rng.integers(0, 256, form.shape(outputs, depth), dtype=np.uint8)
    for region in ("d", "m", "dmin"):
        if region in form.regions:
            r = form.regions[region]
            values = rng.normal(0, 0.02, (*panels.shape[:2], (r.stop - r.start) // 2)).astype(np.float16)
            panels[..., r.start : r.stop] = values.view(np.uint8)
    return panels


def rounded(x):
    """f32[M, K] as the kernels round it: int8 with a scale for 32."""
    m, k = x.shape
    groups = np.pad(x, ((0, 0), (0, -k % 32))).reshape(m, -1, 32)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
    whole = np.rint(np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0))
    return (whole * scale).reshape(m, -1)[:, :k].astype(np.float64)


class Product:
    def __init__(self, name, panels):
        self.kernel, self.panels = address_of(blocks.KERNELS[name]), panels
        steps = panels.shape[1] * FORMATS[name].unit_depth // 64
        self.segment = np.zeros(SEGMENT_SIZE, dtype=np.int64)
        self.segment[:] = self.kernel, 3, 0, panels.ctypes.data, 0, 0, len(panels), steps

    def __call__(self, x, mode=STORE, other=None, out=None, first=0, last=None):
        """f32[M, K] -> f32[M, 16 * panels]"""
        m, width = x.shape
        packed = np.zeros((-(-width // 256), m * blocks.X_BLOCK), dtype=np.uint8)
        x = np.pad(x, ((0, 0), (0, -width % 16))).astype(np.float32)
        pack_rows(x, x.shape[1], packed.ctypes.data, packed.strides[0])
        out = np.zeros((m, 16 * len(self.panels)), dtype=np.float32) if out is None else out
        scratch, a = np.zeros(PRODUCT_SCRATCH, dtype=np.uint8), np.zeros(ARGUMENTS, dtype=np.int64)
        for entry, value in (
            (A_OTHER, 0 if other is None else other.segment.ctypes.data), (A_LEVEL, 0), (A_MODE, mode), (A_ROWS, m),
            (A_X, packed.ctypes.data), (A_X_STRIDE, packed.strides[0]), (A_FIRST, first),
            (A_LAST, len(self.panels) if last is None else last), (A_OUT, out.ctypes.data),
            (A_OUT_STRIDE, out.strides[0]), (A_SCRATCH, scratch.ctypes.data),
        ):  # fmt: skip
            a[entry] = value
        call(self.kernel, self.segment.ctypes.data, a.ctypes.data)
        return out


def reference(x, panels, name, depth):
    w = dequantise(panels, FORMATS[name], 16 * len(panels), depth).astype(np.float64)
    return rounded(x) @ w.T


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 66])
def test_a_product_is_that_of_the_dequantised_weights(name, rows):
    rng = np.random.default_rng(rows)
    depth = 512 if FORMATS[name].unit_depth == 256 else 352
    panels = panels_of(name, 48, depth, rng)
    x = rng.normal(0, 1, (rows, depth)).astype(np.float32)
    x[:, 5] *= 50  # an outlier
    wanted = reference(x, panels, name, depth)
    found = Product(name, panels)(x)
    assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", NAMES)
def test_extreme_integers_do_not_overflow(name):
    depth = 256
    for byte, sign in ((0, 1), (255, 1), (255, -1), (0x0F, 1), (0xF0, -1), (0x80, 1)):
        panels = panels_of(name, 32, depth, np.random.default_rng(0))
        for region in ("nibbles", "fifth", "high", "bytes"):
            if region in FORMATS[name].regions:
                r = FORMATS[name].regions[region]
                panels[..., r.start : r.stop] = byte
        for rows in (7, 35):  # few take integers out of the file's bits, many have them unpacked
            x = np.full((rows, depth), np.float32(sign))
            wanted = reference(x, panels, name, depth)
            assert np.abs(Product(name, panels)(x) - wanted).max() <= 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_the_same_bits_among_any_others(name):
    rng = np.random.default_rng(1)
    depth = 512
    product = Product(name, panels_of(name, 80, depth, rng))
    x = rng.normal(0, 1, (131, depth)).astype(np.float32)
    whole = product(x)
    for first, last in ((0, 1), (1, 3), (3, 8), (8, 73), (130, 131)):
        assert product(x[first:last]).tobytes() == np.ascontiguousarray(whole[first:last]).tobytes()
    out = np.zeros_like(whole)
    for first, last in ((0, 1), (1, 4), (4, 5)):
        product(x, out=out, first=first, last=last)
    assert out.tobytes() == whole.tobytes()


@pytest.mark.parametrize("name", ["Q4_K", "Q5_0", "Q8_0"])
def test_gate_and_up_and_the_residual(name):
    rng = np.random.default_rng(2)
    gate, up = (Product(name, panels_of(name, 64, 256, rng)) for _ in range(2))
    x = rng.normal(0, 1, (5, 256)).astype(np.float32)
    g, u = gate(x), up(x)
    found = gate(x, mode=GATED_SILU, other=up)
    wanted = g / (1 + np.exp(-g.astype(np.float64))) * u
    assert np.abs(found - wanted).max() < 1e-6 * np.abs(wanted).max()
    residual = rng.normal(0, 1, g.shape).astype(np.float32)
    assert (gate(x, mode=ADD, out=residual.copy()) == g + residual).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_an_embedding(name):
    rng = np.random.default_rng(3)
    depth = 512 if FORMATS[name].unit_depth == 256 else 352
    panels = panels_of(name, 40, depth, rng)
    product, scale = Product(name, panels), np.array([1.5], dtype=np.float32)
    w = dequantise(panels, FORMATS[name], 48, depth)
    a, scratch = np.zeros(ARGUMENTS, dtype=np.int64), np.zeros(PRODUCT_SCRATCH, dtype=np.uint8)
    for output in (0, 17, 39):
        out = np.zeros(depth, dtype=np.float32)
        a[A_MODE], a[A_FIRST], a[A_ROW_SCALES] = EMBED, output, scale.ctypes.data
        a[A_OUT], a[A_OUT_STRIDE], a[A_SCRATCH] = out.ctypes.data, out.nbytes, scratch.ctypes.data
        call(product.kernel, product.segment.ctypes.data, a.ctypes.data)
        assert np.allclose(out, w[output] * np.float32(1.5), rtol=1e-6, atol=1e-7)
