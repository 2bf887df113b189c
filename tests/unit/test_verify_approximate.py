"""Typical, top-k and tolerance acceptance against their definitions written out; verifiers by spec."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from outpace.decoding.contracts import Sequence, Verifier
from outpace.decoding.methods import make_verifier
from outpace.decoding.outputs import TargetOutputs
from outpace.decoding.sampling import History, distribution, sample
from outpace.decoding.tree import ancestors
from outpace.errors import MethodError, ParameterError
from outpace.registry import methods
from outpace.types import Draft, SamplingParams

V = 7
PROMPT = [1, 2]
TREE = [-1, -1, 0, 0, 1, 2, 4, -1]
Rule = Callable[[np.ndarray, int], bool]


def target_logits(context: list[int]) -> np.ndarray:
    return (np.random.default_rng([3, *context]).standard_normal(V) * 1.2).astype(np.float32)


def target(context: list[int], params: SamplingParams) -> np.ndarray:
    return distribution(target_logits(context), params, History([*PROMPT, *context], len(PROMPT)))


def typical(p: np.ndarray, token: int) -> bool:
    entropy = -sum(x * np.log(x) for x in p if x > 0)
    return p[token] >= min(0.2, 0.6 * np.exp(-entropy))


def topk(p: np.ndarray, token: int) -> bool:
    return p[token] > 0 and (p > p[token]).sum() < 3


def tolerance(p: np.ndarray, token: int) -> bool:
    return p[token] > 0 and np.log(p.max()) - np.log(p[token]) <= 0.8 + 1e-12


RULES: dict[str, Rule] = {
    "typical:epsilon=0.2,delta=0.6": typical,
    "topk:k=3": topk,
    "tolerance:epsilon=0.8": tolerance,
}
SAMPLED = [
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=1.3, top_p=0.7),
    SamplingParams(temperature=1.0, repetition_penalty=1.4, frequency_penalty=0.3, logit_bias={3: 1.0}),
]


def expected(draft: Draft, params: SamplingParams, rule: Rule) -> list[int]:
    """The longest path whose every token passes; of equally long ones the likeliest."""
    judged_at = SamplingParams(temperature=1.0) if params.greedy else params
    plain = SamplingParams(temperature=1.0, repetition_penalty=params.repetition_penalty,
                           frequency_penalty=params.frequency_penalty, logit_bias=params.logit_bias)  # fmt: skip
    best: tuple[int, float, list[int]] = (0, 0.0, [])
    for path in ancestors(draft.parents):
        tokens = draft.tokens[path].tolist()
        if all(rule(target(tokens[:i], judged_at), tokens[i]) for i in range(len(tokens))):
            likely = sum(np.log(target(tokens[:i], plain)[tokens[i]]) for i in range(len(tokens)))
            if (len(path), likely) > best[:2]:
                best = (len(path), likely, path)
    return best[2]


def outputs_of(draft: Draft) -> TargetOutputs:
    contexts = [[], *(draft.tokens[path].tolist() for path in ancestors(draft.parents))]
    return TargetOutputs.of(torch.from_numpy(np.stack([target_logits(c) for c in contexts])))


def random_draft(rng: np.random.Generator) -> Draft:
    return Draft(rng.integers(0, V, len(TREE)), np.array(TREE), ["x"] * len(TREE))


@pytest.mark.parametrize("spec", RULES)
def test_the_longest_path_that_passes_is_accepted(spec: str) -> None:
    verifier, rng, accepted = make_verifier(spec), np.random.default_rng(0), 0
    greedy = [SamplingParams()] if "typical" not in spec else []
    for params in [*SAMPLED, *greedy]:
        for _ in range(60):
            draft = random_draft(rng)
            sequence = Sequence(0, list(PROMPT), len(PROMPT), params)
            seen = verifier.verify(sequence, draft, outputs_of(draft))
            path = expected(draft, params, RULES[spec])
            assert seen.path == path
            tokens = draft.tokens[path].tolist()
            context = History([*PROMPT, *tokens], len(PROMPT))
            own = sample(target_logits(tokens), params, context, len(PROMPT) + len(tokens))
            assert seen.tokens == [*tokens, own]
            assert sequence.history.tokens == PROMPT
            accepted += len(path)
    assert accepted > 60


@pytest.mark.parametrize("spec", ["typical", "topk:k=1", "tolerance:epsilon=0"])
def test_greedy_and_strict_is_plain_decoding(spec: str) -> None:
    coupled, verifier, rng = make_verifier("coupled"), make_verifier(spec), np.random.default_rng(1)
    for _ in range(100):
        draft = random_draft(rng)
        a, b = (
            v.verify(Sequence(0, [1, 2], 2, SamplingParams()), draft, outputs_of(draft)) for v in (coupled, verifier)
        )
        assert a.tokens == b.tokens


@pytest.mark.parametrize("spec", ["coupled", "rejection", "block", "typical", "topk", "tolerance"])
def test_what_the_request_excludes_is_never_accepted(spec: str) -> None:
    for tokens, seed in itertools.product(itertools.product([4, 0, 1], repeat=2), range(8)):
        draft = Draft.chain(list(tokens), "x")
        params = SamplingParams(temperature=1.0, logit_bias={4: -100.0}, top_k=5, seed=seed)
        sequence = Sequence(0, list(PROMPT), 2, params)
        assert 4 not in make_verifier(spec).verify(sequence, draft, outputs_of(draft)).tokens


def test_logprobs_belong_to_the_tokens() -> None:
    params = SamplingParams(temperature=1.0, logprobs=2)
    for spec in ("block", "typical", "topk"):
        rng = np.random.default_rng(2)
        for _ in range(20):
            draft = Draft.chain(rng.integers(0, V, 4), "x")
            seen = make_verifier(spec).verify(Sequence(0, list(PROMPT), 2, params), draft, outputs_of(draft))
            tokens = seen.tokens
            exact = [np.log(target(tokens[:i], SamplingParams(temperature=1.0))[t]) for i, t in enumerate(tokens)]
            assert seen.logprobs is not None and seen.logprobs.tolist() == pytest.approx(exact, abs=1e-5)
            assert seen.top_logprobs is not None and len(seen.top_logprobs) == len(tokens)


def test_options_by_spec() -> None:
    made: Any = make_verifier("typical:epsilon=0.1,delta=0.3")
    assert (made.epsilon, made.delta) == (0.1, 0.3)
    made = make_verifier("topk: k=5")
    assert made.k == 5


@pytest.mark.parametrize(
    "spec, error, said",
    [
        ("typicall", MethodError, "coupled, rejection, tolerance, topk, typical"),
        ("typical:alpha=1", ParameterError, "epsilon=0.09"),
        ("typical:epsilon=much", ParameterError, "not a number"),
        ("typical:epsilon=0", ParameterError, "above 0"),
        ("typical:delta=nan", ParameterError, "above 0"),
        ("topk:k=0", ParameterError, "at least 1"),
        ("topk:k=1.5", ParameterError, "whole number"),
        ("tolerance:epsilon=-1", ParameterError, "0 or more"),
        ("tolerance:epsilon=nan", ParameterError, "0 or more"),
        ("tolerance:epsilon=inf", ParameterError, "0 or more"),
        ("coupled:k=1", ParameterError, "defaults: none"),
        ("rejection,", MethodError, "rejection"),
        ("", MethodError, "coupled"),
    ],
)
def test_bad_specs_are_refused(spec: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make_verifier(spec)


def test_every_verifier_says_what_it_does_to_the_output() -> None:
    exactness = {m.name: m.exactness for m in methods("verifier")}
    assert exactness == {
        "coupled": "identical", "rejection": "distribution", "block": "distribution",
        "typical": "approximate", "topk": "approximate", "tolerance": "approximate",
    }  # fmt: skip
    for entry in methods("verifier"):
        cls: type[Verifier] = entry.cls
        assert cls.exactness == entry.exactness
        assert cls.uses_q == (entry.exactness == "distribution")


def test_top_k_is_two_unless_said() -> None:
    assert make_verifier("topk").k == 2 and make_verifier("topk:k=5").k == 5  # type: ignore[attr-defined]
