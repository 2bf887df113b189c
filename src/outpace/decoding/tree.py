"""Draft trees: lookups, checks, and merging several drafts into one.

Shapes: `n` nodes of a draft, in topological order (`parents[i] < i`), `NO_PARENT` for children of the root,
which is the last committed token.
"""

from __future__ import annotations

import numpy as np

from ..types import NO_PARENT, Draft, IntArray
from .contracts import node_depths

__all__ = ["ancestors", "check_draft", "child_lookup", "children", "node_depths", "path_to"]


def child_lookup(draft: Draft) -> dict[tuple[int, int], int]:
    """(parent, token) -> node; the first of several equal siblings."""
    lookup: dict[tuple[int, int], int] = {}
    keys = zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True)
    for node, key in enumerate(keys):
        lookup.setdefault(key, node)
    return lookup


def children(parents: IntArray) -> dict[int, list[int]]:
    """parent -> its nodes in their order in the draft; parents without children are absent."""
    lists: dict[int, list[int]] = {}
    for node, parent in enumerate(parents.tolist()):
        lists.setdefault(parent, []).append(node)
    return lists


def path_to(parents: IntArray, node: int) -> list[int]:
    """Nodes from a child of the root down to `node`, both included; empty for the root itself."""
    path: list[int] = []
    while node != NO_PARENT:
        path.append(node)
        node = int(parents[node])
    return path[::-1]


def ancestors(parents: IntArray) -> list[list[int]]:
    """For each node its path from the root, itself included."""
    paths: list[list[int]] = []
    for node, parent in enumerate(parents.tolist()):
        paths.append([*(paths[parent] if parent >= 0 else ()), node])
    return paths


def check_draft(draft: Draft, budget: int, vocab_size: int) -> None:
    """Assert that a draft keeps the contract: shapes, topological order, range, budget."""
    n = len(draft)
    assert n <= budget, f"{n} nodes for a budget of {budget}"
    assert draft.tokens.shape == draft.parents.shape == (n,)
    assert len(draft.sources) == n
    assert draft.scores is None or draft.scores.shape == (n,)
    assert draft.q is None or draft.q.shape == (n, vocab_size)
    if n:
        assert (draft.parents < np.arange(n)).all() and (draft.parents >= NO_PARENT).all()
        assert (draft.tokens >= 0).all() and (draft.tokens < vocab_size).all()
