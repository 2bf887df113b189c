"""The paged KV cache: which page holds which place of which sequence, and nothing else.

Paging after PagedAttention (Kwon et al., 2023, https://arxiv.org/abs/2309.06180); reserve / commit(path) /
rollback makes one step provisional, so that a draft tree costs nothing when it is rejected.

    place      0 ........ 15 | 16 ... length-1 | length ... length+n-1
    pages      page 7        | page 2 ...      |          page 5
                committed tokens               | provisional region (offsets 0..n-1)

Committed places are contiguous. A page may belong to several sequences after `fork`; only the one that holds
the place `length` is ever written, so only that one is copied, when a reservation first needs it. Numbers are
moved by the storage alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import CapacityError
from .storage import PAGE_SIZE, KVStorage

__all__ = ["PAGE_SIZE", "PagedKVCache"]

_CLOSED = -1
Path = Sequence[int] | NDArray[np.integer]


class _State:
    """One sequence. `table` and `slots` mirror `pages` as arrays, with room to grow."""

    __slots__ = ("length", "pages", "reserved", "slots", "table")

    def __init__(self, room: int) -> None:
        self.length = 0
        self.reserved = _CLOSED  # places of the open reservation
        self.pages: list[int] = []
        self.table = np.zeros(room, dtype=np.int32)  # [room]
        self.slots = np.zeros(room * PAGE_SIZE, dtype=np.int64)  # [room * PAGE_SIZE] slot of each place


class PagedKVCache:
    """Books the pages of one storage. Not thread-safe; the engine alone changes it.

    Sequence handles are whole numbers, never used twice. A handle that is unknown raises KeyError; calls out
    of order (commit without a reservation, fork or truncate with one open) are broken invariants:
    AssertionError. Arrays that are returned are views, valid until the next call that changes the same
    sequence.
    """

    def __init__(self, storage: KVStorage) -> None:
        n = storage.num_pages
        self.storage = storage
        self._free = list(range(n - 1, -1, -1))  # a stack: the page freed last is used first, still in cache
        self._references = [0] * n
        self._lanes = np.arange(n * PAGE_SIZE, dtype=np.int64).reshape(n, PAGE_SIZE)  # slots of each page
        self._sequences: dict[int, _State] = {}
        self._next = 0

    # -- a sequence's life ---------------------------------------------------------------------------------

    def new(self) -> int:
        """An empty sequence; takes no page."""
        seq, self._next = self._next, self._next + 1
        self._sequences[seq] = _State(8)
        return seq

    def fork(self, seq: int) -> int:
        """A new sequence with the same committed tokens. Pages are shared; the first to write copies."""
        s = self._sequences[seq]
        assert s.reserved == _CLOSED, f"sequence {seq} has an open reservation and cannot be forked"
        references = self._references
        for page in s.pages:
            references[page] += 1
        twin, self._next = self._next, self._next + 1
        t = self._sequences[twin] = _State(0)
        t.length, t.pages, t.table, t.slots = s.length, s.pages.copy(), s.table.copy(), s.slots.copy()
        return twin

    def free(self, seq: int) -> None:
        """Forget a sequence and what it had reserved."""
        s = self._sequences.pop(seq)
        self._release(s, 0)

    # -- one step ------------------------------------------------------------------------------------------

    def reserve(self, seq: int, n: int) -> NDArray[np.int64]:
        """Make the provisional region `n` places long; returns their slots [n].

        `n` is the whole region, not an increment: with a reservation open the region grows to `n` places and
        keeps what is written in them (a smaller `n` cuts its end). Copies a shared last page. Raises
        CapacityError when there are too few free pages; nothing is changed then.
        """
        assert n >= 0, f"cannot reserve {n} places"
        s = self._sequences[seq]
        length, pages, free = s.length, s.pages, self._free
        end = length + n
        have, want = len(pages), (end + PAGE_SIZE - 1) // PAGE_SIZE
        first = length // PAGE_SIZE
        shared = n > 0 and first < have and self._references[pages[first]] > 1
        if want > have or shared:
            missing = want - have + shared - len(free)
            if missing > 0:
                raise CapacityError(
                    f"the KV cache is full: {n} more tokens of a sequence of {length} need {missing} pages "
                    f"more than the {len(free)} that are free of {len(self._references)} ({PAGE_SIZE} tokens "
                    "each); use a larger cache, fewer sequences at once, or shorter ones"
                )
            if want * PAGE_SIZE > len(s.slots):
                _grow(s, want)
            if shared:
                self._unshare(s, first)
            for i in range(have, want):
                page = free.pop()
                self._references[page] = 1
                pages.append(page)
                s.table[i] = page
                s.slots[i * PAGE_SIZE : (i + 1) * PAGE_SIZE] = self._lanes[page]
        elif want < have:
            self._release(s, want)
        s.reserved = n
        return s.slots[length:end]

    def commit(self, seq: int, path: Path) -> None:
        """Keep the provisional offsets in `path` (strictly ascending, so ancestors first) as the next
        committed places, in that order; drop the rest and close the reservation. `range(k)` moves nothing.
        """
        s = self._sequences[seq]
        assert s.reserved != _CLOSED, f"sequence {seq} has no open reservation to commit"
        k = len(path)
        if k:
            assert path[-1] < s.reserved, f"offset {path[-1]} is outside the {s.reserved} reserved places"
            if not (isinstance(path, range) and path.step == 1 and path.start == 0):
                self._compact(s, path)
        s.length += k
        s.reserved = _CLOSED
        want = (s.length + PAGE_SIZE - 1) // PAGE_SIZE
        if want < len(s.pages):
            self._release(s, want)

    def rollback(self, seq: int) -> None:
        """Drop the open reservation, if there is one."""
        s = self._sequences[seq]
        s.reserved = _CLOSED
        self._release(s, (s.length + PAGE_SIZE - 1) // PAGE_SIZE)

    def truncate(self, seq: int, length: int) -> None:
        """Forget committed places from `length` on."""
        s = self._sequences[seq]
        assert s.reserved == _CLOSED, f"sequence {seq} has an open reservation and cannot be truncated"
        assert 0 <= length <= s.length, f"cannot truncate {s.length} places to {length}"
        s.length = length
        self._release(s, (length + PAGE_SIZE - 1) // PAGE_SIZE)

    def reopen(self, seq: int, n: int) -> None:
        """Make the last `n` committed places provisional again, with what is written in them. Their pages must not be
        shared: what a fork may read cannot be taken back.
        """
        s = self._sequences[seq]
        assert s.reserved == _CLOSED, f"sequence {seq} has an open reservation"
        assert 0 <= n <= s.length, f"cannot reopen {n} of {s.length} places"
        first = (s.length - n) // PAGE_SIZE
        assert all(self._references[page] == 1 for page in s.pages[first:]) or not n, f"sequence {seq} shares its end"
        s.length -= n
        s.reserved = n

    # -- questions -----------------------------------------------------------------------------------------

    def length(self, seq: int) -> int:
        """Committed tokens."""
        return self._sequences[seq].length

    def reserved(self, seq: int) -> int:
        """Places of the open reservation; 0 without one."""
        return max(self._sequences[seq].reserved, 0)

    def page_table(self, seq: int) -> NDArray[np.int32]:
        """Pages of the committed and provisional places, in order. [P]"""
        s = self._sequences[seq]
        return s.table[: len(s.pages)]

    def page_tables(self, seqs: Sequence[int]) -> NDArray[np.int32]:
        """Page tables of several sequences; rows of shorter ones end in zeros. [B, P]"""
        if len(seqs) == 1:
            return self.page_table(seqs[0])[None]
        tables = [self.page_table(seq) for seq in seqs]
        out = np.zeros((len(tables), max(map(len, tables), default=0)), dtype=np.int32)
        for row, table in zip(out, tables, strict=True):
            row[: len(table)] = table
        return out

    def pages_needed(self, seq: int, n: int) -> int:
        """Free pages that `reserve(seq, n)` would take."""
        s = self._sequences[seq]
        first, have = s.length // PAGE_SIZE, len(s.pages)
        shared = n > 0 and first < have and self._references[s.pages[first]] > 1
        return max((s.length + n + PAGE_SIZE - 1) // PAGE_SIZE - have, 0) + shared

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def bytes_used(self) -> int:
        """Bytes of the pages that hold something; a shared page counts once."""
        return (len(self._references) - len(self._free)) * self.storage.bytes_per_page

    @property
    def bytes_total(self) -> int:
        return len(self._references) * self.storage.bytes_per_page

    def check_integrity(self) -> None:
        """Count everything anew and compare; AssertionError on a difference. Linear in pages."""
        counted = [0] * len(self._references)
        for seq, s in self._sequences.items():
            places = s.length + max(s.reserved, 0)
            assert s.length >= 0 and s.reserved >= _CLOSED, f"sequence {seq}: {s.length}, {s.reserved}"
            want = (places + PAGE_SIZE - 1) // PAGE_SIZE
            assert len(s.pages) == want, f"sequence {seq}: {len(s.pages)} pages for {places} places"
            assert s.table[:want].tolist() == s.pages, f"sequence {seq}: its page table is stale"
            slots = self._lanes[s.pages].ravel() if s.pages else self._lanes[:0].ravel()
            assert np.array_equal(s.slots[: want * PAGE_SIZE], slots), f"sequence {seq}: its slots are stale"
            for page in s.pages:
                counted[page] += 1
            if s.reserved > 0:
                for page in s.pages[s.length // PAGE_SIZE :]:
                    assert self._references[page] == 1, f"sequence {seq}: provisional page {page} is shared"
        assert counted == self._references, "reference counts do not add up"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert set(self._free) == {p for p, c in enumerate(counted) if c == 0}, "a page is lost or in use and free"

    # -- inside --------------------------------------------------------------------------------------------

    def _release(self, s: _State, keep: int) -> None:
        """Give back the pages from index `keep` on."""
        pages, references = s.pages, self._references
        while len(pages) > keep:
            page = pages.pop()
            references[page] -= 1
            if not references[page]:
                self._free.append(page)

    def _unshare(self, s: _State, index: int) -> None:
        """Replace a shared page by an own copy."""
        old, page = s.pages[index], self._free.pop()
        self._references[old] -= 1
        self._references[page] = 1
        self.storage.copy_pages(np.array([old]), np.array([page]))
        s.pages[index] = page
        s.table[index] = page
        s.slots[index * PAGE_SIZE : (index + 1) * PAGE_SIZE] = self._lanes[page]

    def _compact(self, s: _State, path: Path) -> None:
        """Move the kept offsets together, to the front of the region."""
        offsets: Iterable[int] = path.tolist() if isinstance(path, np.ndarray) else path
        previous, fixed = -1, 0  # `fixed`: how many lie where they belong
        for i, offset in enumerate(offsets):
            assert offset > previous, f"a path must ascend strictly, not {list(path)}"
            previous = offset
            if offset == i:
                fixed = i + 1
        if fixed < len(path):
            region = s.slots[s.length :]
            self.storage.move(region[np.asarray(path[fixed:], dtype=np.int64)], region[fixed : len(path)])


def _grow(s: _State, pages: int) -> None:
    """Room for at least `pages` pages, doubled so that growing stays cheap."""
    room = max(pages, 2 * len(s.table))
    table, slots = np.zeros(room, dtype=np.int32), np.zeros(room * PAGE_SIZE, dtype=np.int64)
    table[: len(s.table)], slots[: len(s.slots)] = s.table, s.slots
    s.table, s.slots = table, slots
