"""Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864).

Heads are rotated in halves: channel `i` pairs with channel `i + C/2`.
Shapes: `T` rows, `H` heads, `C` head width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def inverse_frequencies(head_dim: int, theta: float) -> NDArray[np.float64]:
    """theta ** (-2i / C) for i in 0..C/2-1: radians per position. [C/2]"""
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def scale_llama3(
    inv_freq: NDArray[np.float64],
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original: int,
) -> NDArray[np.float64]:
    """Context extension of Llama 3.1 (https://arxiv.org/abs/2407.21783): frequencies with fewer than
    `low_freq_factor` turns in the original context are divided by `factor`, those with more than
    `high_freq_factor` turns stay, those between are blended linearly in the number of turns. [C/2] -> [C/2]
    """
    turns = original * inv_freq / (2 * math.pi)
    keep = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return inv_freq * (keep + (1.0 - keep) / factor)


def cos_sin(
    inv_freq: NDArray[np.float64], positions: NDArray[np.int64], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables f32[T, C/2], from angles in float64 so that far positions keep their precision."""
    import torch

    angles = positions[:, None] * inv_freq[None, :]
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate every head: x f32[T, H, C], tables f32[T, C/2] -> f32[T, H, C]"""
    import torch

    a, b = x.chunk(2, dim=-1)
    c, s = cos[:, None, :], sin[:, None, :]
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)
