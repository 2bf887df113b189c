"""Chains of a draft model: what they read, how long they are, and what they carry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from drafting import PARAMS, FakeDecoder, V, logits_of, outputs_of, plain, propose, step

from outpace.decoding.contracts import Observation, Sequence
from outpace.decoding.drafters.draft_model import DraftChain
from outpace.decoding.drafters.grown import _PRIOR, Choice, Draws
from outpace.decoding.drafters.sources import ModelSource
from outpace.decoding.sampling import History, distribution
from outpace.decoding.verify.rejection import RejectionVerifier
from outpace.types import SamplingParams


def chain(decoder: FakeDecoder, draws: Draws = Draws.COUPLED, **options: float) -> DraftChain:
    return DraftChain(ModelSource(decoder, 64, V), draws, **options)  # type: ignore[arg-type]


def test_a_perfect_chain_is_accepted_whole_and_reads_nothing_twice() -> None:
    decoder = FakeDecoder()
    drafter = chain(decoder)
    sequence = Sequence(0, [3, 1], 2, SamplingParams())
    drafter.begin(sequence)
    for _ in range(5):
        assert step(drafter, [sequence], [6])[0] == 7
    # 2 prompt tokens; per step 5 provisional rows, and the sixth node and the bonus at the next catch-up
    assert decoder.rows == 2 + 5 * 5 + 4 * 2
    assert decoder.forwards == 5 * 6


def test_sampled_chains_carry_the_distribution_they_were_drawn_from() -> None:
    params = SamplingParams(temperature=0.9, top_k=5, repetition_penalty=1.2, seed=3)
    drafter = chain(FakeDecoder(1), Draws.SAMPLED)
    sequence = Sequence(0, [1, 2, 3], 3, params)
    drafter.begin(sequence)
    [draft] = propose(drafter, [sequence], [5])
    assert draft.q is not None and draft.q.shape == (len(draft), V)
    context = [1, 2, 3]
    for node, token in enumerate(draft.tokens.tolist()):
        expected = distribution(logits_of(context, 1), params, History(context, 3))
        np.testing.assert_allclose(draft.q[node], expected, atol=1e-6)
        assert draft.q[node, token] > 0
        context.append(token)
    assert sequence.history.tokens == [1, 2, 3]


def test_the_length_of_a_sampled_chain_does_not_depend_on_its_tokens() -> None:
    drafter = chain(FakeDecoder(1), Draws.SAMPLED)
    lengths, tokens = set(), set()
    for seed in range(20):
        sequence = Sequence(seed, [1, 2, 3], 3, SamplingParams(temperature=1.0, seed=seed))
        drafter.begin(sequence)
        [draft] = propose(drafter, [sequence], [12])
        lengths.add(len(draft))
        tokens.add(tuple(draft.tokens.tolist()))
        drafter.end(sequence)
    assert len(lengths) == 1 and len(tokens) > 10


def test_rejection_sampling_with_a_model_draft_follows_the_target() -> None:
    """First two tokens over many seeds, against the exact joint distribution."""
    params, n, agreed = SamplingParams(temperature=1.0), 800, 0
    drafter = chain(FakeDecoder(1), Draws.SAMPLED, max_tokens=2)
    counts = np.zeros((V, V))
    for seed in range(n):
        sequence = Sequence(seed, [1, 2], 2, replace(params, seed=seed))
        drafter.begin(sequence)
        while len(sequence.output) < 2:
            [draft] = propose(drafter, [sequence], [2])
            outputs = outputs_of(sequence.tokens, draft)
            accepted = RejectionVerifier().verify(sequence, draft, outputs)
            agreed += not sequence.output and len(accepted.path) > 0
            sequence.tokens += accepted.tokens
            drafter.observe(sequence, Observation(accepted, draft, outputs))
        counts[sequence.output[0], sequence.output[1]] += 1
        drafter.end(sequence)
    first = distribution(logits_of([1, 2]), params)
    joint = np.stack([first[t] * distribution(logits_of([1, 2, t]), params) for t in range(V)])
    expected = joint.ravel() * n
    pooled = expected > 5
    seen = np.append(counts.ravel()[pooled], counts.ravel()[~pooled].sum())
    should = np.append(expected[pooled], expected[~pooled].sum())
    chi2, freedom = ((seen - should) ** 2 / should).sum(), len(seen) - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)
    overlap = np.minimum(first, distribution(logits_of([1, 2], 1), params)).sum()
    assert agreed / n == pytest.approx(overlap, abs=0.06)


@pytest.mark.parametrize("params", PARAMS[1:])
def test_the_coupled_draw_of_a_perfect_draft_model_is_always_accepted(params: SamplingParams) -> None:
    """Sampled text: the drafter draws with the uniform that the target will draw with."""
    drafter = chain(FakeDecoder())
    sequence = Sequence(0, [3, 1], 2, params)
    drafter.begin(sequence)
    assert [step(drafter, [sequence], [6])[0] for _ in range(8)] == [7] * 8
    assert sequence.tokens == plain([3, 1], params, len(sequence.output))
    kind = Choice.GREEDY if params.greedy else Choice.COUPLED
    assert drafter.confidence.value[kind].sum() > np.sum(_PRIOR[kind])
