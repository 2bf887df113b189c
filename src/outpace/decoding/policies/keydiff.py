"""Keys that differ from the others are looked at most."""

from __future__ import annotations

import numpy as np

from ...registry import register
from ...types import FloatArray
from .policy import KVPolicy, Scored


@register(
    kind="policy",
    family="KVC",
    title="KeyDiff",
    paper="https://arxiv.org/abs/2504.15364",
    exactness="approximate",
    claim="less than 0.04 % lost on LongBench with a cache of 8,192 tokens (23 % smaller; Llama 3.1-8B)",
)
class KeyDiff(KVPolicy):
    """Keeps the places whose keys point away from the mean of all directions. Park et al., "KeyDiff: Key
    Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained Environments"."""

    name = "keydiff"
    paper = "https://arxiv.org/abs/2504.15364"

    def score(self, layer: int, head: int, there: Scored) -> FloatArray:
        directions = there.keys / np.maximum(np.linalg.norm(there.keys, axis=1, keepdims=True), 1e-12)
        return np.asarray(-(directions @ directions.mean(axis=0)), dtype=np.float32)
