"""A compact copy of complete KV pages, for drafts: four bits for each number, and four more below them if wanted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..models.batch import Compact
from ..ops.cpu.kv_int4 import lower_bytes, quantise_pages, record_bytes
from .native_storage import NativeStorage, zeros
from .pages import PAGE_SIZE, PagedKVCache

U8 = NDArray[np.uint8]


class QuantizedPages:
    """The upper four bits (`bits` = 4), or both halves (8), of pages that hold committed tokens only.

    Tiwari et al., QuantSpec (https://arxiv.org/abs/2502.10424), section 4: keys are quantised by channel and values by
    place, asymmetrically, and the lower four bits code what the upper four left. Here a channel of keys has a middle
    in each page and one spread in the whole store (from the first pages that are quantised), and a place has a gain.

    A page is quantised once, when it is first read: sequences that share a page share its
    copy. It is done anew when the cache has since given the page away (`PagedKVCache.generations`). Memory is set aside
    like the cache's own, page by page as it is touched; all in all 18 C + 192 bytes for the 64 C of a page of one KV
    head of width C (0.30 at C = 128), and 16 C more with the lower bits (0.55). Not thread-safe, as the cache.
    """

    def __init__(self, cache: PagedKVCache, bits: int) -> None:
        storage = cache.storage
        assert isinstance(storage, NativeStorage) and storage.pair == 2, "only bf16 pages of the CPU are quantised"
        assert bits in (4, 8), f"{bits} bits"
        self.cache, self.storage, self.bits = cache, storage, bits
        layers, pages, heads, half = storage.keys.shape[:4]
        self.width = 2 * half
        self.codes: U8 = zeros((layers, pages, heads, record_bytes(self.width)), np.uint8)
        self.lower: U8 | None = zeros((layers, pages, heads, lower_bytes(self.width)), np.uint8) if bits == 8 else None
        self.bytes_per_page = (self.codes.nbytes + (self.lower.nbytes if self.lower is not None else 0)) // pages
        self.stamps = np.full(pages, -1, dtype=np.int64)  # generation of each page when it was quantised
        self.spread: NDArray[np.float32] | None = None  # [L, Hkv, C]
        self._layout = np.zeros(9, dtype=np.int64)
        self._layout[:4] = self.codes.ctypes.data, *self.codes.strides[:3]
        if self.lower is not None:
            self._layout[4:8] = self.lower.ctypes.data, *self.lower.strides[:3]

    def compact(self, seqs: Sequence[int], recent: int) -> Compact:
        """What a draft forward of these sequences reads in few bits: all complete pages but the `recent` last ones."""
        counts = [max(self.cache.length(seq) // PAGE_SIZE - recent, 0) for seq in seqs]
        for seq, count in zip(seqs, counts, strict=True):
            self.refresh(self.cache.page_table(seq)[:count])
        return Compact(self._layout, np.array(counts, dtype=np.int32))

    def refresh(self, pages: NDArray[np.int32]) -> None:
        """Quantise those of some pages whose copy is missing or of an earlier content."""
        generations = self.cache.generations
        stale = pages[self.stamps[pages] != generations[pages]]
        if len(stale):
            if self.spread is None:
                self.spread = self._spread(stale)
                self._layout[8] = self.spread.ctypes.data
            self._quantise(stale, self.codes, self.lower)
            self.stamps[stale] = generations[stale]

    @property
    def pages_held(self) -> int:
        """Pages whose copy is good; a free page keeps its own until it is taken."""
        return int((self.stamps == self.cache.generations).sum())

    @property
    def bytes_used(self) -> int:
        """Of all pages that were ever quantised: memory that was touched stays."""
        return int((self.stamps >= 0).sum()) * self.bytes_per_page

    @property
    def bytes_total(self) -> int:
        return len(self.stamps) * self.bytes_per_page

    def check_integrity(self) -> None:
        """Quantise every page with a good copy anew; AssertionError if a copy differs. Linear in pages."""
        pages = np.flatnonzero(self.stamps == self.cache.generations).astype(np.int32)
        if not len(pages):
            return
        codes = np.zeros_like(self.codes)
        lower = None if self.lower is None else np.zeros_like(self.lower)
        self._quantise(pages, codes, lower)
        for name, kept, fresh in (("upper", self.codes, codes), ("lower", self.lower, lower)):
            if kept is not None and fresh is not None:
                wrong = (kept[:, pages] != fresh[:, pages]).any(axis=(0, 2, 3))
                assert not wrong.any(), f"the {name} bits of pages {pages[wrong].tolist()} are of another content"

    def _spread(self, pages: NDArray[np.int32]) -> NDArray[np.float32]:
        """How far each channel's keys go from their middle, in the mean over pages; at least a hundredth of the head's
        mean, so that what lies still in these pages may move in others."""
        near = self.storage.keys[:, pages[:: max(len(pages) // 16, 1)]].astype(np.uint32)
        exact = (near << 16).view(np.float32)  # [L, P, Hkv, C / 2, PAGE_SIZE, 2]
        reach = (exact.max(axis=4) - exact.min(axis=4)).mean(axis=1).reshape(*exact.shape[:1], -1, self.width)
        spread: NDArray[np.float32] = np.maximum(reach, 0.01 * reach.mean(axis=2, keepdims=True)) / 2
        return np.ascontiguousarray(spread, dtype=np.float32)

    def _quantise(self, pages: NDArray[np.int32], codes: U8, lower: U8 | None) -> None:
        layers, _, heads, _ = codes.shape
        assert self.spread is not None
        quantise_pages(
            self.storage.keys.ctypes.data, self.storage.values.ctypes.data, *self.storage.strides, self.width,
            np.ascontiguousarray(pages), self.spread.ctypes.data,
            codes.ctypes.data, (layers, heads, *codes.strides[:3]),
            0 if lower is None else lower.ctypes.data, (0, 0, 0) if lower is None else lower.strides[:3],
        )  # fmt: skip
