"""The paged KV cache: which page holds which place of which sequence, and nothing else.

Paging after PagedAttention (Kwon et al., 2023, https://arxiv.org/abs/2309.06180); reserve / commit(path) /
rollback makes one step provisional, so that a draft tree costs nothing when it is rejected.

    place      0 ........ 15 | 16 ... length-1 | length ... length+n-1
    pages      page 7        | page 2 ...      |          page 5
                committed tokens               | provisional region (offsets 0..n-1)

Committed places are contiguous. A page may belong to several sequences after `fork` or `adopt`, and to the prefix tree
(`prefix.py`) or to swapped-out sequences (`swap.py`); only the one that holds the place `length` is ever written, so
only that one is copied, when a reservation first needs it. Numbers are moved by the storage alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import CapacityError
from .storage import PAGE_SIZE, KVStorage
from .swap import AWAY, HostPages, Swapped

__all__ = ["PAGE_SIZE", "PagedKVCache", "Reclaimer"]

_CLOSED = -1
Path = Sequence[int] | NDArray[np.integer]


class Reclaimer(Protocol):
    """Who retains pages that no sequence uses, until they are needed: the prefix tree."""

    def evict(self, pages: int) -> int:
        """Drop so many pages that only it holds, or all there are; returns how many are free now."""

    def surrender(self, page: int) -> None:
        """Drop this page: the sequence that uses it too goes on to write it."""


class _State:
    """One sequence. `table` and `slots` mirror `pages` as arrays, with room to grow."""

    __slots__ = ("host", "length", "pages", "reserved", "slots", "table")

    def __init__(self, room: int) -> None:
        self.length = 0
        self.host: HostPages | None = None  # copies of complete pages, since it was out of the cache
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
        self._references = [0] * n  # of sequences, and those retained
        self._retained = [0] * n  # of these, by the reclaimer and by swapped-out sequences
        #: How often committed places of a page became free to be written anew. [num_pages]
        self.generations = np.zeros(n, dtype=np.int64)
        self._idle = 0  # pages with no other references than those
        self._swapped: list[Swapped] = []
        self.reclaimer: Reclaimer | None = None
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
        for page in s.pages:
            self._use(page)
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
        keeps what is written in them (a smaller `n` cuts its end). Copies a shared last page. When free pages do
        not suffice, pages that no sequence uses are reclaimed; raises CapacityError when these do not either, and
        nothing is changed then.
        """
        assert n >= 0, f"cannot reserve {n} places"
        s = self._sequences[seq]
        length, pages = s.length, s.pages
        end = length + n
        have, want = len(pages), (end + PAGE_SIZE - 1) // PAGE_SIZE
        first = length // PAGE_SIZE
        writes = n > 0 and first < have
        if want > have or (writes and self._references[pages[first]] > 1):
            self._make_room(s, n)
            if want * PAGE_SIZE > len(s.slots):
                _grow(s, want)
            if writes and self._references[pages[first]] > 1:
                self._unshare(s, first)
            for i in range(have, want):
                page = self._take()
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
        self.generations[s.pages[length // PAGE_SIZE :]] += 1
        if s.host is not None:
            s.host.keep(length // PAGE_SIZE)
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
        self.generations[s.pages[s.length // PAGE_SIZE :]] += 1
        if s.host is not None:
            s.host.keep(s.length // PAGE_SIZE)

    # -- pages that outlive their sequence -----------------------------------------------------------------

    def share(self, seq: int, length: int) -> list[int]:
        """Pages of the first `length` committed places. The last may be partly used, but not while a reservation is
        open, whose places it would hold too.
        """
        s = self._sequences[seq]
        assert 0 <= length <= s.length, f"cannot share {length} of {s.length} places"
        assert not (length % PAGE_SIZE and s.reserved > 0), f"sequence {seq} has provisional places in its last page"
        return s.pages[: (length + PAGE_SIZE - 1) // PAGE_SIZE]

    def adopt(self, seq: int, pages: Sequence[int], length: int) -> None:
        """Let the empty sequence `seq` begin with these pages, which somebody holds, and `length` committed places."""
        s = self._sequences[seq]
        assert not s.pages and s.reserved == _CLOSED, f"sequence {seq} is not empty"
        assert len(pages) == (length + PAGE_SIZE - 1) // PAGE_SIZE, f"{len(pages)} pages for {length} places"
        for page in pages:
            self._use(page)
        self._fill(s, list(pages), length)

    def retain(self, pages: Iterable[int]) -> None:
        """Hold pages of sequences for the reclaimer, one reference each."""
        assert self.reclaimer is not None, "pages that nobody gives back cannot be retained"
        for page in pages:
            self._retain(page)

    def drop(self, pages: Iterable[int]) -> None:
        """Give references of `retain` back; pages without any other are free."""
        for page in pages:
            self._drop(page)

    def swap_out(self, seq: int) -> Swapped:
        """Take a sequence out of the cache; its handle ends. Only pages that nobody shares leave, and of these only
        what earlier calls have not copied; the others stay, until their place is needed.
        """
        s = self._sequences[seq]
        assert s.reserved == _CLOSED, f"sequence {seq} has an open reservation and cannot be swapped out"
        references, host = self._references, s.host if s.host is not None else HostPages()
        leaving = [i for i, page in enumerate(s.pages) if references[page] == 1]
        known = host.indices
        host.read(self.storage, s.pages, [i for i in leaving if i not in known])
        for page in s.pages:
            if references[page] > 1:
                self._retain(page)
        swapped = Swapped(s.length, s.pages.copy(), host)
        for i in leaving:
            swapped.pages[i] = AWAY
        self._swapped.append(swapped)
        self.free(seq)
        return swapped

    def swap_in(self, swapped: Swapped) -> int:
        """Bring a sequence back, under a new handle. Raises CapacityError, and changes nothing, without room."""
        needed = self.swap_in_pages(swapped)
        if needed > self.available_pages:
            raise CapacityError(
                f"the KV cache is full: a sequence of {swapped.length} tokens needs {needed} pages to return and "
                f"{self.available_pages} are free of {len(self._references)}; end others first"
            )
        self._swapped.remove(swapped)
        for page in swapped.held:
            self._use(page)
            self._drop(page)
        away = swapped.away
        self._reclaim(len(away) - len(self._free))
        pages = swapped.pages.copy()
        for i in away:
            pages[i] = self._take()
        swapped.host.write(self.storage, {i: pages[i] for i in away})
        swapped.host.keep(swapped.length // PAGE_SIZE)  # the last page will be written
        seq = self.new()
        s = self._sequences[seq]
        s.host = swapped.host
        self._fill(s, pages, swapped.length)
        return seq

    def discard(self, swapped: Swapped) -> None:
        """Forget a sequence that is out of the cache."""
        self._swapped.remove(swapped)
        self.drop(swapped.held)

    def swap_in_pages(self, swapped: Swapped) -> int:
        """How many fewer pages are available once it is back."""
        return len(swapped.away) + sum(self.is_idle(page) for page in swapped.held)

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
        """Free or reclaimed pages that `reserve(seq, n)` would take."""
        return self._need(self._sequences[seq], n)[0]

    def pages_held(self, seq: int) -> int:
        """Pages that would be available if this sequence ended."""
        return sum(self._references[p] - self._retained[p] == 1 for p in self._sequences[seq].pages)

    def references(self, page: int) -> int:
        """Who holds a page: sequences, the reclaimer, swapped-out sequences."""
        return self._references[page]

    def is_idle(self, page: int) -> bool:
        """Held, but by no sequence in the cache."""
        return 0 < self._retained[page] == self._references[page]

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def available_pages(self) -> int:
        """Free, or used by no sequence, so that `reserve` may reclaim them."""
        return len(self._free) + self._idle

    @property
    def pages_in_use(self) -> int:
        """Pages of sequences in the cache; not those that are only kept for later."""
        return len(self._references) - self.available_pages

    @property
    def bytes_used(self) -> int:
        """Bytes of the pages that hold something; a shared page counts once."""
        return (len(self._references) - len(self._free)) * self.storage.bytes_per_page

    @property
    def bytes_total(self) -> int:
        return len(self._references) * self.storage.bytes_per_page

    def check_integrity(self) -> None:
        """Count everything anew and compare; AssertionError on a difference. Linear in pages."""
        counted, retained = self._retained.copy(), self._retained
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
        for swapped in self._swapped:
            assert len(swapped.pages) == (swapped.length + PAGE_SIZE - 1) // PAGE_SIZE, "a swapped page is lost"
            assert set(swapped.away) <= swapped.host.indices, "a page is neither here nor there"
            assert all(retained[page] for page in swapped.held), "a swapped-out sequence has lost a page"
        assert counted == self._references, "reference counts do not add up"
        idle = sum(r > 0 and r == n for r, n in zip(retained, self._references, strict=True))
        assert idle == self._idle, f"{idle} pages are idle, not {self._idle}"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert set(self._free) == {p for p, c in enumerate(counted) if c == 0}, "a page is lost or in use and free"

    # -- inside --------------------------------------------------------------------------------------------

    def _use(self, page: int) -> None:
        """One more sequence uses a page that somebody holds."""
        assert self._references[page] > 0, f"page {page} is free"
        self._idle -= self.is_idle(page)
        self._references[page] += 1

    def _take(self) -> int:
        """A free page, for one sequence."""
        page = self._free.pop()
        self._references[page] = 1
        self.generations[page] += 1
        return page

    def _leave(self, page: int) -> None:
        """One sequence less uses a page."""
        self._references[page] -= 1
        if not self._references[page]:
            self._free.append(page)
        elif self.is_idle(page):
            self._idle += 1

    def _retain(self, page: int) -> None:
        assert self._references[page] > 0, f"page {page} is free"
        self._references[page] += 1
        self._retained[page] += 1

    def _drop(self, page: int) -> None:
        assert self._retained[page] > 0, f"page {page} is not retained"
        if self._references[page] == 1:  # the last holder is this one
            self._idle -= 1
            self._free.append(page)
        self._references[page] -= 1
        self._retained[page] -= 1

    def _release(self, s: _State, keep: int) -> None:
        """Give back the pages from index `keep` on."""
        while len(s.pages) > keep:
            self._leave(s.pages.pop())

    def _fill(self, s: _State, pages: list[int], length: int) -> None:
        """Make these the pages of an empty sequence."""
        if len(pages) > len(s.table):
            _grow(s, len(pages))
        s.pages, s.length = pages, length
        s.table[: len(pages)] = pages
        s.slots[: len(pages) * PAGE_SIZE] = self._lanes[pages].ravel()

    def _need(self, s: _State, n: int) -> tuple[int, bool]:
        """Pages that reserving `n` places takes, and whether the shared last one is then taken over, not copied: where
        only the reclaimer shares it and there is no page for a copy."""
        first, have = s.length // PAGE_SIZE, len(s.pages)
        more = max((s.length + n + PAGE_SIZE - 1) // PAGE_SIZE - have, 0)
        if n == 0 or first >= have or self._references[s.pages[first]] == 1:
            return more, False
        page = s.pages[first]
        if self._references[page] == self._retained[page] + 1 and more + 1 > self.available_pages:
            return more, True
        return more + 1, False

    def _make_room(self, s: _State, n: int) -> None:
        """See to it that as many pages are free as reserving `n` places takes."""
        need, take_over = self._need(s, n)
        if need > self.available_pages:
            raise CapacityError(
                f"the KV cache is full: {n} more tokens of a sequence of {s.length} need "
                f"{need - self.available_pages} pages more than the {self.available_pages} that are free of "
                f"{len(self._references)} ({PAGE_SIZE} tokens each); use a larger cache, fewer sequences at once, or "
                "shorter ones"
            )
        if take_over:
            page = s.pages[s.length // PAGE_SIZE]
            self.generations[page] += 1
            for swapped in self._swapped:
                if page in swapped.pages:
                    self._spill(swapped)
            if self._references[page] > 1 and self.reclaimer is not None:
                self.reclaimer.surrender(page)
        self._reclaim(need - len(self._free))

    def _reclaim(self, pages: int) -> None:
        """Free so many pages of those that are idle. The reclaimer's go first; what sequences outside the cache have
        kept in it follows them out when it must."""
        if pages <= 0:
            return
        freed = self.reclaimer.evict(pages) if self.reclaimer is not None else 0
        for swapped in self._swapped:
            if freed >= pages:
                return
            before = len(self._free)
            self._spill(swapped)
            freed += len(self._free) - before
            if freed < pages and self.reclaimer is not None:
                freed += self.reclaimer.evict(pages - freed)
        assert freed >= pages, f"{pages - freed} idle pages could not be reclaimed"

    def _spill(self, swapped: Swapped) -> None:
        """Copy out what a swapped-out sequence still holds in the cache."""
        here = [i for i, page in enumerate(swapped.pages) if page != AWAY]
        known = swapped.host.indices
        swapped.host.read(self.storage, swapped.pages, [i for i in here if i not in known])
        for i in here:
            self._drop(swapped.pages[i])
            swapped.pages[i] = AWAY

    def _unshare(self, s: _State, index: int) -> None:
        """Replace a shared page by an own copy."""
        old, page = s.pages[index], self._take()
        self.storage.copy_pages(np.array([old]), np.array([page]))
        self._leave(old)
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
