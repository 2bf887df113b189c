"""The prefix tree and swapping against a plain dictionary of texts and what every place of every sequence holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from test_pages import ArrayStorage

from outpace.cache.pages import PAGE_SIZE, PagedKVCache
from outpace.cache.prefix import PrefixTree
from outpace.cache.swap import Swapped
from outpace.errors import CapacityError

OWNERS = ["", "a", "b"]


def stamp(owner: str, text: Sequence[int]) -> int:
    """What a place holds: it depends on whose text it is and on everything up to there, as keys and values do."""
    return hash((owner, tuple(text)))


class Rig:
    """A cache whose places are written by `read`, as a decoder reads a text."""

    def __init__(self, pages: int) -> None:
        self.storage = ArrayStorage(pages)
        self.cache = PagedKVCache(self.storage)
        self.tree = PrefixTree(self.cache)

    def read(self, owner: str, seq: int, text: Sequence[int]) -> None:
        """Bring a sequence up to `text`."""
        start = self.cache.length(seq)
        slots = self.cache.reserve(seq, len(text) - start)
        self.storage.values[slots] = [stamp(owner, text[: i + 1]) for i in range(start, len(text))]
        self.cache.commit(seq, range(len(text) - start))

    def run(self, owner: str, text: Sequence[int], final: bool = True) -> int:
        """A request from its beginning to its end. Returns what it found cached."""
        seq = self.cache.new()
        found = self.tree.attach(owner, text, seq)
        self.read(owner, seq, text)
        self.check(owner, seq, text)
        self.tree.insert(owner, text, seq, final)
        self.cache.free(seq)
        self.verify()
        return found

    def check(self, owner: str, seq: int, text: Sequence[int]) -> None:
        assert self.cache.length(seq) == len(text)
        table = self.cache.page_table(seq)
        for i in range(len(text)):
            slot = table[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE
            assert self.storage.values[slot] == stamp(owner, text[: i + 1]), f"place {i}"

    def verify(self) -> None:
        self.cache.check_integrity()
        self.tree.check_integrity()


def left_after(tree: PrefixTree, pages: int) -> set[int]:
    """The pages that stay when so many are evicted, by walking over all of them from the least recently used on."""
    order = sorted(tree._nodes.values(), key=lambda node: node.used)
    idle = {node.page for node in order if tree.cache.references(node.page) == 1}
    below = {node.page: {child.page for child in node.children.values()} for node in order}
    stay, freed = set(below), 0
    for prune in (False, True):
        for node in order:
            if freed < pages and node.page in stay & idle and (prune or not below[node.page] & stay):
                gone = {node.page}
                while more := set().union(*(below[page] & stay for page in gone)) - gone:
                    gone |= more
                stay -= gone
                freed += len(gone & idle)
    return stay


class Shared(RuleBasedStateMachine):
    """Texts of two tokens, so that they often begin alike. `texts[seq]`: owner and committed tokens."""

    running = Bundle("running")
    away = Bundle("away")

    @initialize(pages=st.integers(3, 16))
    def start(self, pages):
        self.rig = Rig(pages)
        self.cache, self.tree = self.rig.cache, self.rig.tree
        self.texts: dict[int, tuple[str, list[int]]] = {}
        self.out: dict[Swapped, tuple[str, list[int]]] = {}
        self.inserted: set[tuple[str, tuple[int, ...]]] = set()
        self.evicted = False

    def best(self, owner: str, text: list[int]) -> int:
        """The longest beginning that was ever inserted for this owner."""
        found = 0
        for name, kept in self.inserted:
            if name == owner:
                same = next((i for i, (a, b) in enumerate(zip(kept, text, strict=False)) if a != b), None)
                found = max(found, min(len(kept), len(text)) if same is None else same)
        return min(found, len(text) - 1)

    @rule(
        target=running,
        owner=st.sampled_from(OWNERS),
        blocks=st.lists(st.integers(0, 1), min_size=1, max_size=5),
        tail=st.lists(st.integers(0, 1), max_size=20),
    )
    def begin(self, owner, blocks, tail):
        text = [t for block in blocks for t in [block] * 9] + tail
        seq = self.cache.new()
        found, idle = self.tree.needs(owner, text)
        before = self.cache.available_pages
        assert found == self.tree.match(owner, text)
        assert self.tree.attach(owner, text, seq) == found < len(text)
        assert self.cache.available_pages == before - idle
        assert found == self.best(owner, text) or (self.evicted and found <= self.best(owner, text))
        self.rig.check(owner, seq, text[:found])
        self.texts[seq] = owner, text[:found]
        self.grow(seq, text[found:])
        return seq

    @rule(seq=running, more=st.lists(st.integers(0, 1), max_size=40))
    def grow(self, seq, more):
        owner, text = self.texts[seq]
        needed, available = self.cache.pages_needed(seq, len(more)), self.cache.available_pages
        free = self.cache.free_pages
        try:
            self.cache.reserve(seq, len(more))
        except CapacityError:
            assert needed > available and self.cache.available_pages == available and self.cache.free_pages == free
            return
        assert needed <= available
        self.evicted |= needed > free or self.cache.free_pages > free - needed
        self.cache.rollback(seq)
        self.rig.read(owner, seq, text + more)
        self.texts[seq] = owner, text + more

    @rule(seq=running, n=st.integers(1, 30), data=st.data())
    def draft(self, seq, n, data):
        """A draft is written, and a part of it may be kept."""
        owner, text = self.texts[seq]
        try:
            slots = self.cache.reserve(seq, n)
        except CapacityError:
            return
        self.evicted = True  # it may have taken pages; what is found is then checked by its content alone
        self.rig.storage.values[slots] = -5
        if data.draw(st.booleans()):
            self.tree.insert(owner, text, seq)
            self.inserted.add((owner, tuple(text[: len(text) // PAGE_SIZE * PAGE_SIZE])))
        path = sorted(data.draw(st.sets(st.integers(0, n - 1))))
        for i, offset in enumerate(path):
            self.rig.storage.values[slots[offset]] = stamp(owner, [*text, *([1] * (i + 1))])
        self.cache.commit(seq, path)
        self.texts[seq] = owner, text + [1] * len(path)

    @rule(seq=running, data=st.data())
    def truncate(self, seq, data):
        owner, text = self.texts[seq]
        length = data.draw(st.integers(0, len(text)))
        self.cache.truncate(seq, length)
        self.texts[seq] = owner, text[:length]

    @rule(seq=running)
    def insert(self, seq):
        owner, text = self.texts[seq]
        self.tree.insert(owner, text, seq)
        self.inserted.add((owner, tuple(text[: len(text) // PAGE_SIZE * PAGE_SIZE])))

    @rule(seq=consumes(running), keep=st.booleans())
    def end(self, seq, keep):
        owner, text = self.texts.pop(seq)
        if keep:
            self.tree.insert(owner, text, seq, final=True)
            self.inserted.add((owner, tuple(text)))
        self.cache.free(seq)

    @rule(target=running, seq=running)
    def fork(self, seq):
        twin = self.cache.fork(seq)
        self.texts[twin] = self.texts[seq]
        return twin

    @rule(target=away, seq=consumes(running))
    def swap_out(self, seq):
        swapped = self.cache.swap_out(seq)
        self.out[swapped] = self.texts.pop(seq)
        return swapped

    @rule(target=running, swapped=consumes(away))
    def swap_in(self, swapped):
        assume(swapped in self.out)
        needed, available = self.cache.swap_in_pages(swapped), self.cache.available_pages
        if needed > available:
            with pytest.raises(CapacityError):
                self.cache.swap_in(swapped)
            self.cache.discard(swapped)
            del self.out[swapped]
            seq = self.cache.new()
            self.texts[seq] = "", []
            return seq
        self.evicted |= needed > self.cache.free_pages
        seq = self.cache.swap_in(swapped)
        assert self.cache.available_pages == available - needed
        self.texts[seq] = self.out.pop(swapped)
        return seq

    @rule(pages=st.integers(0, 16))
    def evict(self, pages):
        evictable, free = self.tree.evictable, self.cache.free_pages
        stay = left_after(self.tree, pages)
        freed = self.tree.evict(pages)
        assert set(self.tree._nodes) == stay
        assert freed >= min(pages, evictable) and self.cache.free_pages == free + freed
        self.evicted |= freed > 0

    @rule(owner=st.sampled_from(OWNERS))
    def clear(self, owner):
        self.tree.clear(owner)
        self.inserted = {(name, text) for name, text in self.inserted if name != owner}
        assert self.tree.match(owner, [0, 1, 0] * 20) == 0

    @invariant()
    def all_is_right(self):
        if not hasattr(self, "cache"):
            return
        self.rig.verify()
        for seq, (owner, text) in self.texts.items():
            self.rig.check(owner, seq, text)
        used = {page for seq in self.texts for page in self.cache.page_table(seq).tolist()}
        assert self.cache.available_pages == self.rig.storage.num_pages - len(used)

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        for seq in self.texts:
            self.cache.free(seq)
        for swapped in self.out:
            self.cache.discard(swapped)
        assert self.cache.free_pages + self.tree.pages == self.rig.storage.num_pages
        self.tree.clear()
        self.rig.verify()
        assert self.cache.free_pages == self.rig.storage.num_pages and self.tree.pages == self.tree.tokens == 0


TestShared = Shared.TestCase
TestShared.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def words(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 150_000, n).tolist()


def test_the_second_turn_of_a_chat_reads_only_what_is_new() -> None:
    rig = Rig(40)
    first = words(100)
    assert rig.run("", first) == 0
    assert rig.run("", first + words(30, 1)) == 100
    assert rig.run("", first + words(30, 1) + words(5, 2)) == 130
    assert rig.storage.copied == 2  # of each turn's last page
    assert (rig.tree.asked, rig.tree.hit) == (100 + 130 + 135, 230)
    assert rig.tree.tokens == 135 and rig.tree.pages == 9  # the shorter ends are gone


def test_the_last_token_of_a_known_text_is_run_again() -> None:
    rig = Rig(8)
    text = words(32)
    rig.run("", text)
    assert rig.tree.match("", text) == 31
    assert rig.run("", text) == 31
    assert rig.tree.match("", text[:1]) == 0 and rig.tree.match("", []) == 0


def test_texts_part_at_any_token() -> None:
    rig = Rig(60)
    text = words(40)
    rig.run("", text)
    for n in (39, 38, 33, 32, 31, 17, 16, 15, 1):
        assert rig.tree.match("", text[:n] + [7] * 20) == n
        assert rig.run("", text[:n] + [7] * 20) == n
    assert rig.tree.match("", [*text, 9]) == 40
    assert rig.tree.match("", [9, *text]) == 0


def test_owners_never_share() -> None:
    rig = Rig(12)
    text = words(50)
    rig.run("a", text)
    assert rig.tree.match("b", text) == 0 and rig.run("b", text) == 0
    rig.tree.clear("a")
    assert (rig.tree.match("a", text), rig.tree.match("b", text)) == (0, 49)
    rig.verify()


def test_a_running_sequence_shares_whole_pages_and_never_what_is_provisional() -> None:
    rig = Rig(12)
    text = words(40)
    seq = rig.cache.new()
    rig.read("", seq, text)
    rig.cache.reserve(seq, 20)
    rig.tree.insert("", text, seq)
    assert rig.tree.tokens == 32
    with pytest.raises(AssertionError, match="provisional places"):
        rig.tree.insert("", text, seq, final=True)
    rig.cache.rollback(seq)
    rig.read("", seq, text + words(20, 1))
    assert rig.storage.copied == 0  # its own last page was never shared
    rig.cache.reopen(seq, 20)
    rig.cache.rollback(seq)
    with pytest.raises(AssertionError, match="shares its end"):
        rig.cache.reopen(seq, 10)
    rig.verify()


def test_what_is_there_stays_and_twice_the_same_is_not_kept() -> None:
    rig = Rig(12)
    text = words(40)
    one, two = rig.cache.new(), rig.cache.new()
    for seq in (one, two):
        rig.read("", seq, text)
    for seq in (one, two):
        rig.tree.insert("", text, seq, final=True)
        rig.cache.free(seq)
    assert rig.tree.pages == 3 and rig.cache.free_pages == 9
    rig.verify()


def test_a_page_that_a_fork_left_in_part_becomes_whole() -> None:
    rig = Rig(12)
    text, seq = words(16), rig.cache.new()
    rig.read("", seq, text)
    twin = rig.cache.fork(seq)
    rig.cache.truncate(twin, 2)
    rig.tree.insert("", text[:2], twin, final=True)
    rig.cache.free(twin)
    assert rig.tree.tokens == 2
    rig.tree.insert("", text, seq)
    assert (rig.tree.tokens, rig.tree.pages) == (16, 1)
    rig.verify()


def test_the_least_recently_used_goes_first_and_leaves_before_what_they_hang_from() -> None:
    rig = Rig(12)
    old, new = words(64, 1), words(64, 2)
    rig.run("", old)
    rig.run("", new)
    assert rig.tree.match("", old) == 63  # asking is not using
    assert rig.tree.evict(1) == 1 and rig.tree.match("", old) == 48
    rig.run("", old[:33])
    assert rig.tree.evict(2) == 2
    assert (rig.tree.match("", old), rig.tree.match("", new)) == (48, 32)
    assert rig.tree.evict(100) == 5 == 12 - 7 and rig.cache.free_pages == 12


def test_what_a_sequence_uses_is_not_evicted() -> None:
    rig = Rig(8)
    text = words(64)
    rig.run("", text)
    seq = rig.cache.new()
    assert rig.tree.attach("", text[:40], seq) == 39
    assert (rig.tree.evictable, rig.cache.available_pages) == (1, 5)
    assert rig.tree.evict(8) == 1 and rig.tree.pages == 3
    rig.read("", seq, text[:40] + words(60, 1))
    rig.check("", seq, text[:40] + words(60, 1))
    with pytest.raises(CapacityError, match="more than the 1 that are free of 8"):
        rig.cache.reserve(seq, 100)
    assert len(rig.cache.reserve(seq, 28)) == 28  # the page that it had copied is given up
    rig.verify()


def test_a_used_page_goes_when_it_keeps_unused_ones_from_going() -> None:
    """Two read the same text side by side; the tree keeps the first one's pages, and below them the second one's."""
    rig = Rig(8)
    text, seqs = words(48), [rig.cache.new(), rig.cache.new()]
    rig.read("", seqs[0], text[:32])
    rig.read("", seqs[1], text)
    rig.tree.insert("", text[:32], seqs[0])
    rig.tree.insert("", text, seqs[1])
    rig.cache.free(seqs[0])
    assert rig.tree.evictable == 2 and rig.tree.evict(2) == 2
    rig.check("", seqs[1], text)
    rig.verify()


def test_a_text_as_long_as_the_cache_takes_over_its_last_page() -> None:
    rig = Rig(4)
    text = words(60)
    rig.run("", text)
    seq = rig.cache.new()
    assert rig.tree.attach("", [*text, 1], seq) == 60
    assert (rig.cache.available_pages, rig.cache.pages_needed(seq, 4)) == (0, 0)
    rig.read("", seq, [*text, 1, 2, 3, 4])
    rig.check("", seq, [*text, 1, 2, 3, 4])
    assert rig.storage.copied == 0 and rig.tree.tokens == 48
    rig.verify()


def test_matching_a_long_prompt_is_quick() -> None:
    """Counted in lookups, not in seconds: one per page."""
    rig = Rig(200)
    text = words(1600)
    rig.run("", text)
    looked = 0
    node = rig.tree._roots[""]
    while node.children:
        assert len(node.children) == 1
        [node] = node.children.values()  # type: ignore[assignment]
        looked += 1
    assert looked == 100 and rig.tree.match("", [*text, 1]) == 1600


def test_of_unused_pages_above_used_ones_the_least_recently_used_go_first() -> None:
    rig = Rig(16)
    for text in (words(48, 1), words(48, 2)):
        seqs = [rig.cache.new(), rig.cache.new()]
        rig.read("", seqs[0], text[:32])
        rig.read("", seqs[1], text)
        rig.tree.insert("", text[:32], seqs[0])
        rig.tree.insert("", text, seqs[1])
        rig.cache.free(seqs[0])
    again = rig.cache.new()
    rig.tree.attach("", words(48, 1)[:33], again)
    rig.cache.free(again)
    assert rig.tree.evict(1) == 1 and rig.tree.match("", words(48, 2)) == 16
    assert rig.tree.match("", words(48, 1)) == 47
    rig.verify()


def test_what_a_sequence_outside_the_cache_held_can_go_when_that_ends() -> None:
    rig = Rig(8)
    text, seq = words(33), rig.cache.new()
    rig.run("", text)
    rig.tree.attach("", text, seq)
    swapped = rig.cache.swap_out(seq)
    assert rig.tree.evict(1) == 1 and rig.tree.pages == 2  # the last page, of which the sequence held nothing
    rig.cache.discard(swapped)
    rig.verify()
    assert rig.tree.evict(2) == 2


def test_evicting_does_not_walk_over_what_stays() -> None:
    """Counted in pages that are looked at, not in seconds: as many in a large tree as in a small one, though the least
    recently used pages are those of a sequence that still runs."""

    def looked_at(texts: int) -> int:
        rig = Rig(20 + 5 * texts)
        busy = rig.cache.new()
        rig.read("", busy, words(16 * 19))
        rig.tree.insert("", words(16 * 19), busy)
        for i in range(texts):
            seq = rig.cache.new()
            rig.read("", seq, words(80, i + 1))
            rig.tree.insert("", words(80, i + 1), seq, final=True)
            rig.cache.free(seq)
        assert rig.tree.evict(1) == 1  # what has become idle is queued
        asked = 0
        references = rig.cache.references

        def counting(page: int) -> int:
            nonlocal asked
            asked += 1
            return references(page)

        rig.cache.references = counting  # type: ignore[method-assign]
        assert rig.tree.evict(3) == 3
        rig.cache.references = references  # type: ignore[method-assign]
        rig.verify()
        return asked

    assert looked_at(100) == looked_at(4) < 20


def test_nothing_is_kept_of_pages_that_went_another_way() -> None:
    rig = Rig(16)
    for i in range(400):
        rig.run("", words(40, i))
        rig.tree.evict(1)
        rig.tree.clear()
    assert len(rig.tree._heap) < 100 and not rig.tree.pages


# -- swapping ------------------------------------------------------------------------------------------------


def test_a_second_time_only_what_is_new_is_copied() -> None:
    rig = Rig(10)
    text, seq = words(70), rig.cache.new()
    rig.read("", seq, text)
    swapped = rig.cache.swap_out(seq)
    assert rig.storage.read == 5 and rig.cache.free_pages == 10
    with pytest.raises(KeyError):
        rig.cache.length(seq)
    seq = rig.cache.swap_in(swapped)
    rig.check("", seq, text)
    longer = text + words(30, 1)
    rig.read("", seq, longer)
    swapped = rig.cache.swap_out(seq)
    assert rig.storage.read == 5 + 3  # the page that was not full, and two more
    seq = rig.cache.swap_in(swapped)
    rig.check("", seq, longer)
    rig.cache.truncate(seq, 40)
    rig.read("", seq, text[:40] + words(30, 2))
    seq = rig.cache.swap_in(rig.cache.swap_out(seq))
    rig.check("", seq, text[:40] + words(30, 2))
    assert rig.storage.read == 8 + 3
    rig.verify()


def test_shared_pages_stay_and_follow_when_their_place_is_needed() -> None:
    rig = Rig(6)
    text = words(64)
    rig.run("", text[:48])
    seq = rig.cache.new()
    rig.tree.attach("", text, seq)
    rig.read("", seq, text)
    swapped = rig.cache.swap_out(seq)
    assert rig.storage.read == 1 and rig.cache.free_pages == 3 and rig.cache.available_pages == 6
    other = rig.cache.new()
    rig.read("b", other, words(90, 5))
    assert rig.storage.read == 4 and not swapped.held
    with pytest.raises(CapacityError, match="needs 4 pages to return"):
        rig.cache.swap_in(swapped)
    rig.verify()
    rig.cache.free(other)
    rig.check("", rig.cache.swap_in(swapped), text)
    rig.verify()
