"""Where an array lies in memory."""

from __future__ import annotations

from ctypes import addressof, c_char
from typing import Any

from numpy.typing import NDArray

_view = c_char.from_buffer


def address(array: NDArray[Any]) -> int:
    """`array.ctypes.data` of an array without gaps in a quarter of its time, which counts where a step needs many."""
    try:
        return addressof(_view(array))
    except (TypeError, ValueError):  # it may not be written to, or has no elements
        return array.ctypes.data
