"""Makes segments: copies what a policy keeps of a sequence into head pages, and gives the rest back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import CapacityError, ParameterError
from ..models.batch import Ragged
from .allocator import PageAllocator
from .places import Places
from .segments import HeadPages, Kept, Segment, checked
from .storage import PAGE_SIZE, KVStorage

if TYPE_CHECKING:
    from .native_storage import NativeStorage
    from .pages import PagedKVCache

_LANES = np.arange(PAGE_SIZE)


def splits(storage: KVStorage) -> NativeStorage:
    """Raises ParameterError where pages cannot be split."""
    from .native_storage import NativeStorage

    if not isinstance(storage, NativeStorage):
        raise ParameterError("keys and values of single heads can be left out by the CPU decoder alone")
    return storage


def places_of(
    s: Places, storage: KVStorage, layer: int, head: int, tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Head pages of a layer and head, up to `tokens` places of the sequence's own pages, and the positions of all
    places in them."""
    own = splits(storage).head_pages(np.array(s.pages[: tokens // PAGE_SIZE], dtype=np.int64))[layer, head]
    positions = np.arange(s.before, s.before + tokens, dtype=np.int32)
    if s.segment is None:
        return own, positions
    pages = np.concatenate([s.segment.pages[layer][head], own])
    return pages.astype(np.int64), np.concatenate([s.segment.positions[layer][head], positions])


def compact(s: Places, tokens: int, kept: Kept, heads: HeadPages, cache: PagedKVCache) -> None:
    """See PagedKVCache.compact."""
    storage, allocator = splits(cache.storage), cache._pages
    layers, kv_heads = storage.keys.shape[0], storage.keys.shape[2]
    there = np.full((layers, kv_heads), tokens) + (0 if s.segment is None else s.segment.before)
    checked(kept, there.astype(np.int32))
    found = [[places_of(s, storage, i, h, tokens) for h in range(kv_heads)] for i in range(layers)]
    source = np.concatenate(
        [
            (pages[numbers // PAGE_SIZE] * PAGE_SIZE + numbers % PAGE_SIZE)
            for row, wanted in zip(found, kept, strict=True)
            for (pages, _), numbers in zip(row, wanted, strict=True)
        ]
    )
    count = len(source) // PAGE_SIZE
    _make_room(s, tokens, count, heads, cache)
    for page in s.drop_first(tokens // PAGE_SIZE):
        allocator.leave(page)
    old, before = s.segment, s.before
    if old is not None:
        release_segment(old, heads, allocator)
    needed = heads.pages_needed(count)
    cache._reclaim(needed - cache.free_pages)
    for _ in range(needed):
        page = allocator.take()
        heads.split(page, storage.head_pages(np.array([page])))
    taken = np.array(heads.take(count), dtype=np.int32)
    storage.gather(source, (taken[:, None].astype(np.int64) * PAGE_SIZE + _LANES).ravel())
    ends = np.cumsum([len(numbers) // PAGE_SIZE for wanted in kept for numbers in wanted])[:-1]
    parts = np.split(taken, ends)
    pages = [parts[i * kv_heads : (i + 1) * kv_heads] for i in range(layers)]
    positions = [
        [places[numbers] for (_, places), numbers in zip(row, wanted, strict=True)]
        for row, wanted in zip(found, kept, strict=True)
    ]
    s.segment, s.ragged = Segment(before + tokens, pages, positions), None


def _make_room(s: Places, tokens: int, count: int, heads: HeadPages, cache: PagedKVCache) -> None:
    """Raises CapacityError where too many of the pages stay with others."""
    leaving = sum(cache._pages.sequences(page) == 1 for page in s.pages[: tokens // PAGE_SIZE])
    own = s.segment.head_pages if s.segment is not None and s.segment.holders == 1 else 0
    missing = heads.pages_needed(max(count - own, 0)) - leaving - cache.available_pages
    if missing > 0:
        raise CapacityError(
            f"the KV cache is full: what is kept of {tokens} tokens needs {missing} pages more than are free, since "
            "others use the same ones; use a larger cache, or fewer sequences at once"
        )


def release_segment(segment: Segment, heads: HeadPages, allocator: PageAllocator) -> None:
    """One sequence less has it."""
    segment.holders -= 1
    if not segment.holders:
        for page in heads.give(segment.numbers()):
            allocator.leave(page)


def ragged(s: Places, storage: KVStorage) -> Ragged | None:
    """What the kernels read of a sequence with a segment; kept until its pages change."""
    if s.segment is None:
        return None
    if s.ragged is None or s.ragged[0] != s.pages:
        own = splits(storage).head_pages(np.array(s.pages, dtype=np.int64))
        s.ragged = list(s.pages), Ragged(s.segment.table(own), s.segment.before)
    return s.ragged[1]
