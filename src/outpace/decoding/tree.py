"""Draft trees: lookups, checks, and merging several drafts into one.

Shapes: `n` nodes of a draft, in topological order (`parents[i] < i`), `NO_PARENT` for children of the root,
which is the last committed token.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np

from ..types import NO_PARENT, Draft, FloatArray, IntArray
from .contracts import node_depths

__all__ = [
    "ancestors",
    "check_draft",
    "child_lookup",
    "children",
    "expected_accepted",
    "keep_best",
    "keep_nodes",
    "merge",
    "node_depths",
    "path_to",
    "reaches",
]

DEFAULT_SCORE = 0.5


def child_lookup(draft: Draft) -> dict[tuple[int, int], int]:
    """(parent, token) -> node; the first of several equal siblings."""
    lookup: dict[tuple[int, int], int] = {}
    if not len(draft.tokens):
        return lookup
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


def merge(drafts: Seq[Draft], budget: int, priors: Mapping[str, float] | None = None) -> Draft:
    """One tree of at most `budget` nodes from several drafts, equal prefixes shared.

    A node that several propose keeps the source of the first and the highest score. Nodes are chosen by
    the product of the scores down to them, which estimates the probability that the node is accepted, so
    their sum is the expected number of accepted tokens. A draft without scores gets `priors[source]`, or
    0.5. The result has no q: its nodes count as proposed outright.
    """
    index: dict[tuple[int, int], int] = {}  # (parent in the merged tree, token) -> merged node
    tokens: list[int] = []
    parents: list[int] = []
    sources: list[str] = []
    scores: list[float] = []
    for draft in drafts:
        where: list[int] = []
        prior = [(priors or {}).get(source, DEFAULT_SCORE) for source in draft.sources]
        estimates = prior if draft.scores is None else draft.scores.tolist()
        for token, parent, source, score in zip(
            draft.tokens.tolist(), draft.parents.tolist(), draft.sources, estimates, strict=True
        ):
            above = where[parent] if parent >= 0 else NO_PARENT
            node = index.setdefault((above, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(above)
                sources.append(source)
                scores.append(score)
            elif score > scores[node]:
                scores[node] = score
            where.append(node)
    merged = Draft(
        np.array(tokens, dtype=np.int64),
        np.array(parents, dtype=np.int64),
        sources,
        np.array(scores, dtype=np.float32),
    )
    return keep_best([merged], budget, [reaches(merged)])[0] if len(merged) > budget else merged


def reaches(draft: Draft) -> FloatArray:
    """Estimated probability that each node is reached and accepted: the product of the scores down to it. [n]"""
    scores = [DEFAULT_SCORE] * len(draft) if draft.scores is None else draft.scores.tolist()
    reach: list[float] = []
    for score, parent in zip(scores, draft.parents.tolist(), strict=True):
        reach.append(min(score, 1.0) * (reach[parent] if parent >= 0 else 1.0))
    return np.array(reach, dtype=np.float32)


def expected_accepted(draft: Draft) -> float:
    """Expected number of accepted tokens: the sum over nodes of the probability of being reached and accepted."""
    return float(reaches(draft).sum())


def keep_best(drafts: list[Draft], count: int, reach: list[FloatArray]) -> list[Draft]:
    """The `count` nodes most likely to be accepted, over all drafts. No node outweighs its parent, so trees stay
    trees."""
    if count >= sum(map(len, drafts)):
        return drafts
    if not count:
        return [Draft.empty()] * len(drafts)
    everything = np.concatenate(reach)
    # Stable: of equal nodes the earlier, which is the parent, stays.
    best = np.zeros(len(everything), dtype=np.bool_)
    best[np.argsort(-everything, kind="stable")[:count]] = True
    kept, start = [], 0
    for draft in drafts:
        kept.append(keep_nodes(draft, np.flatnonzero(best[start : start + len(draft)])))
        start += len(draft)
    return kept


def keep_nodes(draft: Draft, kept: IntArray) -> Draft:
    """The draft with the nodes `kept` alone, in ascending order; a kept node's parent must be kept too. Siblings drawn
    without replacement go with those drawn before them, to which their q refers."""
    if draft.q is not None and not draft.replacement:
        kept = _with_elder_siblings(draft, kept)
    if len(kept) == len(draft):
        return draft
    place = np.full(len(draft) + 1, NO_PARENT, dtype=np.int64)  # the last one: of NO_PARENT itself
    place[kept] = np.arange(len(kept))
    return Draft(
        draft.tokens[kept],
        place[draft.parents[kept]],
        [draft.sources[node] for node in kept],
        None if draft.scores is None else draft.scores[kept],
        None if draft.q is None else draft.q[kept],
        draft.replacement,
    )


def _with_elder_siblings(draft: Draft, kept: IntArray) -> IntArray:
    """Those of the nodes `kept` whose earlier siblings, and those of all above them, are kept too."""
    wanted, whole, broken = set(kept.tolist()), {NO_PARENT}, set[int]()
    for node, parent in enumerate(draft.parents.tolist()):
        if node in wanted and parent in whole and parent not in broken:
            whole.add(node)
        else:
            broken.add(parent)
    return np.array(sorted(whole - {NO_PARENT}), dtype=np.int64)


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
