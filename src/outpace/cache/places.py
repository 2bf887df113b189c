"""The places of one sequence: which page holds each, as a list to book with and as arrays for the kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..models.batch import Ragged
from .segments import Segment
from .storage import PAGE_SIZE
from .swap import HostPages

Path = Sequence[int] | NDArray[np.integer]  # offsets in the provisional places

CLOSED = -1  # instead of the places of a reservation
_OFFSETS = np.arange(PAGE_SIZE, dtype=np.int64)  # of the slots of a page


def pages_for(places: int) -> int:
    """Pages that so many places take."""
    return (places + PAGE_SIZE - 1) // PAGE_SIZE


def _slots(pages: Sequence[int]) -> NDArray[np.int64]:
    """Slots of all places of these pages. [len(pages) * PAGE_SIZE]"""
    return (np.array(pages, dtype=np.int64)[:, None] * PAGE_SIZE + _OFFSETS).ravel()


class Places:
    """Committed places and, behind them, those of the open reservation. `table` and `slots` mirror `pages`."""

    __slots__ = ("changed", "host", "length", "pages", "ragged", "reserved", "segment", "slots", "table")

    def __init__(self) -> None:
        self.length = 0  # committed, behind the segment
        self.segment: Segment | None = None  # what is kept of the tokens before
        self.ragged: tuple[list[int], Ragged] | None = None  # what the kernels are told of it, for these pages
        self.reserved = CLOSED  # provisional; 0 is an open reservation too
        self.host: HostPages | None = None  # copies of complete pages, since it was out of the cache
        self.pages: list[int] = []
        self.changed = True  # `pages`, since they were last looked at together with those of others
        self.table = np.zeros(8, dtype=np.int32)  # [capacity], grows
        self.slots = np.zeros(8 * PAGE_SIZE, dtype=np.int64)  # [capacity * PAGE_SIZE] slot of each place

    def twin(self) -> Places:
        """Another sequence with the same committed places."""
        twin = Places()
        twin.length, twin.pages = self.length, self.pages.copy()
        twin.table, twin.slots = self.table.copy(), self.slots.copy()
        twin.segment = self.segment
        if self.segment is not None:
            self.segment.holders += 1
        return twin

    @property
    def before(self) -> int:
        """Tokens that the segment stands for."""
        return 0 if self.segment is None else self.segment.tokens

    def drop_first(self, count: int) -> list[int]:
        """Take the first pages away, all of whose places are committed; returns them."""
        dropped, pages = self.pages[:count], self.pages[count:]
        self.pages, self.length = [], self.length - count * PAGE_SIZE
        self.extend(pages)
        return dropped

    def extend(self, pages: Sequence[int]) -> None:
        """More pages at the end."""
        self.changed = True
        first, last = len(self.pages), len(self.pages) + len(pages)
        if last > len(self.table):
            self._grow(last)
        self.pages.extend(pages)
        self.table[first:last] = pages
        self.slots[first * PAGE_SIZE : last * PAGE_SIZE] = _slots(pages)

    def replace(self, index: int, page: int) -> None:
        """Another page in place of the one at `index`."""
        self.pages[index] = self.table[index] = page
        self.changed = True
        self.slots[index * PAGE_SIZE : (index + 1) * PAGE_SIZE] = page * PAGE_SIZE + _OFFSETS

    def shorten(self, length: int) -> None:
        """Committed places from `length` on may change from here on: they are no longer what was copied out."""
        self.length = length
        if self.host is not None:
            self.host.keep(length // PAGE_SIZE)

    def gather(self, path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What brings the provisional offsets of `path`, which must ascend, to the front: from which slots to which."""
        offsets: Iterable[int] = path.tolist() if isinstance(path, np.ndarray) else path
        previous, fixed = -1, 0  # `fixed`: how many lie where they belong
        for i, offset in enumerate(offsets):
            assert offset > previous, f"a path must ascend strictly, not {list(path)}"
            previous = offset
            if offset == i:
                fixed = i + 1
        region = self.slots[self.length :]
        return region[np.asarray(path[fixed:], dtype=np.int64)], region[fixed : len(path)]

    def check_integrity(self) -> None:
        """AssertionError if the arrays are not what the pages say, or the pages not what the places need."""
        assert self.length >= 0 and self.reserved >= CLOSED, f"{self.length} places, {self.reserved} reserved"
        places = self.length + max(self.reserved, 0)
        want = pages_for(places)
        assert len(self.pages) == want, f"{len(self.pages)} pages for {places} places"
        assert self.table[:want].tolist() == self.pages, f"the page table of pages {self.pages} is stale"
        assert np.array_equal(self.slots[: want * PAGE_SIZE], _slots(self.pages)), f"slots of {self.pages} are stale"

    def _grow(self, pages: int) -> None:
        """Capacity for at least so many pages, doubled so that growing stays cheap."""
        capacity = max(pages, 2 * len(self.table))
        table, slots = np.zeros(capacity, dtype=np.int32), np.zeros(capacity * PAGE_SIZE, dtype=np.int64)
        table[: len(self.table)], slots[: len(self.slots)] = self.table, self.slots
        self.table, self.slots = table, slots
