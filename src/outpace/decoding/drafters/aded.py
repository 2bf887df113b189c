"""Adaptive Draft-Verification: a tri-gram model of the target's own answers, searched like a game tree."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...models.decoder import Taps
from ...registry import register
from ...types import NO_PARENT
from ..contracts import DrafterContext, Observation, Sequence
from .nodes import NodeDrafter, Nodes, NodeState, check_range
from .owners import OwnerOf, PerOwner, one_owner
from .rates import Rates

_EDGES = (0.01, 0.03, 0.07, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95)  # bins of the model's probability
_PRIOR = (0.005, 0.015, 0.03, 0.07, 0.15, 0.28, 0.42, 0.52, 0.62, 0.72)  # acceptance to start from

Pair = tuple[int, int]
Options = list[tuple[int, float]]  # (token, probability), the likeliest first


class Trigrams:
    """P(c | a, b) as the target's answers after the pair (a, b) say, the latest counting most.

    A row keeps the `k` likeliest tokens; at most `most` rows are kept, the one written the longest ago goes.
    """

    def __init__(self, k: int, keep: float, most: int) -> None:
        self._k, self._keep, self._most = k, keep, most
        self._rows: dict[Pair, dict[int, float]] = {}
        self._ranked: dict[Pair, Options] = {}  # rows in order, made when they are needed

    def learn(self, pair: Pair, answer: Options) -> None:
        row = self._rows.pop(pair, None)
        if row is None:
            row = dict(answer)
            if len(self._rows) >= self._most:
                oldest = next(iter(self._rows))
                del self._rows[oldest]
                self._ranked.pop(oldest, None)
        else:
            for token in row:
                row[token] *= self._keep
            for token, p in answer:
                row[token] = row.get(token, 0.0) + (1 - self._keep) * p
            if len(row) > 2 * self._k:
                row = dict(sorted(row.items(), key=lambda item: -item[1])[: self._k])
        self._rows[pair] = row
        self._ranked.pop(pair, None)

    def after(self, pair: Pair) -> Options:
        ranked = self._ranked.get(pair)
        if ranked is None:
            row = self._rows.get(pair)
            if row is None:
                return []
            ranked = sorted(row.items(), key=lambda item: -item[1])[: self._k]
            self._ranked[pair] = ranked
        return ranked


@dataclass(slots=True)
class _Edge:
    """A token below a node of the search tree, its probability, and what the search found below."""

    token: int
    p: float
    visits: int = 0
    value: float = 0.0  # expected number of accepted tokens from this one on, the best way down
    below: _Position | None = None


@dataclass(slots=True)
class _Position:
    pair: Pair
    edges: list[_Edge]
    visits: int = 0


class Search:
    """Monte-Carlo tree search over the tri-gram model, with the choice rule of AlphaZero (PUCT):

        value(s, a) / depth + C(s) * P(a | s) * sqrt(visits(s)) / (1 + visits(s, a))
        C(s) = c1 + log((visits(s) + c2 + 1) / c2)

    Each simulation walks down to a position without a visit and adds it. `value` is backed up as the expected number
    of accepted tokens on the best way down; divided by the longest depth it is at most 1.
    """

    def __init__(self, model: Trigrams, pair: Pair, c1: float, c2: float, max_depth: int) -> None:
        self.model, self.c1, self.c2, self.max_depth = model, c1, c2, max_depth
        self.root = self._position(pair)

    def _position(self, pair: Pair) -> _Position:
        return _Position(pair, [_Edge(token, p) for token, p in self.model.after(pair)])

    def simulate(self) -> None:
        at, walked = self.root, list[_Edge]()
        while at.edges and len(walked) < self.max_depth:
            edge = self._choose(at)
            at.visits += 1
            walked.append(edge)
            fresh = edge.below is None
            if edge.below is None:
                edge.below = self._position((at.pair[1], edge.token))
            at = edge.below
            if fresh:
                break
        for edge in reversed(walked):
            edge.visits += 1
            best = max((e.value for e in edge.below.edges), default=0.0) if edge.below is not None else 0.0
            edge.value = edge.p * (1 + best)

    def _choose(self, at: _Position) -> _Edge:
        explore = (self.c1 + math.log((at.visits + self.c2 + 1) / self.c2)) * math.sqrt(at.visits + 1)
        scale = 1 / self.max_depth
        return max(at.edges, key=lambda e: e.value * scale + explore * e.p / (1 + e.visits))


@dataclass(slots=True)
class _State(NodeState):
    model: Trigrams


@register(
    family="SPEC",
    title="Adaptive Draft-Verification (ADED)",
    paper="https://arxiv.org/abs/2407.12021",
    exactness="identical",
)
@dataclass(slots=True, eq=False)
class Aded(NodeDrafter[_State]):
    """A tri-gram matrix stands for the target: after each step it moves towards the target's distributions in all
    verified rows, rejected ones too, and it starts from the prompt's tri-grams. Drafts are built from it by a
    Monte-Carlo tree search whose rule balances exploration and exploitation; the positions that the search visited,
    merged into one tree, are the draft, the likeliest first.

    Liu et al., "Adaptive Draft-Verification for Efficient Large Language Model Decoding", sections on the tri-gram
    representation and on draft construction. The constants of the rule are those of MuZero (arXiv 1911.08265).

    Parameters: `simulations` walks per draft; `c1`, `c2` weight of exploration and how slowly it grows with the visits;
    `max_depth` of the search; `k` likeliest tokens kept per pair; `keep` share of a row that an answer leaves as it
    was; `max_pairs` rows per owner; `min_score` least probability of being reached that a node must have. Sequences of
    one owner share a matrix, at most `max_owners` are kept.
    """

    name = "aded"
    paper = "https://arxiv.org/abs/2407.12021"

    simulations: int = 48
    c1: float = 1.25
    c2: float = 19652.0
    max_depth: int = 8
    k: int = 8
    keep: float = 0.3
    max_pairs: int = 1 << 16
    min_score: float = 0.004
    owner_of: OwnerOf = one_owner
    max_owners: int = 16
    _models: PerOwner[Trigrams] = field(init=False, repr=False)
    _states: dict[int, _State] = field(default_factory=dict, init=False, repr=False)
    _rates: Rates = field(default_factory=lambda: Rates(_PRIOR), init=False, repr=False)

    def __post_init__(self) -> None:
        for parameter in ("simulations", "max_depth", "k", "max_pairs"):
            check_range(self.name, parameter, getattr(self, parameter), 1)
        check_range(self.name, "c1", self.c1, 0)
        check_range(self.name, "c2", self.c2, 1)
        check_range(self.name, "keep", self.keep, 0, 1)
        check_range(self.name, "min_score", self.min_score, 0, 1)
        self._models = PerOwner(self.owner_of, lambda: Trigrams(self.k, self.keep, self.max_pairs), self.max_owners)

    @classmethod
    def create(cls, context: DrafterContext, **options: Any) -> Aded:
        return cls(owner_of=context.owner_of or one_owner, **options)

    @property
    def taps(self) -> Taps:
        return Taps(topk=self.k)

    def begin(self, sequence: Sequence) -> None:
        model = self._models.of(sequence)
        for a, b, c in zip(sequence.tokens, sequence.tokens[1:], sequence.tokens[2:], strict=False):
            model.learn((a, b), [(c, 1.0)])
        self._states[sequence.id] = _State(model)

    def _grow(self, sequence: Sequence, state: _State, nodes: Nodes, budget: int, floor: float) -> None:
        before, last = sequence.tokens[-2:][0], sequence.tokens[-1]
        search = Search(state.model, (before, last), self.c1, self.c2, self.max_depth)
        for _ in range(self.simulations):
            search.simulate()
        rates: list[float] = self._rates.value.tolist()
        floor = max(self.min_score, floor)
        found: list[tuple[float, int, int, int]] = []  # reach, place of what is above, token, cell

        def list_below(at: _Position | None, above: int, reach: float) -> None:
            for edge in at.edges if at is not None else ():
                if edge.visits:
                    cell = bisect_right(_EDGES, edge.p)
                    reached = reach * rates[cell]
                    if reached >= floor:
                        found.append((reached, above, edge.token, cell))
                        list_below(edge.below, len(found) - 1, reached)

        list_below(search.root, NO_PARENT, 1.0)
        # No position is likelier than the one above it and the sort is stable: what is kept is a tree.
        kept: dict[int, int] = {NO_PARENT: NO_PARENT}
        for place in sorted(range(len(found)), key=lambda i: -found[i][0])[:budget]:
            _, above, token, cell = found[place]
            kept[place] = nodes.add(kept[above], token, rates[cell], (cell,))

    def observe(self, sequence: Sequence, seen: Observation) -> None:
        state = self._states[sequence.id]
        self._check(sequence, state)
        if seen.kind == "prefill":
            return
        root = len(sequence.tokens) - len(seen.new_tokens) - 1
        tokens = [sequence.tokens[root], *seen.draft.tokens.tolist()]
        parents = [NO_PARENT, *(p + 1 for p in seen.draft.parents.tolist())]
        values, ids = seen.outputs.topk(self.k)
        weights = np.exp(values - values[:, :1])
        shares = (weights / weights.sum(axis=1, keepdims=True)).tolist()
        for row, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            before = tokens[parent] if row else sequence.tokens[max(root - 1, 0)]
            state.model.learn((before, token), list(zip(ids[row].tolist(), shares[row], strict=True)))
