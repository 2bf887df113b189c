"""Where keys and values lie. The paged cache decides which page; a storage holds and moves the numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.batch import PAGE_SIZE

__all__ = ["PAGE_SIZE", "KVStorage", "PageBlob"]

#: Contents of P pages in the host's memory: arrays [L, P, ...] of the storage's own layout.
PageBlob = tuple[Any, ...]


class KVStorage(ABC):
    """Keys and values of `num_pages` pages of PAGE_SIZE tokens, for all layers.

    Only decoders read and write the numbers inside; only the paged cache calls the methods below. A *slot* is
    `page * PAGE_SIZE + lane`. They mutate in place, keep no reference to their arguments and raise nothing for pages
    and slots in range.
    """

    num_pages: int
    bytes_per_page: int
    #: Layers times heads, where a page can be split into head pages (cache.segments); 0 where it cannot
    heads_per_page: int = 0

    @abstractmethod
    def copy_pages(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        """Copy whole pages, `source[i]` to `target[i]`. The two sets are disjoint."""

    @abstractmethod
    def move(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        """Copy single slots, `source[i]` to `target[i]`, as if all were read before any is written."""

    @abstractmethod
    def read_pages(self, pages: NDArray[np.int64]) -> PageBlob:
        """A copy of whole pages in the host's memory."""

    @abstractmethod
    def write_pages(self, blob: PageBlob, pages: NDArray[np.int64]) -> None:
        """Put what `read_pages` gave into as many pages, which may be others. Pages differ from each other."""
