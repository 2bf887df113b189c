"""Token Recycling: what its matrix remembers and whose it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drafting import propose

from outpace.decoding.contracts import Observation, Sequence
from outpace.decoding.drafters.recycling import Recycling
from outpace.decoding.outputs import TargetOutputs
from outpace.decoding.tree import check_draft
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.errors import ParameterError
from outpace.types import NO_PARENT, Accepted, Draft, SamplingParams


def test_recycling_remembers_rejected_rows_too() -> None:
    drafter = Recycling(10, k=2, min_score=0)
    sequence = Sequence(0, [1, 2], 1, SamplingParams())
    drafter.begin(sequence)
    draft = Draft(np.array([3, 4]), np.array([-1, -1]), ["x", "x"])
    logits = np.zeros((3, 10), dtype=np.float32)
    logits[0, [5, 6]] = [9, 8]  # after 2
    logits[1, [7, 8]] = [9, 8]  # after 3, rejected
    logits[2, [1, 0]] = [9, 8]  # after 4, rejected
    sequence.tokens.append(5)
    drafter.observe(sequence, Observation(Accepted([], [5]), draft, TargetOutputs.of(torch.from_numpy(logits))))
    matrix = drafter._matrices[None]
    assert matrix.ids[[2, 3, 4]].tolist() == [[5, 6], [7, 8], [1, 0]]
    sequence.tokens.append(3)
    [proposed] = propose(drafter, [sequence], [4])
    assert proposed.tokens.tolist()[0] == 7
    assert set(proposed.tokens[proposed.parents == NO_PARENT].tolist()) == {7, 8}


def test_recycling_keeps_the_accepted_row_of_equal_tokens() -> None:
    drafter = Recycling(10, k=1)
    sequence = Sequence(0, [1, 2], 1, SamplingParams())
    drafter.begin(sequence)
    draft = Draft(np.array([3, 4, 3]), np.array([-1, -1, 1]), ["x"] * 3)
    outputs = TargetOutputs.of(torch.from_numpy(np.eye(10, dtype=np.float32)[[3, 5, 3, 9]]))
    accepted = CoupledVerifier().verify(sequence, draft, outputs)
    assert accepted.path == [0]
    sequence.tokens += accepted.tokens
    drafter.observe(sequence, Observation(accepted, draft, outputs))
    assert drafter._matrices[None].ids[3, 0] == 5


def test_recycling_starts_from_the_prompt_s_bigrams() -> None:
    drafter = Recycling(10, k=2)
    sequence = Sequence(0, [1, 2, 1, 3, 1, 3, 1, 4, 1], 9, SamplingParams())
    drafter.begin(sequence)
    matrix = drafter._matrices[None]
    assert matrix.ids[1].tolist() == [3, 2]
    assert matrix.ids[4].tolist() == [1, -1]
    [draft] = propose(drafter, [sequence], [3])
    check_draft(draft, 3, 10)
    assert draft.tokens[0] == 3


def test_recycling_tells_pairs_apart() -> None:
    """After 1 the target said 5 when 2 came before it, and 6 when 3 did."""
    drafter = Recycling(10, k=1, min_score=0)
    sequence = Sequence(0, [2], 1, SamplingParams())
    drafter.begin(sequence)
    for before, answer in ((2, 5), (3, 6)):
        sequence.tokens += [before, 1, answer]
        outputs = TargetOutputs.of(torch.from_numpy(np.eye(10, dtype=np.float32)[[answer]]))
        drafter.observe(sequence, Observation(Accepted([], [answer]), Draft.empty(), outputs))
    for before, expected in ((2, 5), (3, 6), (9, 6)):
        sequence.tokens += [before, 1]
        assert propose(drafter, [sequence], [1])[0].tokens.tolist() == [expected]


def test_recycling_keeps_owners_apart_and_forgets_the_longest_idle() -> None:
    drafter = Recycling(10, k=2, owner_of=lambda sequence: sequence.id // 10, max_owners=2)
    drafter.begin(Sequence(1, [1, 2, 1], 3, SamplingParams()))
    other = Sequence(11, [1], 1, SamplingParams())
    drafter.begin(other)
    assert len(propose(drafter, [other], [4])[0]) == 0
    same = Sequence(2, [1], 1, SamplingParams())
    drafter.begin(same)
    assert propose(drafter, [same], [1])[0].tokens.tolist() == [2]
    drafter.begin(Sequence(21, [1], 1, SamplingParams()))
    assert list(drafter._matrices) == [0, 2]


def test_recycling_refuses_a_senseless_k() -> None:
    with pytest.raises(ParameterError, match="k from 1"):
        Recycling(10, k=0)
