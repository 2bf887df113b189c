"""The contract of KV policies: what each layer and head keeps of a prompt once it was read.

A policy scores places and says how many each layer and head keeps; the cache alone copies and frees. It runs at one
point of a text alone, the end of its prompt, so that what is kept depends on the prompt and on nothing else: not on how
it was cut into chunks, on what shares a step, on drafts, or on a preemption in between. Until then pages are as without
a policy, and shared with other prompts that begin alike.

Shapes: `L` layers, `Hkv` KV heads, `N` places that may be given up, `W` rows of the window, `C` head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ...cache.pages import PAGE_SIZE, PagedKVCache
from ...errors import ParameterError
from ...types import FloatArray


@dataclass(frozen=True, slots=True)
class Scored:
    """What a head may give up: rotated keys and values f32[N, C], their positions i32[N], and the rotated and scaled
    queries of the window's last rows, f32[W, group, C], if the policy has a window."""

    keys: FloatArray
    values: FloatArray
    positions: NDArray[np.int32]
    queries: FloatArray | None


Held = tuple[FloatArray, FloatArray, NDArray[np.int32]]


class KVPolicy(ABC):
    """Keeps `budget` of a prompt's places. The first `sinks` and the last `recent` are always kept.

    Raises ParameterError for values out of range.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    #: Rows at the end of the prompt whose queries it looks at
    window: int = 0

    def __init__(self, budget: float = 0.25, sinks: int = 4, recent: int = 32) -> None:
        if not 0 < budget <= 1:
            raise ParameterError(f"{self.name}:budget={budget} is out of range: it is a share of the prompt, 0 to 1")
        if sinks < 0 or recent < 1:
            raise ParameterError(f"{self.name}: sinks={sinks} and recent={recent}: at least 0 and at least 1")
        self.budget, self.sinks, self.recent = budget, sinks, max(recent, self.window)

    @abstractmethod
    def score(self, layer: int, head: int, there: Scored) -> FloatArray:
        """How much each place is worth, f32[N]; the largest are kept."""

    def allocate(self, scores: list[list[FloatArray]], each: int) -> NDArray[np.int64]:
        """How many pages each layer and head keeps, i64[L, Hkv], `each` on average. As many everywhere, if not
        overridden."""
        return np.full((len(scores), len(scores[0])), each, dtype=np.int64)

    def sealed(self, tokens: int) -> int:
        """Places of a prompt that may be given up: whole pages, without the recent ones."""
        return max(tokens - self.recent, 0) // PAGE_SIZE * PAGE_SIZE

    def compact(self, cache: PagedKVCache, seq: int, queries: dict[int, FloatArray]) -> int:
        """Carry it out on a sequence whose prompt was read; `queries[layer]` f32[W, Hq, C] of its last rows. Returns
        the bytes that are free now; 0 where the prompt is too short to gain anything."""
        tokens = cache.length(seq)
        sealed = self.sealed(tokens)
        each = round((self.budget * tokens - (tokens - sealed)) / PAGE_SIZE)
        if max(each, 1) * PAGE_SIZE >= sealed:
            return 0
        layers, heads = cache.heads
        grouped = {i: rows.reshape(len(rows), heads, -1, rows.shape[2]) for i, rows in queries.items()}
        scores = [
            [self._scored(cache.read(seq, i, h, sealed), i, h, grouped.get(i)) for h in range(heads)]
            for i in range(layers)
        ]
        pages = np.clip(self.allocate(scores, max(each, 1)), 1, sealed // PAGE_SIZE)
        kept = [
            [self._kept(one, int(count) * PAGE_SIZE) for one, count in zip(row, counts, strict=True)]
            for row, counts in zip(scores, pages, strict=True)
        ]
        return cache.compact(seq, sealed, kept)

    def _scored(self, held: Held, layer: int, head: int, queries: FloatArray | None) -> FloatArray:
        keys, values, positions = held
        mine = None
        if queries is not None:
            mine = queries[:, head]
        found = np.array(self.score(layer, head, Scored(keys, values, positions, mine)), dtype=np.float32)
        found[positions < self.sinks] = np.inf
        return found

    def _kept(self, scores: FloatArray, count: int) -> NDArray[np.int64]:
        """The places of the largest scores; of equal ones the later."""
        order = np.lexsort((np.arange(len(scores)), scores))
        return np.sort(order[len(order) - count :])

    def says(self) -> str:
        """For people: what is kept."""
        return f"{self.name}: {self.budget:.0%} of the prompt's keys and values"
