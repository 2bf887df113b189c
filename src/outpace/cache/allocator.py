"""Which pages are free, and how many hold each of the others. Counts alone: no sequences, no numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class PageAllocator:
    """Counts the holders of each page: sequences in the cache, and whoever retains pages for later (the prefix tree,
    sequences that are out of the cache). A page without holders is free; one that is only retained is idle.
    """

    def __init__(self, num_pages: int) -> None:
        self.free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is used first, still in cache
        self.references = [0] * num_pages  # of sequences, and those retained
        self.retained = [0] * num_pages  # of these
        self.idle = 0  # pages without a sequence
        self.left: set[int] = set()  # retained pages that came down to one holder, until the reclaimer takes them out
        #: How often committed places of a page became free to be written anew. [num_pages]
        self.generations = np.zeros(num_pages, dtype=np.int64)

    def take(self) -> int:
        """A free page, for one sequence."""
        page = self.free.pop()
        self.references[page] = 1
        self.generations[page] += 1
        return page

    def use(self, page: int) -> None:
        """One more sequence uses a page that somebody holds."""
        assert self.references[page] > 0, f"page {page} is free"
        self.idle -= self.is_idle(page)
        self.references[page] += 1

    def leave(self, page: int) -> None:
        """One sequence less uses a page."""
        self.references[page] -= 1
        if not self.references[page]:
            self.free.append(page)
        elif self.is_idle(page):
            self.idle += 1
            self._left(page)

    def retain(self, page: int) -> None:
        """Hold a page that somebody holds, for later."""
        assert self.references[page] > 0, f"page {page} is free"
        self.references[page] += 1
        self.retained[page] += 1

    def drop(self, page: int) -> None:
        """Give one `retain` back."""
        assert self.retained[page] > 0, f"page {page} is not retained"
        if self.references[page] == 1:  # the last holder is this one
            self.idle -= 1
            self.free.append(page)
        self.references[page] -= 1
        self.retained[page] -= 1
        self._left(page)

    def _left(self, page: int) -> None:
        if self.references[page] == self.retained[page] == 1:
            self.left.add(page)

    def is_idle(self, page: int) -> bool:
        """Held, but by no sequence."""
        return 0 < self.retained[page] == self.references[page]

    def is_shared(self, page: int) -> bool:
        """Held more than once."""
        return self.references[page] > 1

    def sequences(self, page: int) -> int:
        """How many sequences use a page."""
        return self.references[page] - self.retained[page]

    @property
    def available(self) -> int:
        """Pages that are free or idle."""
        return len(self.free) + self.idle

    def check_integrity(self, used: Sequence[int]) -> None:
        """Compare with how many sequences use each page; AssertionError on a difference. Linear in pages."""
        counted = [n + r for n, r in zip(used, self.retained, strict=True)]
        assert counted == self.references, "reference counts do not add up"
        idle = sum(map(self.is_idle, range(len(counted))))
        assert idle == self.idle, f"{idle} pages are idle, not {self.idle}"
        assert len(set(self.free)) == len(self.free), "a page is free twice"
        assert set(self.free) == {p for p, c in enumerate(counted) if c == 0}, "a page is lost or in use and free"
