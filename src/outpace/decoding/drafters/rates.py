"""Measured acceptance: running averages that start from a prior.

A drafter learns from what was committed, whoever drafted it: the committed tokens say for each of its own
nodes whose parent was right whether the node was right too. Rates hold numbers, never text, so they may
outlive a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ...types import NO_PARENT, Draft, FloatArray, IntArray

_HORIZON = 400.0  # trials after which older ones fade, so that rates follow a change of text


class Rates:
    """One acceptance rate per cell of a table, each starting as `weight` trials at its prior."""

    def __init__(self, prior: ArrayLike, weight: float = 8.0) -> None:
        self.value: FloatArray = np.asarray(prior, dtype=np.float32).copy()
        self._trials = np.full(self.value.shape, weight, dtype=np.float64)

    def update(self, cell: int | tuple[int, ...], hit: bool) -> None:
        self._trials[cell] = trials = min(self._trials[cell] + 1, _HORIZON)
        self.value[cell] += (float(hit) - self.value[cell]) / trials


def checked_nodes(draft: Draft, known: Sequence[int]) -> list[tuple[int, int, bool]]:
    """Nodes that `known`, the tokens committed after the draft's root, decides: (node, depth, right).

    Those are the nodes whose ancestors are all right, as deep as `known` goes.
    """
    tested: list[tuple[int, int, bool]] = []
    depth_of_right = {NO_PARENT: -1}
    tokens, parents = draft.tokens.tolist(), draft.parents.tolist()
    for node, parent in enumerate(parents):
        above = depth_of_right.get(parent)
        if above is None or above + 1 >= len(known):
            continue
        right = tokens[node] == known[above + 1]
        tested.append((node, above + 1, right))
        if right:
            depth_of_right[node] = above + 1
    return tested


def right_prefix(tokens: IntArray, truth: IntArray) -> int:
    """How many leading tokens of a chain agree with what was committed."""
    n = min(len(tokens), len(truth))
    wrong = np.flatnonzero(tokens[:n] != truth[:n])
    return int(wrong[0]) if len(wrong) else n
