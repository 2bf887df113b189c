"""Lookahead decoding: n-grams are harvested from Jacobi trajectories and verified when their first token comes up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...registry import register
from ...types import NO_PARENT
from ..contracts import DrafterContext, Observation, Sequence
from .answers import Answers, follows
from .nodes import NodeDrafter, Nodes, NodeState, check_range
from .rates import Rates

_DEPTHS = 8  # of the table of rates


@dataclass(slots=True)
class _State(NodeState):
    """`window[j]` are the last guesses of column j in the order in which they were made, oldest first."""

    window: list[list[int]]
    pool: dict[int, dict[tuple[int, ...], None]] = field(default_factory=dict)  # first token -> what followed, by age
    read: int = 0  # tokens of the text whose n-grams are in the pool
    ends: list[int] = field(default_factory=list)  # node of the newest guess of each column that was proposed

    def learn(self, ngram: list[int], most: int) -> None:
        """Put an n-gram into the pool, as its youngest."""
        known = self.pool.setdefault(ngram[0], {})
        rest = tuple(ngram[1:])
        known.pop(rest, None)
        known[rest] = None
        if len(known) > most:
            del known[next(iter(known))]


@register(
    family="SPEC",
    title="Lookahead decoding",
    paper="https://arxiv.org/abs/2402.02057",
    exactness="identical",
    claim="up to 1.8x on MT-bench, 4x on code with several GPUs",
)
@dataclass(slots=True, eq=False)
class Lookahead(NodeDrafter[_State]):
    """Two branches share each step.

        verification   n-grams of the pool that begin with the last token, each a chain from the root
        lookahead      `window` columns of n - 1 guesses each; the target's answers after the newest guesses are the
                       next ones, and a column's guesses with its answer are an n-gram for the pool

    The oldest guesses of all columns are a chain from the root, and below each hang its column's younger ones:

        root ── a1 ── a2 ── a3        columns (a1, b1), (a2, b2), (a3, b3) of a window of 3 with n = 3
                 └ b1  └ b2  └ b3

    Fu et al., "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding", section 3. The pool starts,
    if `from_text`, with the n-grams of the text so far, and takes new ones up as the text grows. The defaults suit
    steps of 16 rows (the paper's for small models, W = 15 and N = 5, take 121); where rows are short, half verify.

    Parameters: `window` W; `ngram` N; `guesses` G, n-grams kept and verified per first token; `from_text`.
    A node's score is the measured acceptance for its depth and the age rank of its n-gram, or its place in the window.
    The lookahead branch pays by its harvest, so its nodes stay whatever their scores.
    """

    name = "lookahead"
    paper = "https://arxiv.org/abs/2402.02057"

    window: int = 3
    ngram: int = 4
    guesses: int = 5
    from_text: bool = True
    coupled: bool = True
    _states: dict[int, _State] = field(default_factory=dict, init=False, repr=False)
    _rates: Rates = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_range(self.name, "window", self.window, 1)
        check_range(self.name, "ngram", self.ngram, 2)
        check_range(self.name, "guesses", self.guesses, 1)
        prior = [[0.3 * 0.75**rank] + [0.5] * (_DEPTHS - 1) for rank in range(self.guesses)]
        self._rates = Rates(prior + [[0.08] * _DEPTHS] * (self.ngram - 1))

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> Lookahead:
        return cls(coupled=not context.sampled, **options)

    def begin(self, sequence: Sequence) -> None:
        prompt = np.array(sequence.tokens)
        start = np.random.default_rng(sequence.params.seed).choice(prompt, (self.window, self.ngram - 1))
        self._states[sequence.id] = _State(start.tolist())

    def _grow(self, sequence: Sequence, state: _State, nodes: Nodes, budget: int, floor: float) -> None:
        if self.from_text:
            self._read(sequence.tokens, state)
        level = self.ngram - 1
        columns = min(self.window, (budget + 1) // 2 // level)
        self._verify_pool(state, nodes, sequence.tokens[-1], budget - columns * level, floor)
        columns = min(self.window, (budget - len(nodes)) // level)
        self._look_ahead(state, nodes, columns)

    def _read(self, tokens: list[int], state: _State) -> None:
        """The n-grams of the text that are not in the pool yet."""
        for end in range(max(state.read, self.ngram - 1) + 1, len(tokens) + 1):
            state.learn(tokens[end - self.ngram : end], self.guesses)
        state.read = len(tokens)

    def _verify_pool(self, state: _State, nodes: Nodes, last: int, budget: int, floor: float) -> None:
        rates = self._rates.value
        for rank, rest in enumerate(reversed(state.pool.get(last, {}))):
            node, reach = NO_PARENT, 1.0
            for depth, token in enumerate(rest):
                cell = (rank, min(depth, _DEPTHS - 1))
                reach *= float(rates[cell])
                if reach < floor or (nodes.find(node, token) is None and len(nodes) >= budget):
                    break
                node = nodes.add(node, token, float(rates[cell]), cell)

    def _look_ahead(self, state: _State, nodes: Nodes, columns: int) -> None:
        rates, node = self._rates.value, NO_PARENT
        state.ends = []
        for place, column in enumerate(state.window[:columns]):
            for age, token in enumerate(column):
                cell = (self.guesses + age, min(place, _DEPTHS - 1))
                if age == 0:
                    node = end = nodes.add(node, token, float(rates[cell]), cell)
                else:
                    end = nodes.add(end, token, float(rates[cell]), cell)
            state.ends.append(end)

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        state = self._states[sequence.id]
        if follows(sequence, seen, state.nodes.root) and state.ends:
            answers = Answers(sequence, seen, state.nodes.draft(self.name))
            for place, end in enumerate(state.ends):
                if end in answers:
                    column = [*state.window[place], answers.token(end, self.coupled)]
                    state.learn(column, self.guesses)
                    state.window[place] = column[1:]
        state.ends = []
        self._check(sequence, state)
