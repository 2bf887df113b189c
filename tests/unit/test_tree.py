"""Tree helpers and the merging of drafts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outpace.decoding.tree import (
    ancestors,
    check_draft,
    child_lookup,
    children,
    keep_nodes,
    merge,
    node_depths,
    path_to,
)
from outpace.types import NO_PARENT, Draft


def draft_of(tokens: list[int], parents: list[int], source: str, scores: list[float] | None = None) -> Draft:
    given_scores = None if scores is None else np.array(scores, dtype=np.float32)
    return Draft(np.array(tokens, np.int64), np.array(parents, np.int64), [source] * len(tokens), given_scores)


@st.composite
def drafts(draw: st.DrawFn, source: str = "a") -> Draft:
    n = draw(st.integers(0, 12))
    parents = [draw(st.integers(-1, i - 1)) for i in range(n)]
    tokens = [draw(st.integers(0, 4)) for _ in range(n)]
    scores = [draw(st.floats(0.0, 1.0, width=32)) for _ in range(n)] if draw(st.booleans()) else None
    return draft_of(tokens, parents, source, scores)


def paths(draft: Draft) -> dict[tuple[int, ...], int]:
    """Token path from the root -> one of the nodes that carry it."""
    return {tuple(draft.tokens[path_to(draft.parents, i)].tolist()): i for i in reversed(range(len(draft)))}


def test_lookups_of_a_small_tree() -> None:
    draft = draft_of([7, 8, 9, 7, 8], [-1, -1, 0, 2, 0], "a")
    assert children(draft.parents) == {-1: [0, 1], 0: [2, 4], 2: [3]}
    assert child_lookup(draft) == {(-1, 7): 0, (-1, 8): 1, (0, 9): 2, (2, 7): 3, (0, 8): 4}
    assert ancestors(draft.parents) == [[0], [1], [0, 2], [0, 2, 3], [0, 4]]
    assert path_to(draft.parents, 3) == [0, 2, 3]
    assert path_to(draft.parents, NO_PARENT) == []
    assert node_depths(draft.parents).tolist() == [0, 0, 1, 2, 1]


@settings(max_examples=200, deadline=None)
@given(drafts("a"), drafts("b"), st.integers(0, 16))
def test_merged_trees_are_valid_and_know_their_sources(a: Draft, b: Draft, budget: int) -> None:
    merged = merge([a, b], budget)
    check_draft(merged, budget, 5)
    assert len(merged) == min(budget, len(paths(a).keys() | paths(b).keys()))
    assert len(paths(merged)) == len(merged)
    for path, node in paths(merged).items():
        assert merged.sources[node] == ("a" if path in paths(a) else "b")


def test_highest_score_counts_and_the_first_source_stays() -> None:
    a = draft_of([1, 2], [-1, 0], "a", [0.5, 0.9])
    b = draft_of([1, 3], [-1, 0], "b", [0.8, 0.1])
    merged = merge([a, b], 3)
    assert merged.tokens.tolist() == [1, 2, 3]
    assert merged.sources == ["a", "a", "b"]
    assert merged.scores is not None
    assert merged.scores.tolist() == pytest.approx([0.8, 0.9, 0.1])


@settings(max_examples=60, deadline=None)
@given(drafts("a"), drafts("b"), st.integers(1, 5))
def test_no_other_choice_of_nodes_expects_more(a: Draft, b: Draft, budget: int) -> None:
    whole, chosen = merge([a, b], 100), merge([a, b], budget)

    def expected(draft: Draft, nodes: tuple[int, ...]) -> float:
        assert draft.scores is not None
        return sum(float(np.prod(draft.scores[path_to(draft.parents, i)])) for i in nodes)

    best = 0.0
    for nodes in itertools.combinations(range(len(whole)), min(budget, len(whole))):
        if all(whole.parents[i] == NO_PARENT or int(whole.parents[i]) in nodes for i in nodes):
            best = max(best, expected(whole, nodes))
    assert expected(chosen, tuple(range(len(chosen)))) == pytest.approx(best, abs=1e-5)


def test_drafts_without_scores_get_their_source_s_prior() -> None:
    a, b = draft_of([1], [-1], "a"), draft_of([2], [-1], "b")
    assert merge([a, b], 1, {"a": 0.2, "b": 0.9}).tokens.tolist() == [2]
    assert merge([a, b], 1, {"a": 0.9, "b": 0.2}).tokens.tolist() == [1]
    assert merge([Draft.empty(), Draft.empty()], 8).tokens.tolist() == []


def test_check_draft_finds_what_is_wrong() -> None:
    good = draft_of([1, 2], [-1, 0], "a")
    check_draft(good, 2, 5)
    for bad, budget in ((good, 1), (draft_of([1, 2], [1, -1], "a"), 2), (draft_of([9], [-1], "a"), 2)):
        with pytest.raises(AssertionError):
            check_draft(bad, budget, 5)


def test_siblings_without_replacement_keep_those_drawn_before_them() -> None:
    q = np.full((5, 3), 1 / 3, dtype=np.float32)
    draft = Draft(np.array([0, 1, 2, 0, 1]), np.array([-1, -1, -1, 1, 2]), ["x"] * 5, None, q, replacement=False)
    kept = keep_nodes(draft, np.array([0, 2, 3, 4]))  # without node 1: neither its younger sibling nor its child
    assert kept.tokens.tolist() == [0] and kept.q is not None and not kept.replacement
    assert keep_nodes(draft, np.array([0, 1, 3])).tokens.tolist() == [0, 1, 0]
    draft.replacement = True
    assert keep_nodes(draft, np.array([0, 2, 4])).tokens.tolist() == [0, 2, 1]
