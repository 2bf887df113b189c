"""What a sequence keeps of the beginning of its text when each layer and head keeps other places: a segment.

A page holds PAGE_SIZE places of all layers and heads. To keep less than that, pages are split into *head pages*, which
hold PAGE_SIZE places of one layer and head, wherever in the storage they lie. A segment has so many of them in each
layer and head as its policy says; what is not kept is free, for pages of others and for other segments.

Segments are never written after they are made. Forks share them; `holders` counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..errors import ParameterError
from .storage import PAGE_SIZE

#: By layer and head: ascending numbers of the places to keep, a multiple of PAGE_SIZE of them
Kept = Sequence[Sequence[NDArray[np.int64]]]


@dataclass(slots=True, eq=False)
class Segment:
    """`pages[l][h]`: its head pages; `positions[l][h]`: of the kept places, in the text; `tokens` of the text that it
    stands for."""

    tokens: int
    pages: list[list[NDArray[np.int32]]]
    positions: list[list[NDArray[np.int32]]]
    holders: int = 1
    before: NDArray[np.int32] = field(init=False)  # places of each layer and head, i32[L, Hkv]

    def __post_init__(self) -> None:
        counts = [[PAGE_SIZE * len(pages) for pages in row] for row in self.pages]
        self.before = np.array(counts, dtype=np.int32)

    @property
    def head_pages(self) -> int:
        return int(self.before.sum()) // PAGE_SIZE

    def numbers(self) -> list[int]:
        """Of all its head pages."""
        return [number for row in self.pages for pages in row for number in pages.tolist()]

    def table(self, own: NDArray[np.int64]) -> NDArray[np.int32]:
        """Its head pages, and behind them those of the sequence's own pages. i64[L, Hkv, n] -> i32[L, Hkv, P]"""
        layers, heads, count = own.shape
        table = np.zeros((layers, heads, int(self.before.max()) // PAGE_SIZE + count), dtype=np.int32)
        for layer in range(layers):
            for head, pages in enumerate(self.pages[layer]):
                table[layer, head, : len(pages)] = pages
                table[layer, head, len(pages) : len(pages) + count] = own[layer, head]
        return table


class HeadPages:
    """Splits pages into head pages and puts them together again: a page is given back when all of its are free."""

    def __init__(self, per_page: int) -> None:
        self.per_page = per_page  # layers times heads
        self._free: list[int] = []  # numbers of head pages, last used first
        self._page_of: dict[int, int] = {}  # of each head page of a split page
        self._used: dict[int, int] = {}  # by split page, how many of it are taken

    def __bool__(self) -> bool:
        """Whether any page is split."""
        return bool(self._used)

    def pages_needed(self, count: int) -> int:
        """Whole pages that taking so many head pages splits."""
        missing = count - len(self._free)
        return -(-missing // self.per_page) if missing > 0 else 0

    def split(self, page: int, numbers: NDArray[np.int64]) -> None:
        """Take a whole page apart; `numbers` of its head pages."""
        self._used[page] = 0
        for number in numbers.ravel().tolist():
            self._page_of[number] = page
            self._free.append(number)

    def take(self, count: int) -> list[int]:
        """So many free head pages, which there are. Those of pages in use come first, so that others become whole."""
        self._free.sort(key=lambda number: self._used[self._page_of[number]])
        taken = [self._free.pop() for _ in range(count)]
        for number in taken:
            self._used[self._page_of[number]] += 1
        return taken

    def give(self, numbers: Sequence[int]) -> list[int]:
        """Give head pages back. Returns pages that are whole again, and no longer split."""
        for number in numbers:
            self._used[self._page_of[number]] -= 1
        self._free.extend(numbers)
        whole = {page for page, used in self._used.items() if not used}
        for number in [number for number in self._free if self._page_of[number] in whole]:
            del self._page_of[number]
        self._free = [number for number in self._free if number in self._page_of]
        for page in whole:
            del self._used[page]
        return sorted(whole)

    @property
    def split_pages(self) -> list[int]:
        return list(self._used)

    def check_integrity(self, taken: Sequence[int]) -> None:
        """`taken`: head pages of all segments. AssertionError on a difference."""
        assert len(set(taken)) == len(taken), "a head page is in two segments"
        assert set(taken) | set(self._free) == set(self._page_of), "a head page is lost"
        assert not set(taken) & set(self._free), "a head page is taken and free"
        counted = dict.fromkeys(self._used, 0)
        for number in taken:
            counted[self._page_of[number]] += 1
        assert counted == self._used and all(counted.values()), "a page without segments is split"


def checked(kept: Kept, places: NDArray[np.int32]) -> Kept:
    """`places` i32[L, Hkv] that there are. Raises ParameterError for numbers that are not ascending, out of range, or
    no multiple of PAGE_SIZE."""
    for layer, row in enumerate(kept):
        for head, numbers in enumerate(row):
            most = int(places[layer, head])
            wrong = len(numbers) % PAGE_SIZE or (np.diff(numbers) <= 0).any()
            if wrong or (len(numbers) and not 0 <= numbers[0] <= numbers[-1] < most):
                raise ParameterError(
                    f"layer {layer}, head {head}: a multiple of {PAGE_SIZE} ascending places below {most} are kept, "
                    f"not {len(numbers)} of {numbers[:3]} … {numbers[-3:]}"
                )
    return kept
