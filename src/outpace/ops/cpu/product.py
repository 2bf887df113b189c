"""One product of a step: which weights in which formats, what its activations must be packed to, and its panels
shared between threads.

A product's outputs come from up to three *segments* (of q, k and v for instance), each with weights in a format of its
own. The record of a product is i64[PRODUCT_SIZE]: P_SEGMENTS, P_INPUTS, then SEGMENT_SIZE entries for each segment (see
arguments.py); models/native.py writes it.
"""

from __future__ import annotations

from numba import njit

from .arguments import (
    A_FIRST,
    A_FIRST_ROW,
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
    S_BIAS,
    S_INPUT,
    S_KERNEL,
    S_KIND,
    S_PANELS,
    S_SCALE,
    S_STEPS,
    S_W,
    SEGMENT_SIZE,
)
from .barrier import get, put
from .blocks import BLOCK_SCRATCH, pack_blocks
from .linear import ADD, GATED_SILU, KIND_BF16, KIND_F32, KIND_INT8, SCRATCH_BYTES, STORE, epilogue, linear
from .rows import pack_row
from .simd import call_at, kept_apart, load_f32, load_one_bf16, load_one_f16, store_f32

P_SEGMENTS, P_INPUTS = range(2)
MOST_SEGMENTS = 3
PRODUCT_SIZE = 2 + MOST_SEGMENTS * SEGMENT_SIZE

# What activations are packed to: bits of P_INPUTS, and entries of the table of their buffers (address, stride in bytes)
IN_F32, IN_BF16, IN_INT8, IN_BLOCKS = KIND_F32, KIND_BF16, KIND_INT8, 3
INPUTS = 4

_PAIR_ROWS, _PAIR_LINE = 16, 128  # rows of gate and up that lie side by side until they are joined
_PAIRS = _PAIR_ROWS * _PAIR_LINE
_BEHIND = _PAIRS + 8 * ARGUMENTS  # pairs, then a kernel's arguments, then its scratch
PRODUCT_SCRATCH = _BEHIND + max(SCRATCH_BYTES, BLOCK_SCRATCH)


@njit
def _whole_kinds(segment, a):
    kind, mode = get(segment, S_KIND), get(a, A_MODE)
    w, steps, first_row = get(segment, S_W), get(segment, S_STEPS), get(a, A_FIRST_ROW)
    out, out_stride = get(a, A_OUT), get(a, A_OUT_STRIDE)
    if mode == EMBED:
        output, scale = get(a, A_FIRST), load_f32(get(a, A_ROW_SCALES))
        panel, lane = w + output // 16 * steps * 1024, output % 16
        for d in range(out_stride // 4):
            if kind == KIND_F32:
                value = load_f32(panel + 64 * d + 4 * lane)
            elif kind == KIND_BF16:
                value = load_one_bf16(panel + 64 * (d // 2) + 4 * lane + 2 * (d % 2))
            else:
                value = load_one_f16(panel + 64 * (d // 2) + 4 * lane + 2 * (d % 2))
            store_f32(out + 4 * d, value * scale)
        return
    linear(
        kind, get(a, A_LEVEL), mode, get(a, A_ROWS), get(a, A_X) + first_row * get(a, A_X_STRIDE), get(a, A_X_STRIDE),
        get(a, A_ROW_SCALES) + 8 * first_row, w, get(segment, S_SCALE), get(segment, S_BIAS), steps, get(a, A_FIRST),
        get(a, A_LAST), out, out_stride, get(a, A_SCRATCH),
    )  # fmt: skip


def whole_kinds(segment: int, a: int) -> None:
    """The kernel (arguments.py) of weights without blocks: S_KIND says which of them."""
    _whole_kinds(segment, a)


@njit
def pack_inputs(product, buffers, row_scales, r, x, width, spare):
    """Row `r` of a product's activations, f32[width] at `x`, in every format that its segments read.

    `buffers`: i64[INPUTS][2], address and stride of each format; `spare`: see rows.pack_row.
    """
    kept_apart()
    wanted = get(product, P_INPUTS)
    for kind in range(IN_BLOCKS):
        if wanted >> kind & 1:
            out = get(buffers, 2 * kind) + r * get(buffers, 2 * kind + 1)
            pack_row(kind, x, width, spare, out, row_scales + 8 * r)
    if wanted >> IN_BLOCKS & 1:
        pack_blocks(x, width, get(buffers, 2 * IN_BLOCKS), get(buffers, 2 * IN_BLOCKS + 1), r)


@njit(inline="always")
def share(total, unit, me, threads):
    """First of this thread's contiguous share of `total`, in multiples of `unit`."""
    return min(total, (total // unit + (total % unit > 0)) * me // threads * unit)


@njit
def _run(segment, other, mode, rows, first_row, buffers, row_scales, first, last, out, out_stride, scratch):
    """Call a segment's kernel. `out` is where its panel 0 and `first_row` go."""
    kept_apart()
    a, entry = scratch + _PAIRS, 2 * get(segment, S_INPUT)
    put(a, A_OTHER, other)
    put(a, A_MODE, mode)
    put(a, A_ROWS, rows)
    put(a, A_FIRST_ROW, first_row)
    put(a, A_X, get(buffers, entry))
    put(a, A_X_STRIDE, get(buffers, entry + 1))
    put(a, A_ROW_SCALES, row_scales)
    put(a, A_FIRST, first)
    put(a, A_LAST, last)
    put(a, A_OUT, out)
    put(a, A_OUT_STRIDE, out_stride)
    put(a, A_SCRATCH, scratch + _BEHIND)
    call_at(get(segment, S_KERNEL), segment, a)


@njit
def multiply(product, level, mode, rows, buffers, row_scales, me, threads, out, out_stride, scratch):
    """Thread `me`'s share of a product of `rows` packed rows. `mode`: what becomes of the sums (linear.py).

    `scratch`: PRODUCT_SCRATCH bytes.
    """
    kept_apart()
    put(scratch + _PAIRS, A_LEVEL, level)
    count = get(product, P_SEGMENTS)
    panels = 0
    for s in range(count):
        panels += get(product, 2 + SEGMENT_SIZE * s + S_PANELS)
    if mode >= GATED_SILU and count == 2:
        first, last = share(panels // 2, 1, me, threads), share(panels // 2, 1, me + 1, threads)
        gate, up = product + 8 * 2, product + 8 * (2 + SEGMENT_SIZE)
        if get(gate, S_INPUT) == IN_BLOCKS and get(up, S_KERNEL) == get(gate, S_KERNEL):
            _run(gate, up, mode, rows, 0, buffers, row_scales, first, last, out, out_stride, scratch)
            return
        for p in range(first, last):
            for m in range(0, rows, _PAIR_ROWS):
                n = min(_PAIR_ROWS, rows - m)
                side = scratch - 64 * p
                _run(gate, 0, STORE, n, m, buffers, row_scales, p, p + 1, side, _PAIR_LINE, scratch)
                _run(up, 0, STORE, n, m, buffers, row_scales, p, p + 1, side + 64, _PAIR_LINE, scratch)
                target = out + m * out_stride + 64 * p
                epilogue(KIND_F32, mode, 0, n, 2, scratch, _PAIR_LINE, 0, 0, 0, target, out_stride)
        return
    first, last = share(panels, 2, me, threads), share(panels, 2, me + 1, threads)
    halve = 2 if mode > ADD else 1
    before = 0
    for s in range(count):
        segment = product + 8 * (2 + SEGMENT_SIZE * s)
        here = get(segment, S_PANELS)
        begin, end = max(first, before) - before, min(last, before + here) - before
        if begin < end:
            at = out + 64 * before // halve
            _run(segment, 0, mode, rows, 0, buffers, row_scales, begin, end, at, out_stride, scratch)
        before += here


@njit
def embed_panels(segment, output, width, scale_at, out, scratch):
    """Weights of one output x the float32 at `scale_at` as f32[width]: a row of an embedding that lies in panels."""
    a = scratch + _PAIRS
    put(a, A_MODE, EMBED)
    put(a, A_FIRST, output)
    put(a, A_ROW_SCALES, scale_at)
    put(a, A_OUT, out)
    put(a, A_OUT_STRIDE, 4 * width)
    put(a, A_SCRATCH, scratch + _BEHIND)
    call_at(get(segment, S_KERNEL), segment, a)
