"""Rejection sampling: what it must do on single drafts. Its distribution is in test_verify_distribution.py."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from outpace.decoding.contracts import Sequence
from outpace.decoding.outputs import TargetOutputs
from outpace.decoding.sampling import distribution, sample
from outpace.decoding.verify.coupled import CoupledVerifier
from outpace.decoding.verify.rejection import RejectionVerifier
from outpace.types import NO_PARENT, Accepted, Draft, SamplingParams

V = 3
PARAMS = SamplingParams(temperature=1.0, seed=1)
TREE = [-1, -1, 0, 0]


def target_logits(context: tuple[int, ...]) -> np.ndarray:
    return (np.random.default_rng([1, *context]).standard_normal(V) * 1.5).astype(np.float32)


def target(context: tuple[int, ...], params: SamplingParams = PARAMS) -> np.ndarray:
    return distribution(target_logits(context), params)


def contexts_of(parents: list[int], tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
    contexts: list[tuple[int, ...]] = []
    for parent, token in zip(parents, tokens, strict=True):
        contexts.append((*(contexts[parent] if parent >= 0 else ()), token))
    return contexts


def build(parents: list[int], tokens: tuple[int, ...]) -> tuple[Draft, TargetOutputs]:
    """A draft proposed outright, and the target's outputs for it."""
    draft = Draft(np.array(tokens, np.int64), np.array(parents, np.int64), ["x"] * len(tokens))
    logits = np.stack([target_logits(c) for c in [(), *contexts_of(parents, tokens)]])
    return draft, TargetOutputs.of(torch.from_numpy(logits))


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
        assert seen.path == [0, 1, 2]


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
        assert seen.tokens == [sample(target_logits(()), params, None, 4)]


def test_greedy_is_decided_as_by_the_coupled_verifier() -> None:
    for tokens in itertools.product(range(V), repeat=4):
        draft, outputs = build(TREE, tokens)
        greedy = SamplingParams()
        coupled = CoupledVerifier().verify(Sequence(0, [0], 1, greedy), draft, outputs)
        assert verify(draft, outputs, greedy).tokens == coupled.tokens


def test_accepted_nodes_form_a_path_and_penalties_see_it() -> None:
    params = SamplingParams(temperature=0.7, presence_penalty=1.0, logprobs=2, seed=5)
    for tokens in itertools.product(range(V), repeat=4):
        draft, outputs = build(TREE, tokens)
        sequence = Sequence(0, [0], 1, params)
        seen = RejectionVerifier().verify(sequence, draft, outputs)
        assert draft.parents[seen.path].tolist() == [NO_PARENT, *seen.path][: len(seen.path)]
        assert draft.tokens[seen.path].tolist() == seen.tokens[:-1]
        assert seen.logprobs is not None and len(seen.logprobs) == len(seen.tokens)
        assert sequence.history.tokens == [0]
