"""The formats that weights run in: what a block of a file holds, and where its parts lie in the kernels' panels.

A panel is sixteen outputs; its depth runs in units, one behind the other. A unit is a list of regions, each laid out as
[rows][16 outputs][bytes per output]:

    nibbles  row 8c + k, byte j: depth 64c + 4k + j in the low half, depth 64c + 32 + 4k + j in the high half
    bytes    row v, byte j: depth 4v + j
    fifth    row g, byte j, bit k: the fifth bit of depth 32g + 4k + j
    high     row r, byte j, bits 2t and 2t + 1: the fifth and sixth bit of depth 16r + 4t + j
    d, m     row g: f16 scale (minimum) of the unit's group g; in the K formats the one d and dmin of the unit
    sc       row g: scale of group g, with the lowest two bits of its minimum in bits 6 and 7 where there are minima
    mh       row p: the upper four bits of the minima of groups 2p (low half) and 2p + 1
    values   row r: four bytes of f16, bf16 or f32

The integers are the file's own: nothing is rounded a second time. A depth that ends within a unit, and outputs that
fill up a panel, are zero bytes (scale 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PANEL = 16  # outputs


@dataclass(frozen=True, slots=True)
class Region:
    """`start`: the byte of a unit where it begins; `size`: bytes per output and row."""

    start: int
    rows: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * PANEL * self.size


@dataclass(frozen=True, slots=True)
class Format:
    """`block` weights of a row take `block_bytes` in a file; `group` weights share a scale. A weight is
    scale * (integer - offset), plus a minimum where `has_minima`. `unit_depth` weights of each of sixteen outputs make
    a unit of the kernels."""

    name: str
    block: int
    block_bytes: int
    unit_depth: int
    group: int
    offset: int
    has_minima: bool
    regions: Mapping[str, Region]

    @property
    def unit_bytes(self) -> int:
        return max(region.stop for region in self.regions.values())

    @property
    def bits_per_weight(self) -> float:
        """In the file, which panels exceed by padding only."""
        return 8 * self.block_bytes / self.block

    @property
    def is_quantised(self) -> bool:
        return self.group > 1

    def units(self, depth: int) -> int:
        return -(-depth // self.unit_depth)

    def panels(self, outputs: int) -> int:
        return -(-outputs // PANEL)

    def shape(self, outputs: int, depth: int) -> tuple[int, int, int]:
        """Of the panels of a product: u8[panels, units, unit_bytes]."""
        return self.panels(outputs), self.units(depth), self.unit_bytes

    def row_bytes(self, depth: int) -> int:
        """Of one output in a file. `depth` is a multiple of `block`."""
        return depth // self.block * self.block_bytes


def _format(
    name: str,
    block: int,
    block_bytes: int,
    unit_depth: int,
    group: int,
    offset: int,
    minima: bool,
    **regions: tuple[int, int],
) -> Format:
    """`regions`: rows and bytes per output of each, in order."""
    placed: dict[str, Region] = {}
    at = 0
    for region, (rows, size) in regions.items():
        placed[region] = Region(at, rows, size)
        at = placed[region].stop
    return Format(name, block, block_bytes, unit_depth, group, offset, minima, placed)


_ALL = (
    _format("Q4_0", 32, 18, 64, 32, 8, False, nibbles=(8, 4), d=(2, 2)),
    _format("Q4_1", 32, 20, 64, 32, 0, True, nibbles=(8, 4), d=(2, 2), m=(2, 2)),
    _format("Q5_0", 32, 22, 64, 32, 16, False, nibbles=(8, 4), fifth=(2, 4), d=(2, 2)),
    _format("Q5_1", 32, 24, 64, 32, 0, True, nibbles=(8, 4), fifth=(2, 4), d=(2, 2), m=(2, 2)),
    _format("Q8_0", 32, 34, 64, 32, 128, False, bytes=(16, 4), d=(2, 2)),
    _format("Q4_K", 256, 144, 256, 32, 0, True, nibbles=(32, 4), sc=(8, 1), mh=(4, 1), d=(1, 2), dmin=(1, 2)),
    _format(
        "Q5_K", 256, 176, 256, 32, 0, True, nibbles=(32, 4), fifth=(8, 4), sc=(8, 1), mh=(4, 1), d=(1, 2), dmin=(1, 2)
    ),
    _format("Q6_K", 256, 210, 256, 16, 32, False, nibbles=(32, 4), high=(16, 4), sc=(16, 1), d=(1, 2), padding=(1, 2)),
    _format("F16", 1, 2, 32, 1, 0, False, values=(16, 4)),
    _format("BF16", 1, 2, 32, 1, 0, False, values=(16, 4)),
    _format("F32", 1, 4, 16, 1, 0, False, values=(16, 4)),
)
FORMATS: dict[str, Format] = {f.name: f for f in _ALL}


def regions_of(panels: NDArray[np.uint8], form: Format) -> dict[str, NDArray[np.uint8]]:
    """u8[P, U, unit_bytes] -> views u8[P, U, rows, 16, bytes per output] by the regions' names."""
    assert panels.shape[-1] == form.unit_bytes
    return {
        name: panels[..., r.start : r.stop].reshape(*panels.shape[:2], r.rows, PANEL, r.size)
        for name, r in form.regions.items()
    }


def take_outputs(panels: NDArray[np.uint8], form: Format, outputs: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Panels of some outputs only, in that order. The padding repeats the last one."""
    wanted = np.append(outputs, np.repeat(outputs[-1:], -len(outputs) % PANEL))
    panel, lane = (part.reshape(-1, PANEL) for part in np.divmod(wanted, PANEL))
    out = np.zeros((len(panel), *panels.shape[1:]), dtype=np.uint8)
    into = regions_of(out, form)
    for name, region in regions_of(panels, form).items():
        # indices side by side come first: [p, 16, U, rows, bytes]
        into[name][:] = region[panel, :, :, lane].transpose(0, 2, 3, 1, 4)
    return out


def dequantise(panels: NDArray[np.uint8], form: Format, outputs: int, depth: int) -> NDArray[np.float32]:
    """u8[P, U, unit_bytes] -> f32[outputs, depth]: the slow reference that says what panels mean."""
    parts = regions_of(panels, form)
    n, k = len(panels) * PANEL, panels.shape[1] * form.unit_depth
    if not form.is_quantised:
        words = np.ascontiguousarray(parts["values"].transpose(0, 3, 1, 2, 4)).reshape(n, -1)
        return _floats(words, form.name)[:outputs, :depth]
    q = _integers(parts).reshape(n, k // form.group, form.group).astype(np.float32) - np.float32(form.offset)
    scales, minima = _scales(parts, form)
    w = scales.reshape(n, -1, 1) * q
    if minima is not None:
        w = w + minima.reshape(n, -1, 1)
    return w.reshape(n, k)[:outputs, :depth]


def _floats(words: NDArray[np.uint8], name: str) -> NDArray[np.float32]:
    if name == "BF16":
        return (words.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return words.view("<f2" if name == "F16" else "<f4").astype(np.float32)


def _integers(parts: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Unsigned, u8[P, 16, U, ...] with the depths of a unit in order over the last axes."""
    if "bytes" in parts:
        return parts["bytes"].transpose(0, 3, 1, 2, 4)
    nibbles = parts["nibbles"]
    p, u, rows = nibbles.shape[:3]
    chunks = nibbles.reshape(p, u, rows // 8, 8, PANEL, 4)
    halves = np.stack((chunks & 15, chunks >> 4), axis=3)  # [P, U, chunk, half, k, 16, j]
    q = halves.transpose(0, 5, 1, 2, 3, 4, 6).reshape(p, PANEL, u, -1)
    for name, bits in (("fifth", 1), ("high", 2)):
        if name in parts:
            shifts = np.arange(0, 8, bits, dtype=np.uint8)
            upper = parts[name][..., None] >> shifts & (2**bits - 1)  # [P, U, row, 16, j, vector]
            q = q | upper.transpose(0, 3, 1, 2, 5, 4).reshape(q.shape) << 4
    return q


def _scales(
    parts: Mapping[str, NDArray[np.uint8]], form: Format
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Of the groups, f32[P, 16, U, groups]; minima are what is added."""

    def halves(name: str) -> NDArray[np.float32]:
        return _floats(np.ascontiguousarray(parts[name]), "F16")[..., 0].transpose(0, 3, 1, 2)

    d = halves("d")
    if form.name == "Q6_K":
        return d * parts["sc"][..., 0].view(np.int8).astype(np.float32).transpose(0, 3, 1, 2), None
    if "sc" not in parts:
        return d, halves("m") if form.has_minima else None
    sc, mh = (parts[name][..., 0].transpose(0, 3, 1, 2) for name in ("sc", "mh"))
    upper = np.stack((mh & 15, mh >> 4), axis=-1).reshape(sc.shape)
    return d * (sc & 63).astype(np.float32), -(halves("dmin") * (upper << 2 | sc >> 6).astype(np.float32))


def quantise_q4_1(w: NDArray[Any]) -> NDArray[np.uint8]:
    """f32[N, K] -> blocks of Q4_1 as a file has them, u8[N, ceil(K / 32) * 20]: the slow reference.

    A group of 32 that spans n steps comes back exactly when n is tried; of the candidates the one with the least
    squared error is taken, its scale and minimum rounded to f16 first.
    """
    n, k = w.shape
    groups = np.pad(np.asarray(w, dtype=np.float32), ((0, 0), (0, -k % 32))).reshape(n, -1, 32)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    low = low.astype(np.float16).astype(np.float32) + np.float32(0)  # no negative zero
    best, scale = np.full_like(low, np.inf), np.ones_like(low)
    for steps in range(15, 8, -1):
        candidate = np.maximum((high - low) / np.float32(steps), SMALLEST).astype(np.float16).astype(np.float32)
        q = np.clip(np.rint((groups - low) * (1 / candidate)), 0, 15)
        error = np.square(q * candidate + low - groups).sum(-1, keepdims=True)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, candidate, scale)
    q = np.clip(np.rint((groups - low) * (1 / scale)), 0, 15).astype(np.uint8)
    parts = [x.astype(np.float16).view(np.uint8) for x in (scale, low)]
    return np.concatenate((*parts, q[..., :16] | q[..., 16:] << 4), axis=-1).reshape(n, -1)


SMALLEST = np.float32(2.0**-24)  # that f16 can hold, but for zero
