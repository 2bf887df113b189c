"""Keys of small norm are looked at most."""

from __future__ import annotations

import numpy as np

from ...registry import register
from ...types import FloatArray
from .policy import KVPolicy, Scored


@register(
    kind="policy",
    family="KVC",
    title="Key norm",
    paper="https://arxiv.org/abs/2406.11430",
    exactness="approximate",
    claim="half of the cache without loss in language modelling, 90 % in passkey retrieval",
)
class KeyNorm(KVPolicy):
    """Keeps the places whose keys have the smallest norm, which no query is needed for. Devoto et al., "A Simple and
    Effective L2 Norm-Based Strategy for KV Cache Compression"."""

    name = "knorm"
    paper = "https://arxiv.org/abs/2406.11430"

    def score(self, layer: int, head: int, there: Scored) -> FloatArray:
        return np.asarray(-np.linalg.norm(there.keys, axis=1), dtype=np.float32)
