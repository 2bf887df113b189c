"""What a step reads beside weights, keys and values, in arrays that stay from step to step: the kernel is told their
addresses when they grow, not in every step.

Shapes: `T` packed rows, `C` head width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .packed import padded

_ROPE_CHUNK = 4096
_LEAST = 64  # elements of an array


class Rope:
    """Cosines and sines of positions, grown as positions come up. float32, as `transformers` computes them. Decoders
    that share weights share it."""

    def __init__(self, inv_freq: NDArray[np.float64]) -> None:
        self._inv_freq = inv_freq.astype(np.float32)
        self._tables = self._computed(0)

    def tables(self, top: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines of the positions up to `top` at least. [>top, C/2] each"""
        found = self._tables
        if top >= len(found[0]):
            found = self._tables = self._computed(padded(top + 1, _ROPE_CHUNK))
        return found

    def _computed(self, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        angles = np.arange(positions, dtype=np.float32)[:, None] * self._inv_freq
        return np.cos(angles), np.sin(angles)


class Inputs:
    """The arrays of one decoder's steps; `control` is its control block, whose entries are their addresses."""

    def __init__(self, control: NDArray[np.int64]) -> None:
        self._control = control
        self._held: dict[int, NDArray[Any]] = {}

    def put(self, entry: int, values: NDArray[Any], dtype: type) -> None:
        """Copy an array, in row-major order, to where `entry` points."""
        size = values.size
        self._room(entry, size, dtype)[:size] = values if values.ndim == 1 else values.reshape(-1)

    def put_rows(self, entry: int, table: NDArray[np.float32], rows: NDArray[np.integer]) -> None:
        """Copy these rows of a table, all of which it has."""
        width = table.shape[1]
        room = self._room(entry, len(rows) * width, np.float32)[: len(rows) * width]
        table.take(rows, axis=0, out=room.reshape(len(rows), width), mode="clip")  # "raise" would copy twice

    def _room(self, entry: int, size: int, dtype: type) -> NDArray[Any]:
        held = self._held.get(entry)
        if held is None or len(held) < size:
            held = self._held[entry] = np.zeros(max(_LEAST, 2 * size), dtype=dtype)
            self._control[entry] = held.ctypes.data
        return held
