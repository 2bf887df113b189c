"""The output distribution of the exact verifiers, by enumeration of every outcome: verifier x sampler x draft.

The verifier's own code runs once for every outcome of its random choices. Together with the probability that the
drafter draws the draft, this gives the joint distribution of the first tokens without drawing anything. It must be the
target's, to 1e-9 in total variation.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from functools import cache

import numpy as np
import pytest
import torch
from enumeration import Enumeration

from outpace.decoding.contracts import Sequence, Verifier
from outpace.decoding.outputs import TargetOutputs
from outpace.decoding.sampling import History, Stream, distribution, draw, uniform
from outpace.decoding.verify import block, rejection
from outpace.decoding.verify.block import BlockVerifier
from outpace.decoding.verify.rejection import RejectionVerifier
from outpace.types import Draft, SamplingParams

V = 3
LENGTH = 3  # tokens of the joint distribution that is compared
PROMPT = [0]
CHAINS = {"empty": [], "one": [-1], "chain": [-1, 0], "long": [-1, 0, 1]}
TREES = {"siblings": [-1, -1, -1], "tree": [-1, -1, 0, 0], "deep": [-1, 0, -1, 2]}
SAMPLERS = {
    "temperature": SamplingParams(temperature=0.7),
    "top_k": SamplingParams(temperature=1.0, top_k=2),
    "top_p": SamplingParams(temperature=1.2, top_p=0.8),
    "min_p": SamplingParams(temperature=1.0, min_p=0.3),
    "penalties": SamplingParams(temperature=1.0, repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=-0.4),
    "bias": SamplingParams(temperature=1.0, logit_bias={0: 1.0, 2: -1.5}),
    "grammar": SamplingParams(temperature=1.0, regex="see NoRepeat"),
}
DRAWS = ("outright", "independent", "without replacement")


class NoRepeat:
    """Stands for the matcher of a grammar: no token twice in a row."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def advance(self, token: int) -> None:
        self.tokens.append(token)

    def retreat(self, n: int) -> None:
        del self.tokens[len(self.tokens) - n :]

    def allowed(self) -> np.ndarray:
        return np.arange(V) != (self.tokens[-1] if self.tokens else -1)


@cache
def target_logits(context: tuple[int, ...]) -> np.ndarray:
    return (np.random.default_rng([1, *context]).standard_normal(V) * 1.5).astype(np.float32)


def target(context: tuple[int, ...], params: SamplingParams) -> np.ndarray:
    history = History([*PROMPT, *context], len(PROMPT), matcher=NoRepeat())  # type: ignore[arg-type]
    return distribution(target_logits(context), params, history)


@cache
def drafter(context: tuple[int, ...], sparse: bool) -> np.ndarray:
    """The drafter's q f32[V]; `sparse`: one token in three contexts has no weight."""
    rng = np.random.default_rng([2, *context])
    q = rng.dirichlet(np.ones(V)).astype(np.float32)
    if sparse and rng.random() < 1 / 3:
        q[rng.integers(V)] = 0
    return q / q.sum()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Enumeration:
    return scripted(monkeypatch)


def scripted(patch: pytest.MonkeyPatch) -> Enumeration:
    """The verifiers' random choices, answered by an enumeration."""
    script = Enumeration()
    for module in (rejection, block):
        patch.setattr(module, "uniform", script.uniform)
        patch.setattr(module, "draw", script.draw)
    return script


def build(parents: list[int], tokens: tuple[int, ...], draws: str) -> tuple[Draft, float, TargetOutputs]:
    """The draft, the probability that the drafter draws it, and the target's outputs for it."""
    contexts: list[tuple[int, ...]] = []
    rows, probability = [], 1.0
    for node, (parent, token) in enumerate(zip(parents, tokens, strict=True)):
        above = contexts[parent] if parent >= 0 else ()
        contexts.append((*above, token))
        rows.append(drafter(above, sparse=draws == "independent"))
        q = rows[-1].astype(np.float64)
        if draws == "without replacement":
            q[[t for p, t in zip(parents[:node], tokens[:node], strict=True) if p == parent]] = 0
        probability *= q[token] / q.sum() if draws != "outright" else 1.0
    draft = Draft(np.array(tokens, np.int64), np.array(parents, np.int64), ["x"] * len(tokens))
    if draws != "outright" and tokens:
        draft.q, draft.replacement = np.stack(rows), draws == "independent"
    logits = np.stack([target_logits(c) for c in [(), *contexts]])
    return draft, float(probability), TargetOutputs.of(torch.from_numpy(logits))


def joint(
    script: Enumeration,
    verifier: Verifier,
    parents: list[int],
    drafts: list[tuple[int, ...]],
    draws: str,
    params: SamplingParams,
) -> tuple[dict[tuple[int, ...], float], float]:
    """Joint distribution of the first LENGTH tokens, what a step leaves open being the target's; and the expected
    number of accepted nodes."""
    found: dict[tuple[int, ...], float] = defaultdict(float)
    accepted = 0.0
    for tokens in drafts:
        draft, drawn, outputs = build(parents, tokens, draws)
        if not drawn:
            continue
        for _ in script.outcomes():
            sequence = Sequence(0, list(PROMPT), len(PROMPT), params, matcher=NoRepeat())  # type: ignore[arg-type]
            seen = verifier.verify(sequence, draft, outputs)
            out, weight = tuple(seen.tokens.tolist()), script.probability * drawn
            assert draft.tokens[seen.path].tolist() == list(out[:-1])
            accepted += weight * len(seen.path)
            for rest in itertools.product(range(V), repeat=max(0, LENGTH - len(out))):
                whole, p = out + rest, weight
                for i in range(len(out), len(whole)):
                    p *= target(whole[:i], params)[whole[i]]
                found[whole[:LENGTH]] += p
    return found, accepted


def total_variation(found: dict[tuple[int, ...], float], params: SamplingParams) -> float:
    difference = 0.0
    for whole in itertools.product(range(V), repeat=LENGTH):
        exact = float(np.prod([target(whole[:i], params)[whole[i]] for i in range(LENGTH)]))
        difference += abs(exact - found.get(whole, 0.0))
    return difference / 2


def all_drafts(parents: list[int]) -> list[tuple[int, ...]]:
    return list(itertools.product(range(V), repeat=len(parents)))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "verifier, shape",
    [
        *((RejectionVerifier, shape) for shape in [*CHAINS, *TREES]),
        *((BlockVerifier, shape) for shape in [*CHAINS, "siblings"]),  # trees are handed to the other
    ],
)
def test_the_output_has_the_target_distribution(
    script: Enumeration, verifier: type[Verifier], shape: str, sampler: str
) -> None:
    parents, params = (CHAINS | TREES)[shape], SAMPLERS[sampler]
    for draws in DRAWS[1:]:
        if draws == "without replacement" and len(set(parents)) == len(parents):
            continue  # without siblings it is the same
        found, _ = joint(script, verifier(), parents, all_drafts(parents), draws, params)
        assert total_variation(found, params) <= 1e-9, draws
    for tokens in all_drafts(parents)[::7]:  # each one, whatever its tokens
        found, _ = joint(script, verifier(), parents, [tokens], "outright", params)
        assert total_variation(found, params) <= 1e-9, tokens


def test_a_wrong_q_shows() -> None:
    """The measure is not blind: siblings drawn without replacement but declared independent change the output."""
    with pytest.MonkeyPatch.context() as patch:
        script = scripted(patch)
        patch.setattr(rejection, "drawn_from", lambda draft, node, excluded=(): draft.q[node].astype(np.float64))
        params = SAMPLERS["temperature"]
        found, _ = joint(script, RejectionVerifier(), [-1, -1], all_drafts([-1, -1]), "without replacement", params)
    assert total_variation(found, params) > 1e-3


@pytest.mark.parametrize("shape", ["one", "chain", "long"])
def test_a_block_accepts_no_less_than_token_by_token(script: Enumeration, shape: str) -> None:
    parents, params = CHAINS[shape], SAMPLERS["temperature"]
    drafts = all_drafts(parents)
    _, together = joint(script, BlockVerifier(), parents, drafts, "independent", params)
    _, apart = joint(script, RejectionVerifier(), parents, drafts, "independent", params)
    assert together > apart + 1e-3 if len(parents) > 1 else together == pytest.approx(apart, abs=1e-12)


def test_a_block_proposed_outright_is_accepted_as_token_by_token(script: Enumeration) -> None:
    for tokens in all_drafts([-1, 0, 1])[::5]:
        _, together = joint(script, BlockVerifier(), [-1, 0, 1], [tokens], "outright", SAMPLERS["temperature"])
        _, apart = joint(script, RejectionVerifier(), [-1, 0, 1], [tokens], "outright", SAMPLERS["temperature"])
        assert together == pytest.approx(apart, abs=1e-12)


def test_siblings_without_replacement_are_accepted_more_often(script: Enumeration) -> None:
    parents, params = [-1, -1], SAMPLERS["temperature"]
    rates = {d: joint(script, RejectionVerifier(), parents, all_drafts(parents), d, params)[1] for d in DRAWS[1:]}
    assert rates["without replacement"] > rates["independent"]


@pytest.mark.parametrize("verifier", [RejectionVerifier, BlockVerifier])
def test_steps_in_a_row_use_no_random_number_twice(verifier: type[Verifier]) -> None:
    """A loop of real steps: 6000 seeds, the drafter samples its chains by the stream's rule. A block verifier looks at
    drafts that it then rejects, so that a drafter that drew by the token's position would spoil the distribution."""
    counts: dict[tuple[int, ...], int] = defaultdict(int)
    n, length = 6000, 4
    for seed in range(n):
        params = SamplingParams(temperature=1.0, seed=seed)
        sequence = Sequence(0, list(PROMPT), len(PROMPT), params)
        while len(sequence.output) < length:
            at, out = len(sequence.tokens), tuple(sequence.output)
            drafted: list[int] = []
            for i in range(3):
                q = drafter((*out, *drafted), sparse=False)
                drafted.append(draw(q, uniform(seed, at, Stream.DRAFT, i)))
            contexts = [(*out, *drafted[:i]) for i in range(4)]
            draft = Draft.chain(drafted, "x", q=np.stack([drafter(c, sparse=False) for c in contexts[:3]]))
            outputs = TargetOutputs.of(torch.from_numpy(np.stack([target_logits(c) for c in contexts])))
            sequence.tokens += verifier().verify(sequence, draft, outputs).tokens.tolist()
        counts[tuple(sequence.output[:length])] += 1
    statistic = 0.0
    for whole in itertools.product(range(V), repeat=length):
        p = np.prod([target(whole[:i], SamplingParams(temperature=1.0))[whole[i]] for i in range(length)])
        statistic += (counts[whole] - n * p) ** 2 / (n * p)
    assert statistic < 131  # chi-square, 80 degrees of freedom, p = 0.0003
