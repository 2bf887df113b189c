"""Keys and values in the layout of the CPU attention kernel (ops.cpu.attention)."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .storage import PAGE_SIZE, KVStorage, PageBlob


def zeros(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """np.zeros in ordinary memory pages. numpy asks for huge ones: a first step then touches, and the system must find
    and clear, 2 MiB in every layer for the few KiB that it writes (0.7 s for a cache of 1.5 GB)."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=np.uint8, count=size).view(dtype).reshape(shape)


class NativeStorage(KVStorage):
    """bf16 (bits as u16) or float32; `head` is the head width padded to sixteen.

    keys    bf16 [L, pages, Hkv, C/2, PAGE_SIZE, 2]    float32 [L, pages, Hkv, C, PAGE_SIZE, 1]
    values  bf16 [L, pages, Hkv, PAGE_SIZE/2, C, 2]    float32 [L, pages, Hkv, PAGE_SIZE, C, 1]

    Zeroed at the start: the kernel multiplies unwritten places of a page by zero, so they must be finite.
    """

    def __init__(self, layers: int, num_pages: int, kv_heads: int, head: int, bf16: bool) -> None:
        dtype, pair = (np.uint16, 2) if bf16 else (np.float32, 1)
        self.num_pages, self.pair = num_pages, pair
        self.keys = zeros((layers, num_pages, kv_heads, head // pair, PAGE_SIZE, pair), dtype)
        self.values = zeros((layers, num_pages, kv_heads, PAGE_SIZE // pair, head, pair), dtype)
        self.bytes_per_page = (self.keys.nbytes + self.values.nbytes) // max(num_pages, 1)
        self.heads_per_page = layers * kv_heads
        layer, page, kv_head = self.keys.strides[:3]
        self.strides = (layer, page, kv_head)
        self.addresses = (self.keys.ctypes.data, self.values.ctypes.data)

    def copy_pages(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def move(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        from_page, from_lane = np.divmod(source, PAGE_SIZE)
        to_page, to_lane = np.divmod(target, PAGE_SIZE)
        self.keys[:, to_page, :, :, to_lane] = self.keys[:, from_page, :, :, from_lane]
        fp, fl = np.divmod(from_lane, self.pair)
        tp, tl = np.divmod(to_lane, self.pair)
        self.values[:, to_page, :, tp, :, tl] = self.values[:, from_page, :, fp, :, fl]

    def read_pages(self, pages: NDArray[np.int64]) -> PageBlob:
        return self.keys[:, pages], self.values[:, pages]

    def write_pages(self, blob: PageBlob, pages: NDArray[np.int64]) -> None:
        self.keys[:, pages], self.values[:, pages] = blob

    def head_pages(self, pages: NDArray[np.integer]) -> NDArray[np.int64]:
        """Numbers of the head pages that whole pages consist of, for `gather` and Ragged tables. [P] -> [L, Hkv, P]"""
        layers, count, heads = self.keys.shape[:3]
        each = (np.arange(layers)[:, None, None] * count + pages) * heads
        return each + np.arange(heads)[:, None]

    def gather(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        """Copy single places of single heads, as if all were read before any is written. A place is head page *
        PAGE_SIZE + lane."""
        (keys, values), width = (array.reshape(-1, *array.shape[3:]) for array in (self.keys, self.values)), self.pair
        (from_page, from_lane), (to_page, to_lane) = np.divmod(source, PAGE_SIZE), np.divmod(target, PAGE_SIZE)
        keys[to_page, :, to_lane] = keys[from_page, :, from_lane]
        fp, fl = np.divmod(from_lane, width)
        tp, tl = np.divmod(to_lane, width)
        values[to_page, tp, :, tl] = values[from_page, fp, :, fl]

    def head_keys(self, pages: NDArray[np.integer]) -> NDArray[np.float32]:
        """Rotated keys of head pages, place by place. [P] -> f32[P * PAGE_SIZE, C]"""
        return self._floats(self.keys.reshape(-1, *self.keys.shape[3:])[pages].transpose(0, 2, 1, 3))

    def head_values(self, pages: NDArray[np.integer]) -> NDArray[np.float32]:
        """The same of values."""
        return self._floats(self.values.reshape(-1, *self.values.shape[3:])[pages].transpose(0, 1, 3, 2))

    @staticmethod
    def _floats(array: NDArray[Any]) -> NDArray[np.float32]:
        exact = array if array.dtype == np.float32 else (array.astype(np.uint32) << 16).view(np.float32)
        if array.dtype != np.float32:  # a view of last axes that are not side by side
            exact = exact.reshape(array.shape)
        return np.ascontiguousarray(exact).reshape(array.shape[0] * PAGE_SIZE, -1)

    def page_means(self, layer: int, pages: NDArray[np.integer]) -> NDArray[np.float32]:
        """Mean of the keys of whole pages. [P] -> f32[P, Hkv, C]"""
        keys = self.keys[layer, pages]  # [P, Hkv, C / pair, PAGE_SIZE, pair]
        exact = keys if keys.dtype == np.float32 else (keys.astype(np.uint32) << 16).view(np.float32)
        count, heads, width, _, pair = keys.shape
        return exact.mean(axis=3).reshape(count, heads, width * pair)
