"""Argmax and top-k over rows of logits. Ties go to the smaller id, on every path."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


def row_argmax(logits: torch.Tensor) -> NDArray[np.int64]:
    """f32[R, V] -> i64[R]"""
    return logits.argmax(dim=-1).cpu().numpy()


def row_topk(logits: torch.Tensor, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """f32[R, V] -> values f32[R, k] falling, ids i64[R, k]"""
    values, ids = logits.topk(k, dim=-1)
    return values.cpu().numpy(), ids.cpu().numpy()
