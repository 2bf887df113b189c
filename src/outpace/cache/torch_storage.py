"""Keys and values as two torch tensors, on any device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from .storage import PAGE_SIZE, KVStorage, PageBlob


class TorchStorage(KVStorage):
    """`k` and `v` [L, pages, PAGE_SIZE, Hkv, C]; `k_slots`, `v_slots` [L, slots, Hkv, C] view them."""

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_pages, PAGE_SIZE, num_kv_heads, head_dim)
        self.num_pages = num_pages
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.k_slots = self.k.view(num_layers, num_pages * PAGE_SIZE, num_kv_heads, head_dim)
        self.v_slots = self.v.view_as(self.k_slots)
        self.bytes_per_page = 2 * num_layers * PAGE_SIZE * num_kv_heads * head_dim * dtype.itemsize

    def copy_pages(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        self._copy(self.k, source, target)
        self._copy(self.v, source, target)

    def move(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        self._copy(self.k_slots, source, target)
        self._copy(self.v_slots, source, target)

    def read_pages(self, pages: NDArray[np.int64]) -> PageBlob:
        index = torch.from_numpy(pages).to(self.k.device)
        return self.k[:, index].cpu(), self.v[:, index].cpu()

    def write_pages(self, blob: PageBlob, pages: NDArray[np.int64]) -> None:
        index = torch.from_numpy(pages).to(self.k.device)
        self.k[:, index], self.v[:, index] = (part.to(self.k.device) for part in blob)

    @staticmethod
    def _copy(x: torch.Tensor, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        """The gather on the right is complete before anything is written."""
        s, t = torch.from_numpy(source).to(x.device), torch.from_numpy(target).to(x.device)
        x[:, t] = x[:, s]
