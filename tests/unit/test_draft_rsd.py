"""Trees of samples drawn without replacement, and every sampled draft of a model against the exact distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from drafting import FakeDecoder, V, logits_of, outputs_of, propose

from outpace.decoding.contracts import DrafterContext, Observation, Sequence
from outpace.decoding.drafters.draft_model import DraftChain
from outpace.decoding.drafters.grown import Draws, Grown, Growth
from outpace.decoding.drafters.levels import Drawn, Luck
from outpace.decoding.drafters.rates import Rates
from outpace.decoding.drafters.rsd_c import RsdC
from outpace.decoding.drafters.rsd_s import RsdS
from outpace.decoding.drafters.sources import ModelSource, Source
from outpace.decoding.drafters.specdec import SpecDec
from outpace.decoding.methods import make_drafter
from outpace.decoding.sampling import History, distribution
from outpace.decoding.tree import check_draft, children, path_to
from outpace.decoding.verify.rejection import RejectionVerifier
from outpace.errors import ParameterError
from outpace.types import NO_PARENT, Draft, SamplingParams

Shape = Callable[[Source, Draws], Grown]
SAMPLED: dict[str, Shape] = {
    "draft": lambda source, draws: DraftChain(source, draws, max_tokens=3),
    "specdec": lambda source, draws: SpecDec(source, draws, threshold=0.6),
    "rsd-c": lambda source, draws: RsdC(source, draws, branching="2-2-1"),
    "rsd-s": lambda source, draws: RsdS(source, draws, width=2, max_depth=3),
}


def verify(drafter: Grown, sequences: list[Sequence], budget: int, wrong: bool = False) -> list[int]:
    """One step by rejection sampling; how many nodes were accepted of each."""
    accepted = []
    for sequence, draft in zip(sequences, propose(drafter, sequences, [budget] * len(sequences)), strict=True):
        check_draft(draft, budget, V)
        assert draft.q is not None and not draft.replacement
        outputs = outputs_of(sequence.tokens, draft)
        seen = RejectionVerifier().verify(sequence, replace(draft, replacement=True) if wrong else draft, outputs)
        sequence.tokens += seen.tokens
        drafter.observe(sequence, Observation(seen, draft, outputs))
        accepted.append(len(seen.path))
    return accepted


def decode(drafter: Grown, params: SamplingParams, seeds: range, n: int, budget: int = 7) -> list[list[int]]:
    """The first `n` tokens after [1, 2], for each seed."""
    sequences = [Sequence(seed, [1, 2], 2, replace(params, seed=seed)) for seed in seeds]
    for sequence in sequences:
        drafter.begin(sequence)
    while going := [s for s in sequences if len(s.output) < n]:
        verify(drafter, going, budget)
    for sequence in sequences:
        drafter.end(sequence)
    return [s.output[:n] for s in sequences]


def surprise(outputs: list[list[int]], params: SamplingParams) -> float:
    """Chi-squared of texts of two tokens against the target's joint distribution, in standard deviations."""
    counts = np.zeros((V, V))
    for first, second in outputs:
        counts[first, second] += 1
    joint = np.stack(
        [p * distribution(logits_of([1, 2, t]), params) for t, p in enumerate(distribution(logits_of([1, 2]), params))]
    )
    assert not counts[joint == 0].any()
    expected = joint.ravel() * len(outputs)
    pooled = expected > 5
    seen = np.append(counts.ravel()[pooled], counts.ravel()[~pooled].sum())
    should = np.append(expected[pooled], expected[~pooled].sum())
    freedom = len(seen) - 1
    return float((((seen - should) ** 2 / np.maximum(should, 1e-9)).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("shape", SAMPLED)
@pytest.mark.parametrize("params", [SamplingParams(temperature=1.5), SamplingParams(temperature=2.0, top_k=4)])
def test_rejection_sampling_follows_the_target(shape: str, params: SamplingParams) -> None:
    drafter = SAMPLED[shape](ModelSource(FakeDecoder(1), 4000, V), Draws.SAMPLED)
    outputs = decode(drafter, params, range(900), 2)
    assert surprise(outputs, params) < 4


def test_siblings_taken_for_independent_draws_would_be_noticed() -> None:
    """The test above has the power to see a wrong exclusion."""
    params = SamplingParams(temperature=1.5)
    drafter = RsdC(ModelSource(FakeDecoder(1), 4000, V), Draws.SAMPLED, branching="6")
    sequences = [Sequence(seed, [1, 2], 2, replace(params, seed=seed)) for seed in range(900)]
    for sequence in sequences:
        drafter.begin(sequence)
    verify(drafter, sequences, 6, wrong=True)
    for sequence in sequences:
        while len(sequence.output) < 2:
            sequence.tokens.append(int(distribution(logits_of(sequence.tokens), params).argmax()))
    wrong = np.bincount([s.output[0] for s in sequences], minlength=V)
    should = distribution(logits_of([1, 2]), params) * len(sequences)
    assert ((wrong - should) ** 2 / should).sum() > V + 4 * np.sqrt(2 * V)


@pytest.mark.parametrize("shape", ["rsd-c", "rsd-s"])
def test_a_perfect_draft_model_is_followed_to_the_last_level(shape: str) -> None:
    """The first child of the first child is always drawn, and p = q accepts it."""
    drafter = SAMPLED[shape](ModelSource(FakeDecoder(), 64, V), Draws.SAMPLED)
    sequence = Sequence(0, [3, 1], 2, SamplingParams(temperature=1.0, seed=5))
    drafter.begin(sequence)
    assert [verify(drafter, [sequence], 12)[0] for _ in range(6)] == [3] * 6


@pytest.mark.parametrize("shape", ["rsd-c", "rsd-s"])
def test_siblings_differ_and_carry_their_parent_s_distribution(shape: str) -> None:
    params = SamplingParams(temperature=0.9, repetition_penalty=1.2, seed=3)
    drafter = SAMPLED[shape](ModelSource(FakeDecoder(1), 64, V), Draws.SAMPLED)
    sequence = Sequence(0, [1, 2, 3], 3, params)
    drafter.begin(sequence)
    [draft] = propose(drafter, [sequence], [12])
    assert draft.q is not None and len(draft) == (10 if shape == "rsd-c" else 6)
    for parent, siblings in children(draft.parents).items():
        context = [1, 2, 3, *draft.tokens[path_to(draft.parents, parent)].tolist()]
        expected = distribution(logits_of(context, 1), params, History(context, 3))
        np.testing.assert_allclose(draft.q[siblings], np.tile(expected, (len(siblings), 1)), atol=1e-6)
        assert len(set(draft.tokens[siblings].tolist())) == len(siblings)


def test_a_family_is_drawn_without_replacement_in_falling_order_of_values() -> None:
    """First two children: token t with q(t), then another with q / (1 - q(t)); values as of Gumbel variables."""
    q = np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32)
    pairs, gaps = np.zeros((4, 4)), list[float]()
    for seed in range(3000):
        growth = Growth(Sequence(0, [0], 1, SamplingParams(temperature=1.0, seed=seed)), 9, 1)
        luck: Luck = {NO_PARENT: (0.0, 0.0)}
        family = Drawn(growth, NO_PARENT, q, luck, Rates(np.full((5, 10), 0.5)))
        for _ in range(4):
            family.take()
        assert family.value == float("-inf") and sorted(growth.tokens) == [0, 1, 2, 3]
        values = [luck[node][0] for node in range(4)]
        assert values == sorted(values, reverse=True)
        pairs[growth.tokens[0], growth.tokens[1]] += 1
        gaps.append(values[1])
    expected = q[:, None] * q[None, :] / (1 - q[:, None]) * (1 - np.eye(4)) * 3000
    off = ~np.eye(4, dtype=bool)
    assert ((pairs - expected)[off] ** 2 / expected[off]).sum() < 12 + 4 * np.sqrt(24)
    # the second value, given that the first is 0: P(below x) = E[exp(w - w exp(-x))], w the weight left
    for x in (-0.5, -1.0, -2.0):
        w = 1 - q
        below = float((q * np.exp(w - w * np.exp(-x))).sum())
        assert np.mean(np.array(gaps) < x) == pytest.approx(below, abs=0.03)


def test_the_values_say_nothing_of_the_tokens() -> None:
    """Whether the second child of the root enters the beam does not depend on its token, given the first."""
    q = np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32)
    high, tokens = list[bool](), list[int]()
    for seed in range(4000):
        growth = Growth(Sequence(0, [0], 1, SamplingParams(temperature=1.0, seed=seed)), 9, 1)
        luck: Luck = {NO_PARENT: (0.0, 0.0)}
        family = Drawn(growth, NO_PARENT, q, luck, Rates(np.full((5, 10), 0.5)))
        family.take()
        if growth.tokens[0] == 0:
            high.append(family.value > -0.5)
            family.take()
            tokens.append(growth.tokens[1])
    share = np.mean(high)
    for token in (1, 2, 3):
        own = [h for h, t in zip(high, tokens, strict=True) if t == token]
        assert np.mean(own) == pytest.approx(share, abs=4 * np.sqrt(0.25 / len(own)))


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("shape", ["rsd-c", "rsd-s"])
def test_a_smaller_budget_cuts_last_siblings_first(shape: str, budget: int) -> None:
    drafts: list[Draft] = []
    for n in (budget, 12):
        drafter = SAMPLED[shape](ModelSource(FakeDecoder(1), 64, V), Draws.SAMPLED)
        sequence = Sequence(0, [1, 2, 3], 3, SamplingParams(temperature=1.0, seed=2))
        drafter.begin(sequence)
        drafts += propose(drafter, [sequence], [n])
    small, large = drafts
    assert len(small) == min(budget, len(large))
    assert small.tokens.tolist() == large.tokens[: len(small)].tolist()
    assert small.parents.tolist() == large.parents[: len(small)].tolist()


@pytest.mark.parametrize("spec", ["rsd-c:branching=2-0", "rsd-c:branching=a", "rsd-c:branching=", "rsd-s:width=0"])
def test_options_out_of_range_are_refused(spec: str) -> None:
    with pytest.raises(ParameterError, match="out of range"):
        make_drafter(spec, DrafterContext(V, FakeDecoder(), 8))
