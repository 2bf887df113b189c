"""Coupled verification equals plain decoding, whatever is drafted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from outpace.decoding.contracts import Sequence
from outpace.decoding.outputs import TargetOutputs
from outpace.decoding.sampling import History, sample
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.types import NO_PARENT, Draft, SamplingParams

V = 11


def model(context: list[int]) -> np.ndarray:
    """A toy target: logits that depend on the last three tokens and nothing else."""
    rng = np.random.default_rng([7, *context[-3:]])
    return (rng.standard_normal(V) * 2).astype(np.float32)


def plain(prompt: list[int], params: SamplingParams, n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(sample(model(tokens), params, History(tokens, len(prompt)), len(tokens)))
    return tokens[len(prompt) :]


def outputs_of(tokens: list[int], draft: Draft) -> TargetOutputs:
    rows, contexts = [model(tokens)], list[list[int]]()
    for token, parent in zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True):
        contexts.append([*(tokens if parent == NO_PARENT else contexts[parent]), token])
        rows.append(model(contexts[-1]))
    return TargetOutputs.of(torch.from_numpy(np.stack(rows)))


def random_params(rng: np.random.Generator) -> SamplingParams:
    return SamplingParams(
        temperature=float(rng.choice([0.0, 0.7, 1.3])),
        top_k=int(rng.choice([0, 4])),
        top_p=float(rng.choice([1.0, 0.8])),
        min_p=float(rng.choice([0.0, 0.1])),
        repetition_penalty=float(rng.choice([1.0, 1.4])),
        presence_penalty=float(rng.choice([0.0, 0.6])),
        frequency_penalty=float(rng.choice([0.0, -0.3])),
        logit_bias={2: 1.0} if rng.random() < 0.3 else {},
        seed=int(rng.integers(1000)),
        logprobs=2 if rng.random() < 0.2 else None,
    )


def random_draft(rng: np.random.Generator, truth: list[int]) -> Draft:
    """A random tree; half of the nodes below the true path carry the true token."""
    n = int(rng.integers(0, 12))
    tokens, parents, depth_of_true = list[int](), list[int](), {NO_PARENT: 0}
    for node in range(n):
        parent = int(rng.integers(-1, node)) if node else NO_PARENT
        depth = depth_of_true.get(parent)
        token = int(rng.integers(V))
        if depth is not None and depth < len(truth) and rng.random() < 0.5:
            token = truth[depth]
        if depth is not None and depth < len(truth) and token == truth[depth]:
            depth_of_true[node] = depth + 1
        tokens.append(token)
        parents.append(parent)
    return Draft(np.array(tokens, np.int64), np.array(parents, np.int64), ["x"] * n)


def test_equals_plain_decoding_over_random_trees_and_parameters() -> None:
    verifier, rng = CoupledVerifier(), np.random.default_rng(0)
    accepted = 0
    for _ in range(300):
        params = random_params(rng)
        prompt = rng.integers(V, size=int(rng.integers(1, 6))).tolist()
        truth = plain(prompt, params, 20)
        sequence = Sequence(0, list(prompt), len(prompt), params)
        while len(sequence.output) < 10:
            ahead = truth[len(sequence.output) :]
            draft = random_draft(rng, ahead)
            seen = verifier.verify(sequence, draft, outputs_of(sequence.tokens, draft))
            tokens = seen.tokens
            assert tokens == ahead[: len(tokens)]
            assert draft.tokens[seen.path].tolist() == tokens[:-1]
            assert (draft.parents[seen.path] == [NO_PARENT, *seen.path[:-1]]).all()
            if params.logprobs is not None:
                assert seen.logprobs is not None and len(seen.logprobs) == len(tokens)
                assert seen.top_logprobs is not None and len(seen.top_logprobs) == len(tokens)
            accepted += len(seen.path)
            sequence.tokens.extend(tokens)
        assert sequence.output == truth[: len(sequence.output)]
    assert accepted > 500


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("length", [0, 1, 9])
def test_always_and_never_accepted(temperature: float, length: int) -> None:
    params = SamplingParams(temperature=temperature, seed=3)
    truth = plain([1, 2], params, length + 1)
    sequence = Sequence(0, [1, 2], 2, params)
    right = Draft.chain(truth[:length], "x")
    assert CoupledVerifier().verify(sequence, right, outputs_of([1, 2], right)).tokens == truth
    wrong = Draft.chain([(t + 1) % V for t in truth[:length]], "x")
    seen = CoupledVerifier().verify(sequence, wrong, outputs_of([1, 2], wrong))
    assert seen.tokens == truth[:1] and len(seen.path) == 0


def test_verify_leaves_the_history_as_it_was() -> None:
    params = SamplingParams(repetition_penalty=1.5)
    sequence = Sequence(0, [1, 2, 2], 1, params)
    truth = plain([1, 2, 2], params, 4)
    draft = Draft.chain(truth[:3], "x")
    CoupledVerifier().verify(sequence, draft, outputs_of(sequence.tokens, draft))
    assert sequence.tokens == [1, 2, 2]
    assert sequence.history.tokens == [1, 2, 2]
    assert sequence.history.ids.tolist() == [1, 2]
