"""Trees of ranks: the published template, and the fitted one against all trees there are."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest
from drafting import propose
from hypothesis import given, settings
from hypothesis import strategies as st

from outpace.decoding.contracts import Sequence
from outpace.decoding.drafters.rank_tree import PUBLISHED, Path, fitted
from outpace.decoding.drafters.recycling import Recycling
from outpace.decoding.tree import check_draft
from outpace.errors import ParameterError
from outpace.types import NO_PARENT, SamplingParams


def is_tree(shape: list[Path]) -> bool:
    return len(set(shape)) == len(shape) and all(
        len(path) == 1 or path[:-1] in shape[:place] for place, path in enumerate(shape)
    )


def test_the_published_template_has_the_paper_s_shape() -> None:
    assert Counter(map(len, PUBLISHED)) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    assert max(rank for path in PUBLISHED for rank in path) == 7
    assert all(is_tree(PUBLISHED[:n]) for n in range(81))


def expected_tokens(shape: frozenset[Path], table: np.ndarray) -> float:
    return sum(float(np.prod([table[depth, rank] for depth, rank in enumerate(path)])) for path in shape)


@cache
def all_trees(depths: int, ranks: int, nodes: int) -> set[frozenset[Path]]:
    if nodes == 0:
        return {frozenset()}
    return {
        smaller | {(*above, rank)}
        for smaller in all_trees(depths, ranks, nodes - 1)
        for above in [(), *smaller]
        if len(above) < depths
        for rank in range(ranks)
        if (*above, rank) not in smaller
    }


@settings(max_examples=60)
@given(st.lists(st.floats(0.0625, 1, width=32), min_size=9, max_size=9), st.integers(1, 5))
def test_no_tree_of_that_size_is_better_than_the_fitted_one(rates: list[float], nodes: int) -> None:
    table = np.array(rates, dtype=np.float32).reshape(3, 3)
    shape = fitted(table, nodes)
    assert len(shape) == nodes and is_tree(shape)
    best = max(expected_tokens(tree, table) for tree in all_trees(3, 3, nodes))
    assert expected_tokens(frozenset(shape), table) == pytest.approx(best, rel=1e-6)


def test_fitted_leaves_out_what_is_too_unlikely_and_what_there_is_not() -> None:
    table = np.array([[0.5, 0.4], [0.5, 0.0]], dtype=np.float32)
    assert fitted(table, 10) == [(0,), (1,), (0, 0), (1, 0)]
    assert fitted(table, 10, floor=0.22) == [(0,), (1,), (0, 0)]
    assert fitted(table, 0) == []


def matrix_of(drafter: Recycling, sequence: Sequence) -> None:
    """After every token t the target named t + 1, t + 2, ... up to the vocabulary's end."""
    drafter.begin(sequence)
    matrix = drafter._matrices.of(sequence)
    for token in range(drafter.vocab_size):
        matrix.ids[token] = [t if t < drafter.vocab_size else -1 for t in range(token + 1, token + 1 + drafter.k)]


def test_recycling_follows_the_published_template() -> None:
    drafter = Recycling(200, tree="published")
    sequence = Sequence(0, [3], 1, SamplingParams())
    matrix_of(drafter, sequence)
    [draft] = propose(drafter, [sequence], [100])
    check_draft(draft, 80, 200)
    assert len(draft) == 80
    paths: dict[int, Path] = {NO_PARENT: ()}
    for node, (token, parent) in enumerate(zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True)):
        above = int(draft.tokens[parent]) if parent >= 0 else 3
        paths[node] = (*paths[parent], token - above - 1)
    assert {path for path in paths.values() if path} == set(PUBLISHED)


def test_recycling_leaves_out_what_hangs_below_an_empty_entry() -> None:
    drafter = Recycling(6, k=4, tree="published")
    sequence = Sequence(0, [3], 1, SamplingParams())
    matrix_of(drafter, sequence)
    [draft] = propose(drafter, [sequence], [80])
    assert draft.tokens[draft.parents == NO_PARENT].tolist() == [4, 5]
    assert len(draft) == 3  # 5 follows 4, nothing follows 5


def test_recycling_fits_its_tree_to_what_is_accepted() -> None:
    """A target that always takes the third candidate gets chains of third candidates."""
    drafter = Recycling(1000, k=4, tree="fitted")
    sequence = Sequence(0, [0], 1, SamplingParams())
    matrix_of(drafter, sequence)
    for _ in range(120):
        propose(drafter, [sequence], [8])
        sequence.tokens.append(sequence.tokens[-1] + 3)
        if len(sequence.tokens) % 3 == 0:
            sequence.tokens.append(sequence.tokens[-1] + 3)
    [draft] = propose(drafter, [sequence], [2])
    last = sequence.tokens[-1]
    assert draft.tokens.tolist() == [last + 3, last + 6] and draft.parents.tolist() == [NO_PARENT, 0]


def test_an_unknown_tree_is_refused() -> None:
    with pytest.raises(ParameterError, match="dynamic, published, fitted"):
        Recycling(10, k=2, tree="bonsai")
