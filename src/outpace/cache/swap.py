"""Sequences outside the cache: their pages in ordinary memory, until they are wanted again.

After FastSwitch (Shen et al., 2024, https://arxiv.org/abs/2411.18424), sections 3.1 and 3.3: the pages of a sequence
leave in one gather and return in one scatter, and what was copied out once is kept, so that leaving again copies only
what is new. Pages that the prefix tree or a fork also holds stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .storage import KVStorage, PageBlob

AWAY = -1  # in place of a page that is not in the cache


@dataclass(slots=True, eq=False)
class HostPages:
    """Copies of pages of one sequence, by their index in it."""

    copies: list[tuple[PageBlob, list[int]]] = field(default_factory=list)  # indices ascend within each

    @property
    def indices(self) -> set[int]:
        return {i for _, indices in self.copies for i in indices}

    def read(self, storage: KVStorage, pages: list[int], indices: list[int]) -> None:
        """Copy `pages[i]` for each of the indices without a copy; one copy for all of them."""
        known = self.indices
        new = [i for i in indices if i not in known]
        if new:
            self.copies.append((storage.read_pages(np.array([pages[i] for i in new], dtype=np.int64)), new))

    def write(self, storage: KVStorage, pages: dict[int, int]) -> None:
        """Put the copies of some indices into pages; one copy for each time that pages were read."""
        for blob, indices in self.copies:
            rows = [row for row, i in enumerate(indices) if i in pages]
            if rows:
                part = blob if len(rows) == blob[0].shape[1] else tuple(array[:, rows] for array in blob)
                storage.write_pages(part, np.array([pages[indices[row]] for row in rows], dtype=np.int64))

    def keep(self, pages: int) -> None:
        """Forget the copies from index `pages` on: what they held may change. Memory is freed by whole copies."""
        kept = [(blob, [i for i in indices if i < pages]) for blob, indices in self.copies]
        self.copies = [(blob, indices) for blob, indices in kept if indices]


@dataclass(slots=True, eq=False)
class Swapped:
    """A sequence that is out of the cache: `length` committed places; of each page its number, or AWAY."""

    length: int
    pages: list[int]
    host: HostPages

    @property
    def held(self) -> list[int]:
        """Pages of the cache that it still refers to."""
        return [page for page in self.pages if page != AWAY]

    @property
    def away(self) -> list[int]:
        """Indices of the pages that are only here."""
        return [i for i, page in enumerate(self.pages) if page == AWAY]
