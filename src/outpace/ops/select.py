"""Argmax, top-k and normalisation over rows of logits. Ties go to the smaller id, on every path."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..types import Logits


def row_argmax(logits: Logits, threads: int = 1) -> NDArray[np.int64]:
    """f32[R, V] -> i64[R]"""
    return row_topk(logits, 1, threads)[1][:, 0]


def row_topk(logits: Logits, k: int, threads: int = 1) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """f32[R, V] -> values f32[R, k] falling, ids i64[R, k]. `k` is at most V; logits are not NaN. `threads` share the
    rows of logits on the CPU."""
    on_host = _on_host(logits)
    if on_host is not None:
        from .cpu.top import top  # numba

        return top(on_host, k, threads)
    assert not isinstance(logits, np.ndarray)
    # a stable sort keeps equal logits in order of their ids, which topk does not promise
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    return ordered[:, :k].cpu().numpy(), order[:, :k].cpu().numpy()


def row_logsumexp(logits: Logits) -> NDArray[np.float64]:
    """f32[R, V] -> f64[R]; rows may hold -inf, but not only that."""
    rows = logits if isinstance(logits, np.ndarray) else logits.numpy() if logits.device.type == "cpu" else None
    if rows is not None:
        # by numpy, on this thread: torch would share the few elements among its threads, and wait for all of them
        highest = rows.max(axis=1, keepdims=True)
        sums: NDArray[np.float64] = np.exp(rows - highest).sum(axis=1, dtype=np.float64)
        return np.log(sums) + highest[:, 0]
    assert not isinstance(logits, np.ndarray)
    return logits.logsumexp(dim=-1).cpu().double().numpy()


def _on_host(logits: Logits) -> NDArray[np.float32] | None:
    """Rows that the kernels can read where they are: f32 in this machine's memory, each without gaps."""
    if not isinstance(logits, np.ndarray):
        if logits.device.type != "cpu":
            return None
        logits = logits.detach().numpy()
    return (
        logits if logits.dtype == np.float32 and logits.strides[-1] == 4 else np.ascontiguousarray(logits, np.float32)
    )
