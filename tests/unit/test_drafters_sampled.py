"""Drafters that sample and give q, under rejection sampling: what comes out has the target's distribution.

Whole runs of several steps are enumerated, the drafter's own draws included, on a vocabulary of two tokens.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drafting import propose

from outpace.bench.enumeration import Enumeration
from outpace.decoding import sampling
from outpace.decoding.contracts import Drafter, DrafterContext, Observation, Sequence, Verifier
from outpace.decoding.drafters import sjd, suffix
from outpace.decoding.drafters.sjd import SpeculativeJacobi
from outpace.decoding.drafters.suffix import Suffix
from outpace.decoding.methods import make_drafter
from outpace.decoding.outputs import TargetOutputs
from outpace.decoding.sampling import distribution
from outpace.decoding.tree import check_draft, path_to
from outpace.decoding.verify import block, rejection
from outpace.decoding.verify.block import BlockVerifier
from outpace.decoding.verify.rejection import RejectionVerifier
from outpace.types import Draft, SamplingParams

V, LENGTH = 2, 4
PROMPT = [0, 1, 1, 0, 1, 0, 0, 1, 0]
PARAMS = SamplingParams(temperature=0.9, seed=3, frequency_penalty=0.3)

MAKERS: dict[str, Callable[[], Drafter]] = {
    "sjd": lambda: SpeculativeJacobi(V, window=2, sampled=True, coupled=False),
    "sjd random": lambda: SpeculativeJacobi(V, window=2, start="random", sampled=True, coupled=False),
    "sjd gauss-seidel": lambda: SpeculativeJacobi(V, form="gauss-seidel", window=3, sampled=True, coupled=False),
    "suffix": lambda: Suffix(sampled_over=V, max_tokens=3, min_score=0),
}


def target_logits(tokens: list[int]) -> np.ndarray:
    return (np.random.default_rng([9, *tokens[-4:]]).standard_normal(V) * 1.2).astype(np.float32)


def outputs_of(tokens: list[int], draft: Draft) -> TargetOutputs:
    paths = [[], *(draft.tokens[path_to(draft.parents, node)].tolist() for node in range(len(draft)))]
    return TargetOutputs.of(torch.from_numpy(np.stack([target_logits(tokens + path) for path in paths])))


def run(
    drafter: Drafter, params: SamplingParams, length: int, verifier: Verifier, budget: int = 3
) -> tuple[list[int], int]:
    """At least `length` tokens of output, and how many drafted ones were accepted."""
    sequence = Sequence(0, list(PROMPT), len(PROMPT), params)
    drafter.begin(sequence)
    accepted = 0
    while len(sequence.output) < length:
        [draft] = propose(drafter, [sequence], [budget])
        check_draft(draft, budget, V)
        outputs = outputs_of(sequence.tokens, draft)
        kept = verifier.verify(sequence, draft, outputs)
        sequence.tokens += kept.tokens
        accepted += len(kept.path)
        drafter.observe(sequence, Observation(kept, draft, outputs))
    drafter.end(sequence)
    return sequence.output, accepted


def target_joint(params: SamplingParams, length: int) -> dict[tuple[int, ...], float]:
    joint = {}
    for output in itertools.product(range(V), repeat=length):
        sequence, p = Sequence(0, list(PROMPT), len(PROMPT), params), 1.0
        for token in output:
            p *= distribution(target_logits(sequence.tokens), params, sequence.history)[token]
            sequence.tokens.append(token)
        joint[output] = p
    return joint


@pytest.mark.parametrize("verifier", [RejectionVerifier, BlockVerifier])
@pytest.mark.parametrize("name", MAKERS)
def test_the_output_has_the_target_s_distribution(
    name: str, verifier: type[Verifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    enumeration = Enumeration()
    for module in (rejection, block, sjd, suffix):
        monkeypatch.setattr(module, "draw", enumeration.draw)
    for module in (rejection, block):
        monkeypatch.setattr(module, "uniform", enumeration.uniform)
    joint: dict[tuple[int, ...], float] = defaultdict(float)
    # A run stops where LENGTH tokens are there; the last step's surplus is summed over.
    for _ in enumeration.outcomes():
        output, _ = run(MAKERS[name](), PARAMS, LENGTH, verifier())
        joint[tuple(output[:LENGTH])] += enumeration.probability
    expected = target_joint(PARAMS, LENGTH)
    assert sum(joint.values()) == pytest.approx(1, abs=1e-12)
    assert max(abs(joint[output] - p) for output, p in expected.items()) < 1e-9


@pytest.mark.parametrize("name", MAKERS)
def test_real_draws_are_spent_once_and_accepted_at_times(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[Any] = []

    def spent(*key: Any) -> float:
        keys.append(key)
        return sampling.uniform(*key)

    for module in (sjd, suffix):
        monkeypatch.setattr(module, "uniform", spent)
    output, accepted = run(MAKERS[name](), SamplingParams(temperature=0.9, seed=3), 60, RejectionVerifier())
    assert len(output) >= 60 and accepted > 10
    assert len(set(keys)) == len(keys)
    assert run(MAKERS[name](), SamplingParams(temperature=0.9, seed=3), 60, RejectionVerifier())[0] == output


@pytest.mark.parametrize("name", ["sjd", "suffix"])
def test_q_is_given_only_where_it_is_used(name: str) -> None:
    def drafted(params: SamplingParams, **context: bool) -> Draft:
        drafter = make_drafter(name, DrafterContext(vocab_size=V, **context))  # type: ignore[arg-type]
        sequence = Sequence(0, list(PROMPT), len(PROMPT), params)
        drafter.begin(sequence)
        return propose(drafter, [sequence], [4])[0]

    draft = drafted(PARAMS, sampled=True)
    assert draft.q is not None and len(draft)
    assert draft.q.sum(axis=1) == pytest.approx(1, abs=1e-6)
    assert (draft.q[np.arange(len(draft)), draft.tokens] > 0).all()
    assert drafted(PARAMS).q is None
    assert drafted(PARAMS, sampled=True, merged=True).q is None
    assert drafted(SamplingParams(), sampled=True).q is None


def test_suffix_draws_from_the_counts() -> None:
    """After 1 2 came 3 twice and 4 once."""
    text = [1, 2, 3, 0, 1, 2, 4, 0, 1, 2, 3, 5, 1, 2]
    seen = []
    for seed in range(400):
        drafter = Suffix(sampled_over=6, max_tokens=1)
        sequence = Sequence(0, list(text), len(text), SamplingParams(temperature=1.0, seed=seed))
        drafter.begin(sequence)
        [draft] = propose(drafter, [sequence], [4])
        assert draft.q is not None
        assert draft.q[0].tolist() == pytest.approx([0, 0, 0, 2 / 3, 1 / 3, 0])
        seen.append(int(draft.tokens[0]))
    assert seen.count(3) / len(seen) == pytest.approx(2 / 3, abs=0.08)
