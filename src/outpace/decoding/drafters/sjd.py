"""Speculative Jacobi decoding: guesses are samples, and are accepted with the probability that makes them exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...registry import register
from ...types import Draft
from ..contracts import DrafterContext, Sequence
from ..sampling import Stream, distribution_of, draw, uniform
from .answers import Answers
from .jacobi import Guess, Jacobi, JacobiState
from .nodes import Nodes


@register(
    family="SPEC",
    title="Speculative Jacobi decoding",
    paper="https://arxiv.org/abs/2410.01699",
    exactness="identical",
)
@dataclass(slots=True, eq=False)
class SpeculativeJacobi(Jacobi):
    """Jacobi decoding of sampled text. Where a verifier uses q, a guess is drawn from the target's distribution at its
    position in the last iteration, which is its q; a first guess from the tokens of the prompt, or from all tokens
    alike. Every guess behind a rejected one is drawn anew.

    Where none does (the coupled verifier, a merged draft, a greedy request) acceptance cannot be probabilistic, and
    this is Jacobi decoding with coupled draws.

    Teng et al., "Accelerating Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi Decoding",
    section 4.2 (algorithm 1); their initialisation by nearby pixels has no counterpart in text.

    Parameters: as those of Jacobi. The length of a draft never depends on what was drawn: it is the window.
    """

    name = "sjd"
    paper = "https://arxiv.org/abs/2410.01699"

    sampled: bool = False

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> SpeculativeJacobi:
        sampled = context.sampled and not context.merged
        return cls(context.vocab_size, coupled=not context.sampled, sampled=sampled, **options)

    def _probabilistic(self, sequence: Sequence) -> bool:
        return self.sampled and not sequence.params.greedy

    def _grow(self, sequence: Sequence, state: JacobiState, nodes: Nodes, budget: int, floor: float) -> Draft | None:
        if not self._probabilistic(sequence):
            return Jacobi._grow(self, sequence, state, nodes, budget, floor)
        for guess in state.guesses:
            guess.age = 0  # it tells of the guess's own token: scores may depend on the depth alone
        Jacobi._grow(self, sequence, state, nodes, budget, floor)
        draft = nodes.draft(self.name)
        if len(nodes):
            draft.q = np.stack([guess.q for guess in state.guesses[:budget] if guess.q is not None])
        return draft

    def _first(self, sequence: Sequence, state: JacobiState, position: int) -> Guess:
        if not self._probabilistic(sequence):
            return Jacobi._first(self, sequence, state, position)
        if self.start == "random":
            return self._drawn(sequence, state, position, np.ones(self.vocab_size))
        prompt = np.array(sequence.tokens[: sequence.prompt_length])
        return self._drawn(sequence, state, position, np.bincount(prompt, minlength=self.vocab_size))

    def _next(self, sequence: Sequence, state: JacobiState, answers: Answers, node: int) -> Guess:
        if not self._probabilistic(sequence):
            return Jacobi._next(self, sequence, state, answers, node)
        p = distribution_of(answers.processed(node), sequence.params)
        return self._drawn(sequence, state, answers.position(node), p)

    def _drawn(self, sequence: Sequence, state: JacobiState, position: int, weights: np.ndarray) -> Guess:
        q = (weights / weights.sum()).astype(np.float32)
        state.draws += 1
        token = draw(q, uniform(sequence.params.seed, position, Stream.DRAFT, state.draws))
        return Guess(token, q=q)
