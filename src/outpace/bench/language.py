"""A language of three tokens on which verifiers are proved: small enough to enumerate all that can happen.

Contexts are tuples of tokens behind the prompt. Shapes: `n` draft nodes, `V` = 3 tokens.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np
import torch

from ..decoding.contracts import Sequence, Verifier
from ..decoding.outputs import TargetOutputs
from ..decoding.sampling import History, distribution
from ..types import Draft, SamplingParams
from .enumeration import Enumeration

V = 3
LENGTH = 3  # tokens of the joint distribution that is compared
PROMPT = [0]
CHAINS = {"empty": [], "one": [-1], "chain": [-1, 0], "long": [-1, 0, 1]}
TREES = {"siblings": [-1, -1, -1], "tree": [-1, -1, 0, 0], "deep": [-1, 0, -1, 2]}
SAMPLERS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.7),
    "top-k": SamplingParams(temperature=1.0, top_k=2),
    "top-p": SamplingParams(temperature=1.2, top_p=0.8),
    "min-p": SamplingParams(temperature=1.0, min_p=0.3),
    "penalties": SamplingParams(temperature=1.0, repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=-0.4),
    "bias": SamplingParams(temperature=1.0, logit_bias={0: 1.0, 2: -1.5}),
    "grammar": SamplingParams(temperature=1.0, regex="see NoRepeat"),
}
#: How a draft came about: proposed outright, or sampled, siblings independently or without replacement
Draws = Literal["outright", "independent", "without replacement"]
Joint = dict[tuple[int, ...], float]


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
    """What the sampler draws from behind a context, f64[V]."""
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


def all_drafts(parents: Seq[int]) -> list[tuple[int, ...]]:
    return list(itertools.product(range(V), repeat=len(parents)))


def build(parents: Seq[int], tokens: tuple[int, ...], draws: Draws) -> tuple[Draft, float, TargetOutputs]:
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


def new_sequence(params: SamplingParams, prompt: Seq[int] = PROMPT) -> Sequence:
    return Sequence(0, list(prompt), len(prompt), params, matcher=NoRepeat())  # type: ignore[arg-type]


def joint(
    script: Enumeration,
    verifier: Verifier,
    parents: Seq[int],
    drafts: Seq[tuple[int, ...]],
    draws: Draws,
    params: SamplingParams,
) -> tuple[Joint, float]:
    """Joint distribution of the first LENGTH tokens, what a step leaves open being the target's; and the expected
    number of accepted nodes. Each draft has a seed of its own, which a sound verifier makes nothing of here. Raises
    ValueError when the accepted path and the tokens of a step disagree."""
    found: Joint = defaultdict(float)
    accepted = 0.0
    for seed, tokens in enumerate(drafts, params.seed):
        draft, drawn, outputs = build(parents, tokens, draws)
        if not drawn:
            continue
        seeded = replace(params, seed=seed)
        for _ in script.outcomes():
            seen = verifier.verify(new_sequence(seeded), draft, outputs)
            out, weight = tuple(seen.tokens), script.probability * drawn
            if draft.tokens[seen.path].tolist() != list(out[:-1]):
                raise ValueError(f"the accepted path holds {draft.tokens[seen.path].tolist()}, the tokens are {out}")
            accepted += weight * len(seen.path)
            for whole, p in _completed(out, params).items():
                found[whole] += weight * p
    return found, accepted


def _completed(out: tuple[int, ...], params: SamplingParams) -> Joint:
    """All ways in which the target goes on to LENGTH tokens, with their probabilities."""
    ways: Joint = {out[:LENGTH]: 1.0}
    for _ in range(len(out), LENGTH):
        ways = {
            (*whole, token): p * q
            for whole, p in ways.items()
            for token, q in enumerate(target(whole, params).tolist())
        }
    return ways


def exact_joint(params: SamplingParams) -> Joint:
    """The same of plain decoding."""
    return _completed((), params)


def distance(found: Joint, params: SamplingParams) -> float:
    """Total variation from plain decoding, probability that is missing altogether included."""
    exact = exact_joint(params)
    return sum(abs(exact.get(whole, 0.0) - found.get(whole, 0.0)) for whole in {*exact, *found}) / 2
