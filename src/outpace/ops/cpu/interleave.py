"""From rows of quantised blocks, as a file has them, to the panels that the kernels read: a permutation of bits, word
by word, at the speed of memory. Layouts: models.formats.

Each function writes what one output has in one unit: `to` is the address of the output's first word in the unit's first
region, where a step to the next row is 64 bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import int64, njit, types
from numpy.typing import NDArray

from .compiled import compiled
from .emit import I8, I16, I32, I64, emit, load, store
from .simd import atomic_add, load_i64

#: Kinds by the formats' names
_NAMES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32")
KINDS = {name: kind for kind, name in enumerate(_NAMES)}
_Q4_0, _Q4_1, _Q5_0, _Q5_1, _Q8_0, _Q4_K, _Q5_K, _Q6_K, _F16, _BF16, _F32 = KINDS.values()
_LOW, _HIGH = 0x0F0F0F0F, 0xF0F0F0F0
_EXPONENT = {_F16: (0x7C00, 0x7C00_0000), _BF16: (0x7F80, 0x7F80_0000), _F32: (0, 0x7F80_0000)}


def _reader(ty: ir.IntType):
    @emit(types.int64, types.int64)
    def read(b, address):
        return b.zext(load(b, address, ty, 1), I64)

    return read


def _writer(ty: ir.IntType):
    @emit(types.void, types.int64, types.int64)
    def write(b, address, value):
        store(b, address, b.trunc(value, ty), 1)

    return write


# files align nothing: a block of Q4_0 has 18 bytes
get8, get16, get32 = _reader(I8), _reader(I16), _reader(I32)
put8, put16, put32 = _writer(I8), _writer(I16), _writer(I32)


@njit
def _is_bad(half):
    """Whether an f16 is infinite or no number."""
    return half & 0x7C00 == 0x7C00


@njit
def _pair(first, second, to):
    """Nibbles of two blocks of 32: the first becomes low halves, the second high halves."""
    for k in range(4):
        a, b = get32(first + 4 * k), get32(second + 4 * k)
        put32(to + 64 * k, a & _LOW | (b & _LOW) << 4)
        put32(to + 64 * (4 + k), a >> 4 & _LOW | b & _HIGH)


@njit
def _every_fourth(word):
    """Bits 0, 4, 8, ... of each half of 64 bits, in the lowest eight of the half."""
    word = (word | word >> 3) & 0x03030303_03030303
    word = (word | word >> 6) & 0x000F000F_000F000F
    return (word | word >> 12) & 0x000000FF_000000FF


@njit
def _fifth(block, to):
    """Bit 4k + j moves to bit 8j + k."""
    bits = get32(block)
    even = _every_fourth(bits & 0x11111111 | (bits >> 2 & 0x11111111) << 32)
    odd = _every_fourth(bits >> 1 & 0x11111111 | (bits >> 3 & 0x11111111) << 32)
    both = even | odd << 8
    put32(to, both | both >> 16)


@njit
def _swap(a, b, by, mask):
    """The fields of a above `mask`, and those of b under it, change places."""
    t = (a >> by ^ b) & mask
    return a ^ t << by, b ^ t


@njit
def _of_32(kind, first, second, to, o):
    """Two blocks of one of the formats of 32. Returns how many of its scales are bad."""
    bad = 0
    at = to + 8 * 64  # behind the nibbles
    head = 4 if kind in (_Q4_1, _Q5_1) else 2
    if kind in (_Q5_0, _Q5_1):
        _fifth(first + head, at)
        _fifth(second + head, at + 64)
        _pair(first + head + 4, second + head + 4, to)
        at += 2 * 64
    else:
        _pair(first + head, second + head, to)
    at -= 2 * o
    for value in range(head // 2):
        for g in range(2):
            half = get16((first if g == 0 else second) + 2 * value)
            bad += _is_bad(half)
            put16(at + 32 * (2 * value + g), half)
    return bad


@njit
def _of_bytes(block, to, to_scale, flip):
    """A block of Q8_0. `flip`: 0x80 in each byte, 0 where there is no block."""
    for v in range(8):
        put32(to + 64 * v, get32(block + 2 + 4 * v) ^ flip)
    d = get16(block)
    put16(to_scale, d)
    return _is_bad(d)


@njit
def _scales_and_minima(packed, at):
    """Twelve bytes of 6-bit numbers; `at`: of this output in row 0 of `sc`."""
    first, second, third = get32(packed), get32(packed + 4), get32(packed + 8)
    scales = first & 0x3F3F3F3F | (third & _LOW | first >> 2 & 0x30303030) << 32
    minima = second & 0x3F3F3F3F | (third >> 4 & _LOW | second >> 2 & 0x30303030) << 32
    for g in range(8):
        put8(at + 16 * g, scales >> 8 * g & 63 | (minima >> 8 * g & 3) << 6)
    for p in range(4):
        both = minima >> 16 * p
        put8(at + 16 * (8 + p), both >> 2 & 15 | (both >> 10 & 15) << 4)


@njit
def _transpose_bits(source, to):
    """Bit g of each byte of word k becomes bit k of each byte of row g; eight words."""
    a, b, c, d = get32(source), get32(source + 4), get32(source + 8), get32(source + 12)
    e, f, g, h = get32(source + 16), get32(source + 20), get32(source + 24), get32(source + 28)
    a, b = _swap(a, b, 1, 0x55555555)
    c, d = _swap(c, d, 1, 0x55555555)
    e, f = _swap(e, f, 1, 0x55555555)
    g, h = _swap(g, h, 1, 0x55555555)
    a, c = _swap(a, c, 2, 0x33333333)
    b, d = _swap(b, d, 2, 0x33333333)
    e, g = _swap(e, g, 2, 0x33333333)
    f, h = _swap(f, h, 2, 0x33333333)
    a, e = _swap(a, e, 4, _LOW)
    b, f = _swap(b, f, 4, _LOW)
    c, g = _swap(c, g, 4, _LOW)
    d, h = _swap(d, h, 4, _LOW)
    for row, word in enumerate((a, b, c, d, e, f, g, h)):
        put32(to + 64 * row, word)


@njit
def _transpose_pairs(source, to):
    """Bits 2f, 2f + 1 of each byte of word t become bits 2t, 2t + 1 of each byte of row 2f; four words."""
    a, b, c, d = get32(source), get32(source + 4), get32(source + 8), get32(source + 12)
    a, b = _swap(a, b, 2, 0x33333333)
    c, d = _swap(c, d, 2, 0x33333333)
    a, c = _swap(a, c, 4, _LOW)
    b, d = _swap(b, d, 4, _LOW)
    for row, word in enumerate((a, b, c, d)):
        put32(to + 128 * row, word)


@njit
def _of_k(kind, block, to, o):
    """Q4_K and Q5_K, whose pairs of nibbles are already the panels'."""
    nibbles, at = block + 16, to + 32 * 64
    if kind == _Q5_K:
        nibbles += 32
        _transpose_bits(block + 16, at)
        at += 8 * 64
    for i in range(32):
        put32(to + 64 * i, get32(nibbles + 4 * i))
    at -= 3 * o
    _scales_and_minima(block + 4, at)
    d, dmin = get16(block), get16(block + 2)
    at += o + 12 * 16
    put16(at, d)
    put16(at + 32, dmin)
    return _is_bad(d) + _is_bad(dmin)


@njit
def _of_q6_k(block, to, o):
    for half in range(2):
        for k in range(8):
            a, b = get32(block + 64 * half + 4 * k), get32(block + 64 * half + 32 + 4 * k)
            put32(to + 64 * (16 * half + k), a & _LOW | (b & _LOW) << 4)
            put32(to + 64 * (16 * half + 8 + k), a >> 4 & _LOW | b & _HIGH)
        for i in range(2):
            _transpose_pairs(block + 128 + 32 * half + 16 * i, to + 64 * (32 + 8 * half + i))
    at = to + 48 * 64 - 3 * o
    for g in range(16):
        put8(at + 16 * g, get8(block + 192 + g))
    d = get16(block + 208)
    at += o + 16 * 16
    put16(at, d)
    put16(at + 32, 0)
    return _is_bad(d)


@njit
def _of_floats(source, left, to, low, high):
    """64 bytes of a row, of which `left` are there; `low` and `high` are masks of the exponents in a word."""
    bad = 0
    for i in range(16):
        word = 0
        if left >= 4 * i + 4:
            word = get32(source + 4 * i)
        elif left > 4 * i:
            word = get16(source + 4 * i)
        bad += word & high == high
        bad += low != 0 and word & low == low
        put32(to + 64 * i, word)
    return bad


_BLOCK = {_Q4_0: 18, _Q4_1: 20, _Q5_0: 22, _Q5_1: 24, _Q8_0: 34, _Q4_K: 144, _Q5_K: 176, _Q6_K: 210}
_BLOCKS = np.array([_BLOCK.get(kind, 64) for kind in KINDS.values()])
_EXPONENTS = np.array([_EXPONENT.get(kind, (0, 0)) for kind in KINDS.values()])


@njit
def _interleave(kind, source, row_bytes, rows, base, units, unit_bytes, first, last):
    """Panels first..last-1 at the address `base` from rows at the address `source`; i64 rows[16 P], -1 for none.

    Returns how many scales or values are infinite or no numbers.
    """
    bad, step = 0, _BLOCKS[kind]
    nothing = np.zeros(256, dtype=np.uint8)
    empty = nothing.ctypes.data
    paired = kind <= _Q8_0
    for p in range(first, last):
        for u in range(units):
            for o in range(16):
                row, to = load_i64(rows + 8 * (16 * p + o)), base + (p * units + u) * unit_bytes + 4 * o
                at = (2 * u if paired else u) * step
                here = row >= 0
                block = source + row * row_bytes + at if here else empty
                if paired:
                    both = here and at + step < row_bytes
                    second = block + step if both else empty
                    if kind == _Q8_0:
                        scales = to + 16 * 64 - 2 * o
                        bad += _of_bytes(block, to, scales, 0x80808080 * here)
                        bad += _of_bytes(second, to + 8 * 64, scales + 32, 0x80808080 * both)
                    else:
                        bad += _of_32(kind, block, second, to, o)
                elif kind == _Q6_K:
                    bad += _of_q6_k(block, to, o)
                elif kind >= _F16:
                    bad += _of_floats(
                        block, min(64, row_bytes - at) if here else 0, to, _EXPONENTS[kind, 0], _EXPONENTS[kind, 1]
                    )
                else:
                    bad += _of_k(kind, block, to, o)
    return bad


# a job: [kind, source, bytes per row, rows, panels, units, bytes of a unit, first panel, last panel, found bad]
_BAD = 9
_NEXT, _DONE = 0, 1  # of the jobs' state: the next one to take, and bytes written


@compiled
def work_off(jobs, state):
    """Take jobs i64[n, 10] one after the other until none is left; as many threads as wanted may."""
    while True:
        i = atomic_add(state.ctypes.data + 8 * _NEXT, 1)
        if i >= len(jobs):
            return
        j = jobs[i]
        j[_BAD] = _interleave(j[0], j[1], j[2], j[3], j[4], j[5], j[6], j[7], j[8])
        atomic_add(state.ctypes.data + 8 * _DONE, j[5] * j[6] * (j[8] - j[7]))


def _job(
    data: NDArray[np.uint8], kind: int, rows: NDArray[np.int64], panels: NDArray[np.uint8], first: int, last: int
) -> list[int]:
    assert data.flags.c_contiguous and panels.flags.c_contiguous and rows.flags.c_contiguous
    assert len(rows) == 16 * len(panels) and rows.dtype == np.int64
    addresses = (data.ctypes.data, data.shape[1], rows.ctypes.data, panels.ctypes.data)
    return [kind, *addresses, panels.shape[1], panels.shape[2], first, last, 0]


def interleave(
    data: NDArray[np.uint8],
    kind: int,
    rows: NDArray[np.int64],
    panels: NDArray[np.uint8],
    first: int = 0,
    last: int | None = None,
) -> int:
    """Panels first..last-1 from rows of blocks, on this thread; others run meanwhile.

    data u8[N, bytes per row]; rows i64[16 P]: which row each output is, -1 for padding; panels u8[P, U, unit_bytes],
    written. Returns how many scales (or float values) are infinite or no numbers.
    """
    jobs = np.array([_job(data, kind, rows, panels, first, len(panels) if last is None else last)])
    work_off(jobs, np.zeros(2, dtype=np.int64))
    return int(jobs[0, _BAD])


class Jobs:
    """Matrices to be brought into panels, by threads that hold up no other while they work."""

    def __init__(self) -> None:
        self._jobs: list[list[int]] = []
        self._held: list[NDArray[Any]] = []
        self._labels: list[str] = []

    def add(
        self,
        data: NDArray[np.uint8],
        kind: int,
        rows: NDArray[np.int64],
        panels: NDArray[np.uint8],
        label: str = "",
        at_once: int = 1 << 22,
    ) -> None:
        """As `interleave`, later. `at_once`: bytes of panels that a thread takes at a time."""
        self._held += [data, rows, panels]  # there are only addresses of them in the jobs
        size = max(at_once // panels[0].nbytes, 1)
        for first in range(0, len(panels), size):
            self._jobs.append(_job(data, kind, rows, panels, first, min(first + size, len(panels))))
            self._labels.append(label)

    def run(
        self,
        threads: int = 1,
        progress: Callable[[int, int], None] | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> list[str]:
        """Do them all, and `meanwhile` on this thread. `progress(done, total)` counts bytes that are written.

        Returns the labels of jobs that met scales (or float values) which are infinite or no numbers.
        """
        if not self._jobs:
            return []
        jobs, state = np.array(self._jobs, dtype=np.int64), np.zeros(2, dtype=np.int64)
        total = int((jobs[:, 5] * jobs[:, 6] * (jobs[:, 8] - jobs[:, 7])).sum())
        workers = [threading.Thread(target=self._work, args=(jobs, state), daemon=True) for _ in range(threads)]
        work_off.compile((int64[:, ::1], int64[::1]))  # not in each of them
        try:
            for worker in workers:
                worker.start()
            if meanwhile:
                meanwhile()
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.02)
                    if progress:
                        progress(int(state[_DONE]), total)
            if progress:
                progress(total, total)
        finally:  # after Ctrl-C or an error too: what runs takes milliseconds, the rest is left
            state[_NEXT] = len(jobs)
        return sorted({self._labels[i] for i in np.flatnonzero(jobs[:, _BAD])})

    def _work(self, jobs: NDArray[np.int64], state: NDArray[np.int64]) -> None:
        """A thread's part; it holds this object, and so all that the jobs point to."""
        work_off(jobs, state)
