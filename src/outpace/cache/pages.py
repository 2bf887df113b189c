"""The paged KV cache: which page holds which position of which sequence.

Paging after PagedAttention (Kwon et al., 2023, https://arxiv.org/abs/2309.06180); reserve / commit(path) /
rollback makes one step provisional, so that a draft tree costs nothing when it is rejected.

    place      0 ........ 15 | 16 ... length-1 | length ... length+n-1
    pages      page 7        | page 2 ...      |          page 5
                committed tokens               | provisional region (offsets 0..n-1)

Committed places are contiguous. A page may belong to several sequences after `fork` or `adopt`, and to the prefix tree
(`prefix.py`) or to swapped-out sequences (`swap.py`); only the one that holds the place `length` is ever written, so
only that one is copied, when a reservation first needs it. The holders of a page are counted in `allocator.py`, the
places of one sequence are in `places.py`, and numbers are moved by the storage alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import CapacityError
from ..models.batch import Ragged
from .allocator import PageAllocator
from .compaction import compact, places_of, ragged, release_segment, splits
from .places import CLOSED, Path, Places, pages_for
from .segments import HeadPages, Kept
from .storage import PAGE_SIZE, KVStorage
from .swap import AWAY, HostPages, Swapped

__all__ = ["PAGE_SIZE", "PagedKVCache", "Reclaimer"]


class Reclaimer(Protocol):
    """Retains pages that no sequence uses, until they are needed: the prefix tree."""

    def evict(self, pages: int) -> int:
        """Drop so many pages that only it holds, or all there are; returns how many are free now."""

    def surrender(self, page: int) -> None:
        """Drop this page: the sequence that uses it too goes on to write it."""


class PagedKVCache:
    """Keeps track of the pages of one storage. Not thread-safe; the engine alone changes it.

    Sequence handles are whole numbers, never used twice. A handle that is unknown raises KeyError; calls out
    of order (commit without a reservation, fork or truncate with one open) are broken invariants:
    AssertionError. Arrays that are returned are views, valid until the next call that changes the same
    sequence.
    """

    def __init__(self, storage: KVStorage) -> None:
        self.storage = storage
        self._pages = PageAllocator(storage.num_pages)
        self._sequences: dict[int, Places] = {}
        self._swapped: list[Swapped] = []
        self._heads = HeadPages(storage.heads_per_page)
        self._next = 0
        self._tables = np.zeros((0, 0), dtype=np.int32)  # those last asked for, with room for longer ones
        self._tables_of: list[int] = []
        self.reclaimer: Reclaimer | None = None

    # -- a sequence's life ---------------------------------------------------------------------------------

    def new(self) -> int:
        """An empty sequence; takes no page."""
        return self._add(Places())

    def fork(self, seq: int) -> int:
        """A new sequence with the same committed tokens. Pages are shared; the first to write copies."""
        s = self._sequences[seq]
        assert s.reserved == CLOSED, f"sequence {seq} has an open reservation and cannot be forked"
        for page in s.pages:
            self._pages.use(page)
        return self._add(s.twin())

    def free(self, seq: int) -> None:
        """Forget a sequence and what it had reserved."""
        s = self._sequences.pop(seq)
        self._release(s, 0)
        if s.segment is not None:
            release_segment(s.segment, self._heads, self._pages)

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
        have, want = len(pages), pages_for(end)
        first = length // PAGE_SIZE
        shared = n > 0 and first < have and self._pages.references[pages[first]] > 1
        if want > have or shared:
            self._make_room(s, n)
            if shared and self._pages.is_shared(pages[first]):  # the reclaimer may have let go of it
                self._unshare(s, first)
            s.extend([self._pages.take() for _ in range(have, want)])
        elif want < have:
            self._release(s, want)
        s.reserved = n
        return s.slots[length:end]

    def commit(self, seq: int, path: Path) -> int:
        """Keep the provisional offsets in `path` (strictly ascending, so ancestors first) as the next
        committed places, in that order; drop the rest and close the reservation. `range(k)` moves nothing.
        Returns how many places are committed then.
        """
        s = self._sequences[seq]
        assert s.reserved != CLOSED, f"sequence {seq} has no open reservation to commit"
        k = len(path)
        if k:
            assert path[-1] < s.reserved, f"offset {path[-1]} is outside the {s.reserved} reserved places"
            if not (isinstance(path, range) and path.step == 1 and path.start == 0):
                moved, to = s.gather(path)
                if len(moved):
                    self.storage.move(moved, to)
        s.length += k
        s.reserved = CLOSED
        self._release(s, pages_for(s.length))
        return s.before + s.length

    def rollback(self, seq: int) -> None:
        """Drop the open reservation, if there is one."""
        s = self._sequences[seq]
        s.reserved = CLOSED
        self._release(s, pages_for(s.length))

    def truncate(self, seq: int, length: int) -> None:
        """Forget committed tokens from `length` on, which must not be in a segment."""
        s = self._sequences[seq]
        length -= s.before
        assert s.reserved == CLOSED, f"sequence {seq} has an open reservation and cannot be truncated"
        assert 0 <= length <= s.length, f"cannot truncate {s.length} places to {length}"
        self._shorten(s, length)
        self._release(s, pages_for(length))

    def reopen(self, seq: int, n: int) -> None:
        """Make the last `n` committed places provisional again, with what is written in them. Their pages must not be
        shared: what a fork may read cannot be taken back.
        """
        s = self._sequences[seq]
        assert s.reserved == CLOSED, f"sequence {seq} has an open reservation"
        assert 0 <= n <= s.length, f"cannot reopen {n} of {s.length} places"
        first = (s.length - n) // PAGE_SIZE
        assert not n or not any(map(self._pages.is_shared, s.pages[first:])), f"sequence {seq} shares its end"
        self._shorten(s, s.length - n)
        s.reserved = n

    # -- pages that outlive their sequence -----------------------------------------------------------------

    def share(self, seq: int, length: int) -> list[int]:
        """Pages of the first `length` committed places. The last may be partly used, but not while a reservation is
        open, whose places it would hold too.
        """
        s = self._sequences[seq]
        assert s.segment is None, f"sequence {seq} keeps a part of its places only, which others cannot begin with"
        assert 0 <= length <= s.length, f"cannot share {length} of {s.length} places"
        assert not (length % PAGE_SIZE and s.reserved > 0), f"sequence {seq} has provisional places in its last page"
        return s.pages[: pages_for(length)]

    def adopt(self, seq: int, pages: Sequence[int], length: int) -> None:
        """Let the empty sequence `seq` begin with these pages, which somebody holds, and `length` committed places."""
        s = self._sequences[seq]
        assert not s.pages and s.reserved == CLOSED, f"sequence {seq} is not empty"
        assert len(pages) == pages_for(length), f"{len(pages)} pages for {length} places"
        for page in pages:
            self._pages.use(page)
        s.extend(pages)
        s.length = length

    def retain(self, pages: Iterable[int]) -> None:
        """Hold pages of sequences for the reclaimer, one reference each."""
        assert self.reclaimer is not None, "pages that nobody gives back cannot be retained"
        for page in pages:
            self._pages.retain(page)

    def drop(self, pages: Iterable[int]) -> None:
        """Give references of `retain` back; pages without any other are free."""
        for page in pages:
            self._pages.drop(page)

    def swap_out(self, seq: int) -> Swapped:
        """Take a sequence out of the cache; its handle ends. Only pages that nobody shares leave, and of these only
        what earlier calls have not copied; the others stay, until their place is needed.
        """
        s = self._sequences[seq]
        assert s.reserved == CLOSED, f"sequence {seq} has an open reservation and cannot be swapped out"
        assert s.segment is None, f"sequence {seq} has a segment and cannot be swapped out"
        host = s.host if s.host is not None else HostPages()
        leaving = [i for i, page in enumerate(s.pages) if not self._pages.is_shared(page)]
        host.read(self.storage, s.pages, leaving)
        for page in s.pages:
            if self._pages.is_shared(page):
                self._pages.retain(page)
        swapped = Swapped(s.length, s.pages.copy(), host)
        for i in leaving:
            swapped.pages[i] = AWAY
        self._swapped.append(swapped)
        self.free(seq)
        return swapped

    def swap_in(self, swapped: Swapped) -> int:
        """Bring a sequence back, under a new handle. Raises CapacityError, and changes nothing, without free pages."""
        needed = self.swap_in_pages(swapped)
        if needed > self.available_pages:
            raise CapacityError(
                f"the KV cache is full: a sequence of {swapped.length} tokens needs {needed} pages to return and "
                f"{self.available_pages} are free of {self.storage.num_pages}; end others first"
            )
        self._swapped.remove(swapped)
        for page in swapped.held:
            self._pages.use(page)
            self._pages.drop(page)
        away = swapped.away
        self._reclaim(len(away) - self.free_pages)
        pages = swapped.pages.copy()
        for i in away:
            pages[i] = self._pages.take()
        swapped.host.write(self.storage, {i: pages[i] for i in away})
        swapped.host.keep(swapped.length // PAGE_SIZE)  # the last page will be written
        s = Places()
        s.extend(pages)
        s.host, s.length = swapped.host, swapped.length
        return self._add(s)

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
        s = self._sequences[seq]
        return s.before + s.length

    def before(self, seq: int) -> int:
        """Committed tokens that a segment stands for; the first of the others is at place 0 of the sequence's pages."""
        return self._sequences[seq].before

    def reserved(self, seq: int) -> int:
        """Places of the open reservation; 0 without one."""
        return max(self._sequences[seq].reserved, 0)

    def page_table(self, seq: int) -> NDArray[np.int32]:
        """Pages of the committed and provisional places, in order. [P]"""
        s = self._sequences[seq]
        return s.table[: len(s.pages)]

    def page_tables(self, seqs: Sequence[int]) -> NDArray[np.int32]:
        """Page tables of several sequences; rows of shorter ones end in zeros. [B, P], a view until the next call."""
        if len(seqs) == 1:
            return self.page_table(seqs[0])[None]
        places = [self._sequences[seq] for seq in seqs]
        most = max([len(s.pages) for s in places], default=0)
        anew = self._tables_of != seqs or most > self._tables.shape[1]
        if anew:
            self._tables_of, self._tables = list(seqs), np.zeros((len(places), 2 * most), dtype=np.int32)
        for row, s in enumerate(places):
            if anew or s.changed:  # from step to step few sequences get another page
                n = len(s.pages)
                self._tables[row, :n], self._tables[row, n:] = s.table[:n], 0
                s.changed = False
        return self._tables[:, :most]

    def compact(self, seq: int, tokens: int, kept: Kept) -> int:
        """Keep of the first `tokens` committed places, a multiple of PAGE_SIZE, and of what an earlier call kept, in
        each layer and head only those that `kept` numbers: first those kept before, then the others. See Segment.

        Returns the bytes that are free now. Raises ParameterError for numbers that are not there, CapacityError, and
        changes nothing, where forks hold so many of the pages that there are none for the copies.
        """
        s = self._sequences[seq]
        assert s.reserved == CLOSED, f"sequence {seq} has an open reservation and cannot be compacted"
        assert tokens % PAGE_SIZE == 0 and 0 <= tokens <= s.length, f"cannot compact {tokens} of {s.length} places"
        before = self.bytes_held(seq)
        compact(s, tokens, kept, self._heads, self)
        return before - self.bytes_held(seq)

    def ragged(self, seqs: Sequence[int]) -> list[Ragged | None] | None:
        """What each layer and head of these sequences reads, where some have segments."""
        if not self._heads:
            return None
        found = [ragged(self._sequences[seq], self.storage) for seq in seqs]
        return found if any(one is not None for one in found) else None

    def read(
        self, seq: int, layer: int, head: int, tokens: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]:
        """Rotated keys and values f32[N, C] of a layer and head, up to `tokens` places of the sequence's own pages, and
        their positions in the text."""
        pages, positions = places_of(self._sequences[seq], self.storage, layer, head, tokens)
        storage = splits(self.storage)
        return storage.head_keys(pages), storage.head_values(pages), positions

    @property
    def heads(self) -> tuple[int, int]:
        """Layers, and KV heads of each. Raises ParameterError where single heads cannot be left out."""
        layers, _, heads = splits(self.storage).keys.shape[:3]
        return layers, heads

    def bytes_held(self, seq: int) -> int:
        """Bytes of a sequence's pages and head pages, shared ones included."""
        s = self._sequences[seq]
        whole = len(s.pages) * self.storage.bytes_per_page
        if s.segment is None:
            return whole
        return whole + s.segment.head_pages * self.storage.bytes_per_page // self._heads.per_page

    def pages_needed(self, seq: int, n: int) -> int:
        """Free or reclaimed pages that `reserve(seq, n)` would take."""
        return self._need(self._sequences[seq], n)[0]

    def pages_held(self, seq: int) -> int:
        """Pages that would be available if this sequence ended."""
        return sum(self._pages.sequences(page) == 1 for page in self._sequences[seq].pages)

    def references(self, page: int) -> int:
        """Who holds a page: sequences, the reclaimer, swapped-out sequences."""
        return self._pages.references[page]

    def is_idle(self, page: int) -> bool:
        """Held, but by no sequence in the cache."""
        return self._pages.is_idle(page)

    @property
    def left(self) -> set[int]:
        """Retained pages that came down to one holder; the reclaimer takes them out. Some may have others again."""
        return self._pages.left

    @property
    def generations(self) -> NDArray[np.int64]:
        """How often committed places of each page became free to be written anew. [num_pages]"""
        return self._pages.generations

    @property
    def free_pages(self) -> int:
        return len(self._pages.free)

    @property
    def available_pages(self) -> int:
        """Free, or used by no sequence, so that `reserve` may reclaim them."""
        return self._pages.available

    @property
    def pages_in_use(self) -> int:
        """Pages of sequences in the cache; not those that are only kept for later."""
        return self.storage.num_pages - self.available_pages

    @property
    def bytes_used(self) -> int:
        """Bytes of the pages that hold something; a shared page counts once."""
        return (self.storage.num_pages - self.free_pages) * self.storage.bytes_per_page

    @property
    def bytes_total(self) -> int:
        return self.storage.num_pages * self.storage.bytes_per_page

    def check_integrity(self) -> None:
        """Count everything anew and compare; AssertionError on a difference. Linear in pages."""
        used = [0] * self.storage.num_pages
        for seq, s in self._sequences.items():
            s.check_integrity()
            for page in s.pages:
                used[page] += 1
            if s.reserved > 0:
                for page in s.pages[s.length // PAGE_SIZE :]:
                    assert not self._pages.is_shared(page), f"sequence {seq}: provisional page {page} is shared"
        segments = {id(s.segment): s.segment for s in self._sequences.values() if s.segment is not None}
        self._heads.check_integrity(
            [n for one in segments.values() for row in one.pages for p in row for n in p.tolist()]
        )
        for page in self._heads.split_pages:
            used[page] += 1
        for swapped in self._swapped:
            assert len(swapped.pages) == pages_for(swapped.length), "a swapped page is lost"
            assert set(swapped.away) <= swapped.host.indices, "a page is neither here nor there"
            assert all(self._pages.retained[page] for page in swapped.held), "a swapped-out sequence has lost a page"
        self._pages.check_integrity(used)

    # -- inside --------------------------------------------------------------------------------------------

    def _add(self, s: Places) -> int:
        """A handle for a sequence."""
        seq, self._next = self._next, self._next + 1
        self._sequences[seq] = s
        return seq

    def _release(self, s: Places, keep: int) -> None:
        """Give back the pages from index `keep` on."""
        while len(s.pages) > keep:
            self._pages.leave(s.pages.pop())
            s.changed = True

    def _shorten(self, s: Places, length: int) -> None:
        """Committed places from `length` on may be written anew."""
        s.shorten(length)
        self._pages.generations[s.pages[length // PAGE_SIZE :]] += 1

    def _need(self, s: Places, n: int) -> tuple[int, bool]:
        """Pages that reserving `n` places takes, and whether the shared last one is then taken over, not copied: where
        only the reclaimer shares it and there is no page for a copy."""
        first, have = s.length // PAGE_SIZE, len(s.pages)
        more = max(pages_for(s.length + n) - have, 0)
        if n == 0 or first >= have or not self._pages.is_shared(s.pages[first]):
            return more, False
        if self._pages.sequences(s.pages[first]) == 1 and more + 1 > self.available_pages:
            return more, True
        return more + 1, False

    def _make_room(self, s: Places, n: int) -> None:
        """See to it that as many pages are free as reserving `n` places takes."""
        need, take_over = self._need(s, n)
        if need > self.available_pages:
            raise CapacityError(
                f"the KV cache is full: {n} more tokens of a sequence of {s.length} need "
                f"{need - self.available_pages} pages more than the {self.available_pages} that are free of "
                f"{self.storage.num_pages} ({PAGE_SIZE} tokens each); use a larger cache, fewer sequences at once, or "
                "shorter ones"
            )
        if take_over:
            page = s.pages[s.length // PAGE_SIZE]
            self._pages.generations[page] += 1
            for swapped in self._swapped:
                if page in swapped.pages:
                    self._spill(swapped)
            if self._pages.is_shared(page) and self.reclaimer is not None:
                self.reclaimer.surrender(page)
        self._reclaim(need - self.free_pages)

    def _reclaim(self, pages: int) -> None:
        """Free so many pages of those that are idle. The reclaimer's go first; what sequences outside the cache have
        kept in it follows them out when it must."""
        if pages <= 0:
            return
        freed = self.reclaimer.evict(pages) if self.reclaimer is not None else 0
        for swapped in self._swapped:
            if freed >= pages:
                return
            before = self.free_pages
            self._spill(swapped)
            freed += self.free_pages - before
            if freed < pages and self.reclaimer is not None:
                freed += self.reclaimer.evict(pages - freed)
        assert freed >= pages, f"{pages - freed} idle pages could not be reclaimed"

    def _spill(self, swapped: Swapped) -> None:
        """Copy out what a swapped-out sequence still holds in the cache."""
        here = [i for i, page in enumerate(swapped.pages) if page != AWAY]
        swapped.host.read(self.storage, swapped.pages, here)
        for i in here:
            self._pages.drop(swapped.pages[i])
            swapped.pages[i] = AWAY

    def _unshare(self, s: Places, index: int) -> None:
        """Replace a shared page by an own copy."""
        old, page = s.pages[index], self._pages.take()
        self.storage.copy_pages(np.array([old]), np.array([page]))
        self._pages.leave(old)
        s.replace(index, page)
