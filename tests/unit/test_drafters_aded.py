"""Adaptive Draft-Verification: the tri-gram model and its search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drafting import propose

from outpace.decoding.contracts import Observation, Sequence
from outpace.decoding.drafters.aded import Aded, Search, Trigrams
from outpace.decoding.outputs import TargetOutputs
from outpace.types import Accepted, Draft, SamplingParams


def test_trigrams_move_towards_the_latest_answers() -> None:
    model = Trigrams(k=2, keep=0.5, most=2)
    model.learn((1, 2), [(3, 1.0)])
    model.learn((1, 2), [(4, 0.8), (3, 0.2)])
    assert model.after((1, 2)) == [(3, pytest.approx(0.6)), (4, pytest.approx(0.4))]
    for _ in range(3):
        model.learn((1, 2), [(4, 0.9), (5, 0.1)])
    assert model.after((1, 2))[0][0] == 4
    model.learn((2, 3), [(1, 1.0)])
    model.learn((3, 1), [(1, 1.0)])
    assert model.after((1, 2)) == [] and model.after((9, 9)) == []


def searched(simulations: int, c1: float) -> Search:
    model = Trigrams(k=4, keep=0.0, most=100)
    model.learn((0, 1), [(2, 0.5), (3, 0.4), (4, 0.1)])
    model.learn((1, 2), [(5, 0.3)])
    model.learn((1, 3), [(6, 1.0)])
    model.learn((3, 6), [(7, 1.0)])
    search = Search(model, (0, 1), c1, 100.0, 4)
    for _ in range(simulations):
        search.simulate()
    return search


def test_the_search_values_the_expected_number_of_accepted_tokens() -> None:
    """0.4 * (1 + 1 * (1 + 1)) by way of 3 is more than 0.5 * (1 + 0.3) by way of 2."""
    edges = {edge.token: edge for edge in searched(200, 1.25).root.edges}
    assert edges[3].value == pytest.approx(1.2) and edges[2].value == pytest.approx(0.65)
    assert edges[4].value == pytest.approx(0.1)
    assert edges[3].visits > edges[2].visits > edges[4].visits > 0


def test_the_search_explores_the_more_the_larger_its_constant() -> None:
    greedy, curious = searched(60, 0.0), searched(60, 20.0)
    assert max(e.visits for e in greedy.root.edges) > max(e.visits for e in curious.root.edges)


def test_aded_learns_the_target_s_distribution_in_rejected_rows_too() -> None:
    drafter = Aded(k=2, keep=0.0)
    sequence = Sequence(0, [1, 2], 2, SamplingParams())
    drafter.begin(sequence)
    draft = Draft(np.array([3, 4]), np.array([-1, -1]), ["x", "x"])
    logits = np.zeros((3, 10), dtype=np.float32)
    logits[0, [5, 6]] = [9, 8]  # after 1 2
    logits[1, [7, 8]] = [9, 8]  # after 2 3, rejected
    logits[2, [1, 0]] = [9, 8]  # after 2 4, rejected
    sequence.tokens.append(5)
    drafter.observe(sequence, Observation(Accepted([], [5]), draft, TargetOutputs.of(torch.from_numpy(logits))))
    model = drafter._models[None]
    likely, less = 1 / (1 + np.exp(-1)), 1 / (1 + np.e)
    for pair, ids in (((1, 2), (5, 6)), ((2, 3), (7, 8)), ((2, 4), (1, 0))):
        assert model.after(pair) == [(ids[0], pytest.approx(likely)), (ids[1], pytest.approx(less))]


def test_aded_keeps_owners_apart() -> None:
    drafter = Aded(owner_of=lambda sequence: sequence.id // 10)
    drafter.begin(Sequence(1, [1, 2, 3], 3, SamplingParams()))
    for id, known in ((2, 1), (11, 0)):
        sequence = Sequence(id, [1, 2], 2, SamplingParams())
        drafter.begin(sequence)
        assert len(propose(drafter, [sequence], [4])[0]) == known
