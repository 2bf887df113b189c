"""The paged KV cache against a plain dictionary of what every place of every sequence holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from outpace.cache.pages import PAGE_SIZE, PagedKVCache
from outpace.cache.storage import KVStorage
from outpace.cache.torch_storage import TorchStorage
from outpace.errors import CapacityError


class ArrayStorage(KVStorage):
    """One number per slot."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages, self.bytes_per_page = num_pages, 100
        self.values = np.full(num_pages * PAGE_SIZE, -1)
        self.copied = self.moved = self.read = 0

    def copy_pages(self, source, target):
        pages = self.values.reshape(-1, PAGE_SIZE)
        assert not set(source) & set(target)
        pages[target] = pages[source]
        self.copied += len(source)

    def move(self, source, target):
        self.values[target] = self.values[source]
        self.moved += len(source)

    def read_pages(self, pages):
        self.read += len(pages)
        return (self.values.reshape(1, -1, PAGE_SIZE)[:, pages],)

    def write_pages(self, blob, pages):
        assert len(set(pages)) == len(pages)
        self.values.reshape(1, -1, PAGE_SIZE)[:, pages] = blob[0]


class Modelled(RuleBasedStateMachine):
    """`held[seq]` lists committed contents, `open_[seq]` contents of the open region (None: unwritten)."""

    sequences = Bundle("sequences")

    @initialize(num_pages=st.integers(1, 14))
    def start(self, num_pages):
        self.storage = ArrayStorage(num_pages)
        self.cache = PagedKVCache(self.storage)
        self.held: dict[int, list[int]] = {}
        self.open_: dict[int, list[int | None]] = {}
        self.stamp = 0
        self.asked: list[int] = []

    def write(self, seq, offsets):
        """What a decoder does: find the slot through the page table, write a number never used before."""
        table = self.cache.page_table(seq)
        for offset in offsets:
            place = self.cache.length(seq) + offset
            self.stamp += 1
            self.storage.values[table[place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE] = self.stamp
            self.open_[seq][offset] = self.stamp

    @rule(target=sequences)
    def new(self):
        seq = self.cache.new()
        assert seq not in self.held
        self.held[seq] = []
        return seq

    @rule(seq=sequences, n=st.integers(0, 40) | st.integers(0, 200), data=st.data())
    def reserve(self, seq, n, data):
        before = self.cache.free_pages, self.cache.page_table(seq).tolist(), self.cache.reserved(seq)
        needed = self.cache.pages_needed(seq, n)
        try:
            slots = self.cache.reserve(seq, n)
        except CapacityError:
            assert needed > before[0]
            assert (
                self.cache.free_pages,
                self.cache.page_table(seq).tolist(),
                self.cache.reserved(seq),
            ) == before
            return
        assert needed <= before[0]
        old = self.open_.get(seq, [])
        self.open_[seq] = (old + [None] * n)[:n]
        places = self.cache.length(seq) + np.arange(n)
        table = self.cache.page_table(seq)
        assert slots.dtype == np.int64
        assert slots.tolist() == (table[places // PAGE_SIZE] * PAGE_SIZE + places % PAGE_SIZE).tolist()
        if n:
            self.write(seq, data.draw(st.sets(st.integers(0, n - 1), max_size=8)))

    @rule(seq=sequences, data=st.data())
    def commit(self, seq, data):
        if seq not in self.open_:
            with pytest.raises(AssertionError):
                self.cache.commit(seq, [])
            return
        region = self.open_.pop(seq)
        if region and data.draw(st.booleans()):
            path = sorted(data.draw(st.sets(st.integers(0, len(region) - 1))))
        else:
            path = range(data.draw(st.integers(0, len(region))))
        moved = self.storage.moved
        self.cache.commit(seq, np.array(path, dtype=np.int64) if data.draw(st.booleans()) else path)
        self.held[seq] += [region[i] for i in path]
        if list(path) == list(range(len(path))):
            assert self.storage.moved == moved

    @rule(seq=sequences)
    def rollback(self, seq):
        self.cache.rollback(seq)
        self.open_.pop(seq, None)

    @rule(seq=sequences, data=st.data())
    def truncate(self, seq, data):
        length = data.draw(st.integers(0, len(self.held[seq])))
        if seq in self.open_:
            with pytest.raises(AssertionError):
                self.cache.truncate(seq, length)
            return
        self.cache.truncate(seq, length)
        del self.held[seq][length:]

    @rule(seq=sequences, data=st.data())
    def reopen(self, seq, data):
        length = len(self.held[seq])
        n = data.draw(st.integers(0, length))
        pages = self.cache.page_table(seq)[(length - n) // PAGE_SIZE :].tolist()
        shared = {p for other in self.held if other != seq for p in self.cache.page_table(other).tolist()}
        if seq in self.open_ or (n and shared & set(pages)):
            with pytest.raises(AssertionError):
                self.cache.reopen(seq, n)
            return
        self.cache.reopen(seq, n)
        self.open_[seq] = self.held[seq][length - n :]
        del self.held[seq][length - n :]

    @rule(target=sequences, seq=sequences)
    def fork(self, seq):
        if seq in self.open_:
            self.cache.rollback(seq)
            del self.open_[seq]
        used = self.cache.bytes_used
        twin = self.cache.fork(seq)
        assert self.cache.bytes_used == used
        self.held[twin] = list(self.held[seq])
        return twin

    @rule(data=st.data(), again=st.booleans())
    def page_tables(self, data, again):
        """Of the sequences of the last call, as in most steps, or of others."""
        if not again or not set(self.asked) <= self.held.keys():
            self.asked = data.draw(
                st.lists(st.sampled_from(sorted(self.held)), unique=True) if self.held else st.just([])
            )
        tables = self.cache.page_tables(self.asked)
        expected = [self.cache.page_table(seq).tolist() for seq in self.asked]
        assert tables.shape == (len(expected), max(map(len, expected), default=0))
        for row, pages in zip(tables.tolist(), expected, strict=True):
            assert row == pages + [0] * (len(row) - len(pages))

    @rule(seq=consumes(sequences))
    def free(self, seq):
        self.cache.free(seq)
        del self.held[seq]
        self.open_.pop(seq, None)
        with pytest.raises(KeyError):
            self.cache.length(seq)

    @invariant()
    def contents_and_books(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        pages = set()
        for seq, held in self.held.items():
            table = self.cache.page_table(seq)
            pages |= set(table.tolist())
            everything = held + self.open_.get(seq, [])
            assert self.cache.length(seq) == len(held)
            assert self.cache.reserved(seq) == len(everything) - len(held)
            for place, value in enumerate(everything):
                slot = table[place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE
                assert value is None or self.storage.values[slot] == value
        assert self.cache.bytes_used == len(pages) * 100
        assert self.cache.free_pages == self.storage.num_pages - len(pages)

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        for seq in list(self.held):
            self.cache.free(seq)
        assert self.cache.free_pages == self.storage.num_pages
        assert self.cache.bytes_used == 0 and self.cache.bytes_total == 100 * self.storage.num_pages


TestModelled = Modelled.TestCase
TestModelled.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_tree_grows_layer_by_layer_and_keeps_what_is_written():
    storage = ArrayStorage(4)
    cache = PagedKVCache(storage)
    seq = cache.new()
    storage.values[cache.reserve(seq, 3)] = [1, 2, 3]
    slots = cache.reserve(seq, 20)
    assert storage.values[slots[:3]].tolist() == [1, 2, 3]
    storage.values[slots[3:]] = np.arange(4, 21)
    cache.commit(seq, [0, 2, 17])
    assert storage.values[cache.reserve(seq, 0)].size == 0
    assert storage.values[cache.page_table(seq)[0] * PAGE_SIZE + np.arange(3)].tolist() == [1, 3, 18]
    assert cache.free_pages == 3


def test_a_shared_page_is_copied_once_and_only_when_written():
    storage = ArrayStorage(8)
    cache = PagedKVCache(storage)
    seq = cache.new()
    cache.reserve(seq, PAGE_SIZE + 4)
    cache.commit(seq, range(PAGE_SIZE + 4))
    twin = cache.fork(seq)
    assert (cache.free_pages, storage.copied) == (6, 0)
    cache.reserve(twin, 2)
    assert (cache.free_pages, storage.copied) == (5, 1)
    cache.reserve(seq, 2)  # the only owner by now
    assert storage.copied == 1
    assert cache.page_table(seq)[0] == cache.page_table(twin)[0]
    assert cache.page_table(seq)[1] != cache.page_table(twin)[1]


def test_pages_that_may_be_written_anew_have_another_generation():
    """Copies of them in int4 are told by it to be old."""
    cache = PagedKVCache(ArrayStorage(4))
    seq = cache.new()
    cache.reserve(seq, 2 * PAGE_SIZE + 4)
    cache.commit(seq, range(2 * PAGE_SIZE + 4))
    pages = cache.page_table(seq).tolist()
    before = cache.generations.copy()
    cache.truncate(seq, PAGE_SIZE + 2)
    changed = [page for page in range(4) if cache.generations[page] != before[page]]
    assert changed == sorted(pages[1:])


def test_a_shared_last_page_counts_against_the_capacity():
    cache = PagedKVCache(ArrayStorage(1))
    seq = cache.new()
    cache.reserve(seq, 4)
    cache.commit(seq, range(4))
    twin = cache.fork(seq)
    with pytest.raises(CapacityError, match="1 pages more than the 0 that are free of 1"):
        cache.reserve(twin, 1)
    cache.check_integrity()
    cache.free(seq)
    assert len(cache.reserve(twin, 1)) == 1


@pytest.mark.parametrize("path", [[1, 1], [2, 1], [-1, 0], [0, 5]])
def test_commit_refuses_paths_that_do_not_ascend_within_the_region(path):
    cache = PagedKVCache(ArrayStorage(2))
    seq = cache.new()
    cache.reserve(seq, 5)
    with pytest.raises(AssertionError):
        cache.commit(seq, path)


def two_sequences_and_one_out_of_the_cache() -> PagedKVCache:
    cache = PagedKVCache(ArrayStorage(12))
    seq = cache.new()
    cache.reserve(seq, 40)
    cache.commit(seq, range(40))
    cache.swap_out(cache.fork(seq))  # holds what `seq` uses
    cache.reserve(cache.fork(seq), 3)
    return cache


@pytest.mark.parametrize(
    ("spoil", "notice"),
    [
        (lambda c, s: c._pages.references.__setitem__(s.pages[0], 5), "do not add up"),
        (lambda c, s: c._pages.free.append(c._pages.free[0]), "free twice"),
        (lambda c, s: c._pages.free.pop(), "lost"),
        (lambda c, s: setattr(c._pages, "idle", 1), "0 pages are idle, not 1"),
        (lambda c, s: s.pages.pop(), "2 pages for 40 places"),
        (lambda c, s: s.table.__setitem__(1, 11), "page table"),
        (lambda c, s: s.slots.__setitem__(20, 7), "slots"),
        (lambda c, s: setattr(s, "reserved", 8), "provisional page"),
        (lambda c, s: c._swapped[0].pages.pop(), "a swapped page is lost"),
        (lambda c, s: c._swapped[0].pages.__setitem__(1, -1), "neither here nor there"),
    ],
)
def test_the_books_notice_what_is_wrong_with_them(spoil, notice):
    cache = two_sequences_and_one_out_of_the_cache()
    cache.check_integrity()
    spoil(cache, cache._sequences[0])
    with pytest.raises(AssertionError, match=notice):
        cache.check_integrity()


def test_page_tables_pads_with_zeros():
    cache = PagedKVCache(ArrayStorage(4))
    long, short = cache.new(), cache.new()
    cache.reserve(long, 33)
    cache.reserve(short, 1)
    tables = cache.page_tables([short, long])
    assert tables.dtype == np.int32 and tables.shape == (2, 3)
    assert tables[1].tolist() == cache.page_table(long).tolist()
    assert tables[0].tolist() == [cache.page_table(short)[0], 0, 0]
    assert cache.page_tables([long]).shape == (1, 3)


def test_torch_storage_moves_every_layer_as_if_read_first():
    storage = TorchStorage(2, 3, 2, 4, torch.bfloat16, torch.device("cpu"))
    assert storage.bytes_per_page == 2 * 2 * PAGE_SIZE * 2 * 4 * 2
    storage.k_slots.copy_(torch.arange(3 * PAGE_SIZE)[None, :, None, None].expand_as(storage.k_slots))
    storage.v_slots.copy_(-storage.k_slots)
    storage.move(np.array([2, 3, 4]), np.array([1, 2, 3]))
    assert storage.k_slots[:, :5, 1, 3].tolist() == [[0, 2, 3, 4, 4]] * 2
    assert storage.v_slots[:, :5, 0, 0].tolist() == [[0, -2, -3, -4, -4]] * 2
    storage.copy_pages(np.array([0]), np.array([2]))
    assert torch.equal(storage.k[:, 0], storage.k[:, 2]) and torch.equal(storage.v[:, 0], storage.v[:, 2])
