"""The prefix tree: keys and values of texts that were read before, kept for the next text that begins as they do.

A radix tree (RadixAttention, Zheng et al., 2023, https://arxiv.org/abs/2312.07104, section 3) whose digits are pages:
a node is one page, its key the bytes of that page's tokens. Looking a page up is one lookup in a dictionary, and
nothing is ever split.

    root of owner A -- [system prompt, 16 tokens] -- [16 tokens] -- [question 1, 16 tokens] -- [its end, 5 tokens]
                                                  `- [question 2, 16 tokens]
    root of owner B -- ...

Matches end at any token: siblings are also kept in order, so that the one with the longest common beginning stands
next to where the text would stand (tokens are written big-endian: the order of bytes is the order of tokens). A
sequence that adopts a page of which it needs a part copies it when it first writes, as after a fork.

Which page was used least recently is found without a walk over all of them: leaves that only the tree holds stand in a
heap by the time of their last use, each once. A leaf that was used since is put back by its new time when it is met.

Only leaves may be partly filled; one goes when a sibling has all of its tokens and more. Pages are never written while
they are here, because the tree's own reference makes them shared.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Sequence
from heapq import heapify, heappop, heappush
from itertools import count

import numpy as np

from .pages import PAGE_SIZE, PagedKVCache

_TOKEN = 4  # bytes
_PAGE = PAGE_SIZE * _TOKEN


class _Node:
    """One page. `order`: the keys of the children, sorted. `used`: when last, counted in uses; no two nodes have the
    same, and no child a later one than its parent. `queued`: whether it stands in the heap."""

    __slots__ = ("children", "key", "order", "page", "parent", "queued", "used")

    def __init__(self, key: bytes, page: int, parent: _Node | None) -> None:
        self.key, self.page, self.parent = key, page, parent
        self.used, self.queued = 0, False
        self.children: dict[bytes, _Node] = {}
        self.order: list[bytes] = []

    def add(self, child: _Node) -> None:
        self.children[child.key] = child
        insort(self.order, child.key)

    def remove(self, child: _Node) -> None:
        del self.children[child.key]
        del self.order[bisect_left(self.order, child.key)]

    def nearest(self, key: bytes) -> tuple[_Node | None, int]:
        """The child that shares most tokens with `key` from the start, and how many."""
        at = bisect_left(self.order, key)
        best, shared = None, 0
        for other in self.order[max(at - 1, 0) : at + 1]:
            differs = (i for i, (a, b) in enumerate(zip(key, other, strict=False)) if a != b)
            same = next(differs, min(len(key), len(other))) // _TOKEN
            if same > shared:
                best, shared = self.children[other], same
        return best, shared


class _Root(_Node):
    """Where the texts of one owner begin."""

    __slots__ = ("owner",)

    def __init__(self, owner: Hashable) -> None:
        super().__init__(b"", -1, None)
        self.owner = owner


class PrefixTree:
    """Shares pages of `cache` between sequences of one owner that begin alike. Gives back what is needed (`Reclaimer`).

    Not thread-safe, as the cache. The same tokens always stand for the same keys and values: whoever reads them through
    another decoder or another view needs another owner, or another tree.
    """

    def __init__(self, cache: PagedKVCache) -> None:
        assert cache.reclaimer is None, "a cache has one prefix tree"
        self.cache = cache
        cache.reclaimer = self
        self._roots: dict[Hashable, _Root] = {}
        self._nodes: dict[int, _Node] = {}  # by page
        self._heap: list[tuple[int, _Node]] = []  # leaves that may be evicted, by a use that is not after their last
        self._uses = count(1)
        self.asked = self.hit = 0  # tokens of attached texts, and those of them that were found

    # -- finding and keeping -------------------------------------------------------------------------------

    def match(self, owner: Hashable, tokens: Sequence[int]) -> int:
        """How many of the first tokens are here. At most all but the last, which must be run for its logits."""
        return self._find(owner, tokens)[1]

    def needs(self, owner: Hashable, tokens: Sequence[int]) -> tuple[int, int]:
        """What `attach` would find: tokens, and by how many pages it would lower the cache's `available_pages`, since
        no sequence uses them now."""
        path, length = self._find(owner, tokens)
        return length, sum(self.cache.is_idle(node.page) for node in path)

    def attach(self, owner: Hashable, tokens: Sequence[int], seq: int) -> int:
        """Let the empty sequence `seq` begin with the longest match. Returns its length."""
        path, length = self._find(owner, tokens)
        self.asked += len(tokens)
        self.hit += length
        if length:
            self.cache.adopt(seq, [node.page for node in path], length)
            self._touch(path)
        return length

    def insert(self, owner: Hashable, tokens: Sequence[int], seq: int, final: bool = False) -> None:
        """Keep the pages of the committed places 0..len(tokens)-1 of `seq`, which hold these tokens: whole pages, and
        with `final` the last one too. `final` is for a sequence that ends: one that writes on would have to copy.

        What is here already stays as it is, and the pages of `seq` for it remain its own.
        """
        length = len(tokens) if final else len(tokens) // PAGE_SIZE * PAGE_SIZE
        if not length:
            return
        pages, data = self.cache.share(seq, length), _bytes(tokens, length)
        node: _Node = self._roots.setdefault(owner, _Root(owner))
        path = []
        for i, page in enumerate(pages):
            key = data[i * _PAGE : (i + 1) * _PAGE]
            child = node.children.get(key)
            if child is None:
                child = self._longer(node, key)
            if child is None:
                child = self._add(node, key, page)
            path.append(child)
            node = child
        self._touch(path)
        self._find_idle()  # a few at a time, not all when the first page is wanted

    def _find(self, owner: Hashable, tokens: Sequence[int]) -> tuple[list[_Node], int]:
        """The pages of the longest match, and its tokens."""
        path: list[_Node] = []
        node: _Node | None = self._roots.get(owner)
        if node is None:
            return path, 0
        data = _bytes(tokens, len(tokens) - 1)
        for start in range(0, len(data), _PAGE):
            key = data[start : start + _PAGE]
            child = node.children.get(key)
            if child is None:
                child, shared = node.nearest(key)
                if child is not None:
                    path.append(child)
                return path, start // _TOKEN + shared
            path.append(child)
            node = child
        return path, len(data) // _TOKEN

    @staticmethod
    def _longer(node: _Node, key: bytes) -> _Node | None:
        """A child that has all tokens of `key` and more."""
        at = bisect_left(node.order, key)
        return node.children[node.order[at]] if at < len(node.order) and node.order[at].startswith(key) else None

    def _add(self, parent: _Node, key: bytes, page: int) -> _Node:
        self.cache.retain([page])
        at = bisect_left(parent.order, key)
        shorter = parent.order[at - 1] if at else None
        if shorter is not None and key.startswith(shorter):
            # A leaf that the new page makes needless. It may be the same page, from a fork that ended earlier in it.
            self._remove(parent.children[shorter])
        assert page not in self._nodes, f"page {page} is here already, for another text or owner"
        child = self._nodes[page] = _Node(key, page, parent)
        parent.add(child)
        if isinstance(parent, _Root):  # which the leaf may have been the last to hold
            self._roots[parent.owner] = parent
        return child

    def _touch(self, path: list[_Node]) -> None:
        """Used now. From the end, so that children go before their parents."""
        for node in reversed(path):
            node.used = next(self._uses)

    # -- giving back ---------------------------------------------------------------------------------------

    def evict(self, pages: int) -> int:
        """Free so many pages, or all there are: the least recently used first, children before parents. Returns how
        many are free now. Pages that somebody else holds stay, since they free nothing; they go only where they stand
        below one that nobody does, when nothing else is left.
        """
        freed = 0
        self._find_idle()
        while freed < pages and self._heap:
            used, node = heappop(self._heap)
            node.queued = False
            if self._nodes.get(node.page) is not node or not self._evictable(node):
                continue  # it is queued again when it may go
            if node.used > used:
                self._queue(node)
            else:
                freed += self._remove(node)
        if freed < pages:  # rarely: two texts that were read side by side share pages of which only some are in use
            for node in sorted(filter(self._idle, self._nodes.values()), key=lambda node: node.used):
                if freed >= pages:
                    break
                if node.page in self._nodes:
                    freed += self._prune(node)
        return freed

    def _find_idle(self) -> None:
        """Queue the leaves that sequences have left since the last time."""
        while self.cache.left:
            node = self._nodes.get(self.cache.left.pop())
            if node is not None and self._evictable(node):
                self._queue(node)

    def _evictable(self, node: _Node) -> bool:
        return not node.children and self._idle(node)

    def _queue(self, node: _Node) -> None:
        if node.queued:
            return
        node.queued = True
        if len(self._heap) > 2 * len(self._nodes) + 64:  # nodes that went another way
            self._heap = [(used, n) for used, n in self._heap if self._nodes.get(n.page) is n]
            heapify(self._heap)
        heappush(self._heap, (node.used, node))

    def surrender(self, page: int) -> None:
        """Drop a page that somebody else uses, and what stands below it."""
        if page in self._nodes:
            self._prune(self._nodes[page])

    def clear(self, owner: Hashable = None) -> None:
        """Forget everything, or everything of one owner."""
        for name in [owner] if owner is not None else list(self._roots):
            root = self._roots.get(name)
            for child in list(root.children.values()) if root is not None else ():
                self._prune(child)

    def _prune(self, node: _Node) -> int:
        """Remove a node and all below it; returns how many pages are free now."""
        below = [node]
        for one in below:
            below += one.children.values()
        return sum(self._remove(one) for one in reversed(below))

    def _remove(self, node: _Node) -> bool:
        """Remove a leaf; whether its page is free now."""
        assert not node.children and node.parent is not None
        freed = self._idle(node)
        del self._nodes[node.page]
        node.parent.remove(node)
        self.cache.drop([node.page])
        if isinstance(node.parent, _Root):
            if not node.parent.children:
                del self._roots[node.parent.owner]
        elif self._evictable(node.parent):
            self._queue(node.parent)
        return freed

    def _idle(self, node: _Node) -> bool:
        """Whether only the tree holds its page."""
        return self.cache.references(node.page) == 1

    # -- questions -----------------------------------------------------------------------------------------

    @property
    def evictable(self) -> int:
        """Pages that `evict` could free."""
        return sum(map(self._idle, self._nodes.values()))

    @property
    def pages(self) -> int:
        return len(self._nodes)

    @property
    def tokens(self) -> int:
        return sum(len(node.key) for node in self._nodes.values()) // _TOKEN

    def check_integrity(self) -> None:
        """Walk the whole tree and compare; AssertionError on a difference."""
        seen: set[int] = set()
        queued = {id(node) for _, node in self._heap}
        below: list[_Node] = list(self._roots.values())
        assert all(root.children for root in below), "an owner without pages is remembered"
        for node in below:
            assert node.order == sorted(node.children), "children are out of order"
            for key, other in zip(node.order, node.order[1:], strict=False):
                assert not other.startswith(key), "a leaf is held that a sibling makes needless"
            for key, child in node.children.items():
                assert child.key == key and child.parent is node and self._nodes[child.page] is child
                assert 0 < len(key) <= _PAGE and (len(key) == _PAGE or not child.children), (
                    "a partly filled page inside"
                )
                assert child.page not in seen, f"page {child.page} stands for two texts"
                assert self.cache.references(child.page) > 0, f"page {child.page} is free"
                assert node.parent is None or child.used < node.used, "a parent would go before its child"
                assert child.queued == (id(child) in queued), "a page is queued twice or not at all"
                assert child.queued or child.page in self.cache.left or not self._evictable(child), (
                    "a page would never be evicted"
                )
                seen.add(child.page)
                below.append(child)
        assert seen == set(self._nodes), "a page is lost"


def _bytes(tokens: Sequence[int], length: int) -> bytes:
    """The first `length` tokens, so that their order is that of their bytes."""
    return np.asarray(tokens[: max(length, 0)], dtype=">u4").tobytes()
