"""Jacobi decoding: the text is the fixed point of guessing all of it at once, again and again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ParameterError
from ...models.decoder import Taps
from ...registry import register
from ...types import NO_PARENT, Draft, FloatArray
from ..contracts import DrafterContext, Observation, Sequence
from ..sampling import Stream, uniform
from .answers import Answers, follows
from .nodes import NodeDrafter, Nodes, NodeState, check_range
from .rates import Rates

FORMS = ("jacobi", "gauss-seidel", "hybrid")
STARTS = ("prompt", "random")
_DEPTHS, _AGES = 8, 4  # of the table of rates; deeper and older guesses share the last cells


@dataclass(slots=True)
class Guess:
    """Of the token at one position. `age`: answers in a row that it has survived."""

    token: int
    age: int = 0
    q: FloatArray | None = None  # [V] what it was sampled from, if it was
    lattice: tuple[list[int], NDArray[np.float64]] | None = None  # the likeliest tokens there, if somebody wants them


@dataclass(slots=True)
class JacobiState(NodeState):
    first: int = 0  # position of the first guess
    guesses: list[Guess] = field(default_factory=list)
    draws: int = 0  # random numbers used, so that each is used once

    def drop_before(self, position: int) -> None:
        del self.guesses[: max(position - self.first, 0)]
        self.first = position


@register(
    family="SPEC",
    title="Jacobi and Gauss-Seidel decoding",
    paper="https://arxiv.org/abs/2305.10427",
    exactness="identical",
    claim="up to 1.38x, nearly 2x with more parallel resources (translation)",
)
@dataclass(slots=True, eq=False)
class Jacobi(NodeDrafter[JacobiState]):
    """The next tokens are guessed; the target's answers at all guessed positions, computed in one step, are the next
    guesses. Greedy decoding is the fixed point, and each step settles one more token at least. Where the target
    samples, an answer is its coupled draw, with the uniform number of its position, so that the fixed point is the
    sampled text; a verifier that uses q gets the likeliest token.

    Forms: `jacobi` guesses the `window` positions behind the text; `gauss-seidel` guesses blocks of `window`
    positions, one block after the other, each until it is settled; `hybrid` does so for the first `parallel` tokens of
    the output and then decodes plainly. Song et al., "Accelerating Feedforward Computation via Parallel Nonlinear
    Equation Solving" (arXiv 2002.03629, section 3); for text: Santilli et al., "Accelerating Transformer Inference for
    Translation via Parallel Decoding", section 3 (PJ, PGJ and HGJ decoding).

    Parameters: `form`; `window`; `start` of the iteration: the prompt's tokens over again, or random ones; `parallel`.
    A guess's score is the measured acceptance for its place and the answers that it has survived. A row pays by the
    next guess too, so no guess is left out for a low score.
    """

    name = "jacobi"
    paper = "https://arxiv.org/abs/2305.10427"

    vocab_size: int
    form: str = "jacobi"
    window: int = 12
    start: str = "prompt"
    parallel: int = 128
    coupled: bool = True
    lattice: int = field(default=0, init=False)  # likeliest tokens to keep of each answer
    _states: dict[int, JacobiState] = field(default_factory=dict, init=False, repr=False)
    _rates: Rates = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for parameter, allowed in (("form", FORMS), ("start", STARTS)):
            value = getattr(self, parameter)
            if value not in allowed:
                raise ParameterError(f"{self.name}:{parameter}={value!r} is unknown; there are: {', '.join(allowed)}")
        check_range(self.name, "window", self.window, 1)
        check_range(self.name, "parallel", self.parallel, 0)
        self._rates = Rates(np.outer(0.9 ** np.arange(_DEPTHS), [0.08, 0.2, 0.4, 0.6]))

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> Jacobi:
        return cls(context.vocab_size, coupled=not context.sampled, **options)

    @property
    def taps(self) -> Taps:
        return Taps(topk=self.lattice)

    def begin(self, sequence: Sequence) -> None:
        self._states[sequence.id] = JacobiState()

    def _grow(self, sequence: Sequence, state: JacobiState, nodes: Nodes, budget: int, floor: float) -> Draft | None:
        self._refill(sequence, state)
        self._chain(nodes, state.guesses[:budget])
        return None

    def _chain(self, nodes: Nodes, guesses: list[Guess]) -> None:
        rates, node = self._rates.value, NO_PARENT
        for depth, guess in enumerate(guesses):
            cell = (min(depth, _DEPTHS - 1), min(guess.age, _AGES - 1))
            node = nodes.add(node, guess.token, float(rates[cell]), cell)

    def _refill(self, sequence: Sequence, state: JacobiState) -> None:
        """Guesses for the whole window, as far as the form has one now."""
        state.drop_before(len(sequence.tokens))
        settled = not state.guesses
        if self.form == "hybrid":
            settled &= len(sequence.tokens) - sequence.prompt_length < self.parallel
        if self.form == "jacobi" or settled:
            for place in range(len(state.guesses), self.window):
                state.guesses.append(self._first(sequence, state, state.first + place))

    def _first(self, sequence: Sequence, state: JacobiState, position: int) -> Guess:
        """The guess to start from."""
        if self.start == "prompt":
            return Guess(sequence.tokens[position % sequence.prompt_length])
        return Guess(int(uniform(sequence.params.seed, position, Stream.DRAFT) * self.vocab_size))

    def _next(self, sequence: Sequence, state: JacobiState, answers: Answers, node: int) -> Guess:
        """The guess behind `node`."""
        return Guess(answers.token(node, self.coupled))

    def columns(self, sequence: Sequence) -> list[dict[int, float]]:
        """For each guessed position the likeliest tokens of the last answer there, the guess among them, with their
        probabilities. What was never answered is the guess alone. After `propose`; for who sets `lattice`."""
        found: list[dict[int, float]] = []
        for guess in self._states[sequence.id].guesses:
            ids, p = guess.lattice or ([], np.empty(0))
            column = dict(zip(ids, p.tolist(), strict=True))
            column.setdefault(guess.token, max(column.values(), default=1.0))
            found.append(column)
        return found

    def adopt(self, sequence: Sequence, tokens: list[int]) -> None:
        """Guess these tokens instead, which are proposed by someone else in this step."""
        state = self._states[sequence.id]
        for guess, token in zip(state.guesses, tokens, strict=False):
            if token != guess.token:
                guess.token, guess.age = token, 0
        state.nodes = Nodes(len(sequence.tokens))
        self._chain(state.nodes, state.guesses[: len(tokens)])

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        state = self._states[sequence.id]
        if follows(sequence, seen, state.nodes.root) and len(state.nodes):
            self._iterate(sequence, state, Answers(sequence, seen, state.nodes.draft(self.name)))
        state.drop_before(len(sequence.tokens))
        self._check(sequence, state)

    def _iterate(self, sequence: Sequence, state: JacobiState, answers: Answers) -> None:
        """Replace the guesses by the target's answers."""
        root, known = state.nodes.root, len(sequence.tokens)
        end = state.first + len(state.guesses)
        for node in range(len(state.nodes)):
            position = root + node + 1
            if node not in answers:
                break
            if position < known or (position >= end and self.form != "jacobi"):
                continue
            place = position - state.first
            new = self._next(sequence, state, answers, node)
            if self.lattice:
                new.lattice = answers.likeliest(node, self.lattice)
            if position < end:
                old = state.guesses[place]
                new.age = old.age + 1 if new.token == old.token else 0
                state.guesses[place] = new
            else:
                state.guesses.append(new)
