"""Where keys and values lie. The paged cache decides which page; a storage holds and moves the numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from ..models.batch import PAGE_SIZE

__all__ = ["PAGE_SIZE", "KVStorage"]


class KVStorage(ABC):
    """Keys and values of `num_pages` pages of PAGE_SIZE tokens, for all layers.

    Only decoders read and write the numbers inside; only the paged cache calls `copy_pages` and `move`. A *slot* is
    `page * PAGE_SIZE + lane`. Both calls mutate in place, keep no reference to their arguments and raise nothing
    for slots in range.
    """

    num_pages: int
    bytes_per_page: int

    @abstractmethod
    def copy_pages(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        """Copy whole pages, `source[i]` to `target[i]`. The two sets are disjoint."""

    @abstractmethod
    def move(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        """Copy single slots, `source[i]` to `target[i]`, as if all were read before any is written."""
