"""Rejection sampling: the output distribution by exact enumeration, not by drawing.

The verifier's own code runs once for every outcome of its random choices: a stand-in uniform notes the
threshold that it is compared with and answers as the script says, and the product of the answers'
probabilities weighs the outcome. Nothing is estimated.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from outpace.decoding.contracts import Sequence
from outpace.decoding.outputs import TargetOutputs
from outpace.decoding.sampling import distribution, sample
from outpace.decoding.verify import rejection
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.decoding.verify.rejection import RejectionVerifier
from outpace.types import NO_PARENT, Accepted, Draft, SamplingParams

V = 3
LENGTH = 3  # tokens of the joint distribution that is compared
PARAMS = SamplingParams(temperature=1.0, seed=1)
TREES = {
    "empty": [],
    "chain": [-1, 0],
    "siblings": [-1, -1, -1],
    "tree": [-1, -1, 0, 0],
    "deep": [-1, 0, -1, 2],
}


def target_logits(context: tuple[int, ...]) -> np.ndarray:
    return (np.random.default_rng([1, *context]).standard_normal(V) * 1.5).astype(np.float32)


def target(context: tuple[int, ...], params: SamplingParams = PARAMS) -> np.ndarray:
    return distribution(target_logits(context), params)


def drafter(context: tuple[int, ...]) -> np.ndarray:
    """The drafter's q; one token in three contexts has no weight."""
    rng = np.random.default_rng([2, *context])
    q = rng.dirichlet(np.ones(V)).astype(np.float32)
    if rng.random() < 1 / 3:
        q[rng.integers(V)] = 0
    q /= q.sum()
    return q


class Script:
    """Answers to the verifier's random choices, one outcome after another (depth first)."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.options: list[int] = []
        self.at, self.probability = 0, 1.0

    def choose(self, probabilities: list[float]) -> int:
        if self.at == len(self.answers):
            self.answers.append(0)
            self.options.append(len(probabilities))
        answer = self.answers[self.at]
        self.at += 1
        self.probability *= probabilities[answer]
        return answer

    def outcomes(self) -> Iterator[None]:
        while True:
            self.at, self.probability = 0, 1.0
            yield
            while self.answers and self.answers[-1] + 1 == self.options[-1]:
                self.answers.pop()
                self.options.pop()
            if not self.answers:
                return
            self.answers[-1] += 1


class Probe:
    """Stands for a uniform: `probe < threshold` is true with probability min(1, threshold)."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def __lt__(self, threshold: float) -> bool:
        accept = min(1.0, threshold)
        return self.script.choose([accept, 1 - accept]) == 0


def contexts_of(parents: list[int], tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
    contexts: list[tuple[int, ...]] = []
    for parent, token in zip(parents, tokens, strict=True):
        contexts.append((*(contexts[parent] if parent >= 0 else ()), token))
    return contexts


def build(parents: list[int], tokens: tuple[int, ...], sampled: bool) -> tuple[Draft, float, TargetOutputs]:
    """The draft, the probability that the drafter draws it, and the target's outputs for it."""
    contexts = contexts_of(parents, tokens)
    q = [drafter(context[:-1]) for context in contexts]
    exact = [row.astype(np.float64) / row.sum(dtype=np.float64) for row in q]
    probability = float(np.prod([row[t] for row, t in zip(exact, tokens, strict=True)]))
    draft = Draft(np.array(tokens, np.int64), np.array(parents, np.int64), ["x"] * len(tokens))
    if sampled and tokens:
        draft.q = np.stack(q)
    logits = np.stack([target_logits(c) for c in [(), *contexts]])
    return draft, probability, TargetOutputs.of(torch.from_numpy(logits))


def output_distribution(
    monkeypatch: pytest.MonkeyPatch, parents: list[int], drafts: list[tuple[int, ...]], sampled: bool
) -> dict[tuple[int, ...], float]:
    """Joint distribution of the first LENGTH tokens; what a step leaves open is the target's."""
    script = Script()
    monkeypatch.setattr(rejection, "uniform", lambda *key: Probe(script))
    monkeypatch.setattr(rejection, "draw", lambda p, u: script.choose((p / p.sum()).tolist()))
    joint: dict[tuple[int, ...], float] = defaultdict(float)
    for tokens in drafts:
        draft, drawn, outputs = build(parents, tokens, sampled)
        if sampled and not drawn:
            continue
        for _ in script.outcomes():
            sequence = Sequence(0, [0], 1, PARAMS)
            out = tuple(RejectionVerifier().verify(sequence, draft, outputs).tokens.tolist())
            weight = script.probability * (drawn if sampled else 1.0)
            for rest in itertools.product(range(V), repeat=max(0, LENGTH - len(out))):
                whole, p = out + rest, weight
                for i in range(len(out), len(whole)):
                    p *= target(whole[:i])[whole[i]]
                joint[whole[:LENGTH]] += p
    return joint


def check_joint(joint: dict[tuple[int, ...], float]) -> None:
    difference = 0.0
    for whole in itertools.product(range(V), repeat=LENGTH):
        exact = float(np.prod([target(whole[:i])[whole[i]] for i in range(LENGTH)]))
        difference += abs(exact - joint.get(whole, 0.0))
    assert difference / 2 <= 1e-9


@pytest.mark.parametrize("shape", TREES)
def test_sampled_drafts_leave_the_target_distribution(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    parents = TREES[shape]
    drafts = list(itertools.product(range(V), repeat=len(parents)))
    check_joint(output_distribution(monkeypatch, parents, drafts, sampled=True))


@pytest.mark.parametrize("shape", TREES)
def test_outright_proposals_leave_the_target_distribution(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    for tokens in itertools.islice(itertools.product(range(V), repeat=len(TREES[shape])), 0, None, 7):
        check_joint(output_distribution(monkeypatch, TREES[shape], [tokens], sampled=False))


def verify(draft: Draft, outputs: TargetOutputs, params: SamplingParams, length: int = 1) -> Accepted:
    return RejectionVerifier().verify(Sequence(0, [0] * length, length, params), draft, outputs)


def test_q_equal_to_p_is_always_accepted() -> None:
    tokens = (2, 0, 1)
    contexts = contexts_of([-1, 0, 1], tokens)
    outputs = TargetOutputs.of(torch.from_numpy(np.stack([target_logits(c) for c in [(), *contexts]])))
    q = np.stack([target(c[:-1]) for c in contexts])
    for seed in range(50):
        params = SamplingParams(temperature=1.0, seed=seed)
        seen = verify(Draft.chain(list(tokens), "x", q=q.astype(np.float64)), outputs, params)  # type: ignore[arg-type]
        assert seen.path.tolist() == [0, 1, 2]


def test_what_the_target_excludes_is_never_accepted() -> None:
    logits = np.array([[0.0, 5.0, 4.0]] * 3, dtype=np.float32)
    outputs = TargetOutputs.of(torch.from_numpy(logits))
    q = np.tile(np.array([1.0, 0.0, 0.0], dtype=np.float32), (2, 1))
    for seed in range(50):
        params = SamplingParams(temperature=1.0, top_k=2, seed=seed)
        for draft in (Draft.chain([0, 0], "x", q=q), Draft.chain([0, 0], "x")):
            seen = verify(draft, outputs, params)
            assert len(seen.path) == 0 and seen.tokens[0] in (1, 2)


def test_without_a_draft_it_is_plain_decoding() -> None:
    for seed in range(50):
        params = SamplingParams(temperature=1.3, seed=seed)
        seen = verify(Draft.empty(), TargetOutputs.of(torch.from_numpy(target_logits(())[None])), params, 4)
        assert seen.tokens.tolist() == [sample(target_logits(()), params, None, 4)]


def test_greedy_is_decided_as_by_the_coupled_verifier() -> None:
    for tokens in itertools.product(range(V), repeat=4):
        draft, _, outputs = build(TREES["tree"], tokens, sampled=False)
        greedy = SamplingParams()
        coupled = CoupledVerifier().verify(Sequence(0, [0], 1, greedy), draft, outputs)
        assert verify(draft, outputs, greedy).tokens.tolist() == coupled.tokens.tolist()


def test_accepted_nodes_form_a_path_and_penalties_see_it() -> None:
    params = SamplingParams(temperature=0.7, presence_penalty=1.0, logprobs=2, seed=5)
    for tokens in itertools.product(range(V), repeat=4):
        draft, _, outputs = build(TREES["tree"], tokens, sampled=False)
        sequence = Sequence(0, [0], 1, params)
        seen = RejectionVerifier().verify(sequence, draft, outputs)
        assert draft.parents[seen.path].tolist() == [NO_PARENT, *seen.path.tolist()][: len(seen.path)]
        assert draft.tokens[seen.path].tolist() == seen.tokens.tolist()[:-1]
        assert seen.logprobs is not None and len(seen.logprobs) == len(seen.tokens)
        assert sequence.history.tokens == [0]
