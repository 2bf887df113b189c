"""Argmax, top-k and normalisation over rows of logits. Ties go to the smaller id, on every path."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


def row_argmax(logits: torch.Tensor) -> NDArray[np.int64]:
    """f32[R, V] -> i64[R]"""
    return row_topk(logits, 1)[1][:, 0]


def row_topk(logits: torch.Tensor, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """f32[R, V] -> values f32[R, k] falling, ids i64[R, k]. `k` is at most V; logits are not NaN."""
    if logits.device.type == "cpu" and logits.stride(-1) == 1 and logits.dtype == torch.float32:
        from .cpu.search import top_rows

        values = np.empty((len(logits), k), dtype=np.float32)
        ids = np.empty((len(logits), k), dtype=np.int64)
        top_rows(logits.data_ptr(), 4 * logits.stride(0), logits.shape[1], values, ids)
        return values, ids
    # a stable sort keeps equal logits in order of their ids, which topk does not promise
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    return ordered[:, :k].cpu().numpy(), order[:, :k].cpu().numpy()


def row_logsumexp(logits: torch.Tensor) -> NDArray[np.float64]:
    """f32[R, V] -> f64[R]; rows may hold -inf, but not only that."""
    if logits.device.type == "cpu":
        # by numpy, on this thread: torch would share the few elements among its threads, and wait for all of them
        rows = logits.numpy()
        highest = rows.max(axis=1, keepdims=True)
        sums: NDArray[np.float64] = np.exp(rows - highest).sum(axis=1, dtype=np.float64)
        return np.log(sums) + highest[:, 0]
    return torch.logsumexp(logits, dim=-1).cpu().double().numpy()
